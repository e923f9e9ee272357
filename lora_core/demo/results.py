"""Every figure of a run, as it is written to results.json."""

import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lora_core.demo.adaptation import Adapted, Losses
from lora_core.demo.agreement import Agreement
from lora_core.demo.weights import QuantizationError, Spectrum

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One method's line of the table."""

    name: str
    title: str
    settings: str
    trainable: int
    weight_bytes: int
    optimizer_bytes: int
    step_ms: float
    before: Losses
    after: Losses
    train_curve: list[float]
    held_out_curve: list[tuple[int, float]]
    sample: str

    @classmethod
    def of(cls, adapted: Adapted, sample: str) -> "Row":
        """What was measured of an adapted model."""
        same = ("trainable", "weight_bytes", "optimizer_bytes", "step_ms", "before", "after", "train_curve")
        return cls(
            name=adapted.method.name,
            title=adapted.method.title,
            settings=adapted.method.describe(),
            held_out_curve=adapted.held_out_curve,
            sample=sample,
            **{name: getattr(adapted, name) for name in same},
        )


@dataclass(frozen=True)
class Results:
    """A whole run."""

    setting: dict[str, Any]
    rows: list[Row]
    agreement: Agreement
    quantization: list[QuantizationError]
    spectra: list[Spectrum]
    rank: int
    prompt: str
    base_sample: str
    seconds: float
    peak_memory_bytes: int | None

    @property
    def peak_memory(self) -> str:
        """What the most memory was, in words."""
        known = "unknown" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / MIB:,.0f} MiB"
        return f"peak memory {self.setting['memory']} {known}"

    @property
    def energy_in_rank(self) -> float:
        """Mean over the matrices of the share of the update's energy in its first r singular values."""
        return sum(spectrum.energy_in_rank for spectrum in self.spectra) / len(self.spectra)

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        known = asdict(self)
        known["agreement"]["agrees"] = self.agreement.agrees
        known["energy_in_rank"] = self.energy_in_rank
        return known


def forget_peak_memory(device: torch.device) -> None:
    """Starts the account of a GPU's memory anew; that of a process cannot be."""
    if device.type == "cuda":
        # before CUDA runs there is no account to reset
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory that tensors have taken on a GPU since it was forgotten, or that this process held, resident.

    None where the system does not say, as Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts KiB, macOS bytes
    return peak if sys.platform == "darwin" else 1024 * peak


def machine(device: torch.device) -> dict[str, Any]:
    """Where the run was."""
    if device.type == "cuda":
        name, memory = torch.cuda.get_device_name(device), "of tensors on the GPU"
    else:
        threads = torch.get_num_threads()
        name, memory = f"CPU, {threads} thread{'s' * (threads > 1)}", "of the process"
    return {
        "device": name,
        "memory": memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
