"""What a run of the demo is asked to do."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_core.demo.base import SHIPPED
from lora_core.errors import ConfigError, DeviceError

# seeds are shifted left by 20 bits to make room for the step
LARGEST_SEED = 2**32 - 1
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Method:
    """One way to adapt the base; rates were chosen by the training loss of runs with another seed."""

    name: str
    title: str
    learning_rate: float
    adapter: bool
    rslora: bool = False
    quantized: bool = False
    rank: int = 16
    alpha: float = 32

    def describe(self) -> str:
        """The method's settings in a few words."""
        if not self.adapter:
            return f"every weight, rate {self.learning_rate:g}"
        scale = (
            f"alpha/sqrt(r) = {self.alpha / self.rank**0.5:g}"
            if self.rslora
            else f"alpha/r = {self.alpha / self.rank:g}"
        )
        base = "NF4 base with double quantisation" if self.quantized else "float32 base"
        return f"r = {self.rank}, {scale}, rate {self.learning_rate:g}, {base}"


METHODS = (
    Method("full", "full fine-tuning", 1.5e-3, adapter=False),
    Method("lora", "LoRA", 7e-3, adapter=True),
    Method("rslora", "rsLoRA", 3e-3, adapter=True, rslora=True),
    Method("qlora", "QLoRA", 7e-3, adapter=True, quantized=True),
)


@dataclass(frozen=True)
class DemoSettings:
    """How large a run is; with the corpus and the base, this decides every figure but the timings."""

    seed: int = 0
    steps: int = 32
    batch: int = 16
    # windows of the held-out text per domain, for the table and for each point of the curves
    table_windows: int = 64
    curve_windows: int = 32
    # points of each curve
    curve_points: int = 8
    # windows on which the three forms of the QLoRA model are compared
    agreement_windows: int = 16
    sample_tokens: int = 96
    base: Path = SHIPPED

    @classmethod
    def quick(cls, seed: int = 0) -> "DemoSettings":
        """A run of seconds: every part, no learning to speak of."""
        return cls(
            seed,
            4,
            4,
            table_windows=8,
            curve_windows=4,
            curve_points=2,
            agreement_windows=2,
            sample_tokens=8,
        )


def check_seed(seed: int) -> None:
    """Raises ConfigError unless the seed is a number that the streams of batches have room for."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed is {seed}; want a whole number from 0 to {LARGEST_SEED}")


def check_steps(steps: int) -> None:
    """Raises ConfigError unless there is a step to take and the seed's stream has room for all."""
    if not 1 <= steps < 2**20:
        raise ConfigError(f"steps is {steps}; want a whole number from 1 to {2**20 - 1}")


def check_output(output: Path, files: Iterable[str] = ()) -> None:
    """Makes the folder; raises ConfigError if that cannot be, or one of the files could not be written there."""
    paths = [output / name for name in files]
    folders = list(dict.fromkeys([output, *(path.parent for path in paths)]))
    try:
        for part in (*output.parents, *folders):
            if part.exists() and not part.is_dir():
                raise ConfigError(f"output is {output}, but {part} is a file; want a folder, new or not")
        for path in paths:
            if path.is_dir():
                raise ConfigError(f"output is {output}, but {path} is a folder; want no folder where a file is written")
        output.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            if folder.exists():
                # permissions, quotas and read-only disks are known for certain only by trying
                tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise ConfigError(f"output is {output}, which cannot be written: {why}; want another folder") from None


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto" takes the GPU if PyTorch finds one.

    Raises:
        ConfigError: if it is none of auto, cpu, cuda.
        DeviceError: if cuda is asked for and PyTorch finds no GPU.
    """
    if name not in DEVICES:
        raise ConfigError(f"device is {name!r}; want one of {', '.join(DEVICES)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device is 'cuda', but this PyTorch ({torch.__version__}) finds no GPU; use --device cpu, or install a "
            "build of PyTorch for CUDA (lora-core doctor shows what is found)"
        )
    wanted = "cuda" if name == "auto" and torch.cuda.is_available() else name
    return torch.device("cpu" if wanted == "auto" else wanted)
