"""Are the trained QLoRA model, its adapter loaded into a fresh base, and the merged model one and the same?

Reloading must give the same numbers bit for bit: the same operations run on the same weights. Merging adds s B A to W
in float32 and so rounds differently; the bound is the trained model's own rounding error, measured against float64.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_core.adapt.load import load_adapter
from lora_core.adapt.merge import merge_adapter, merge_and_unload
from lora_core.adapt.save import save_adapter
from lora_core.demo.adaptation import Adapted, Losses, measure
from lora_core.demo.base import Base
from lora_core.demo.settings import DemoSettings
from lora_core.demo.text import Text

# W + s B A is rounded once more than W x + s B (A x) is; both errors are sums of many roundings of one size
ROUNDING_FACTOR = 4.0


@dataclass(frozen=True)
class Agreement:
    """Measured differences between three forms of one model, on the logits of held-out code.

    Args:
        reloaded_difference: largest |logit| difference of the reloaded model; 0 is bit for bit.
        merged_difference: the same of the merged model.
        trained_rounding: rms error of the trained model's logits against float64.
        merged_rounding: the same of the merged model.
        trained, reloaded, merged: losses.
        requantized: losses after merging into NF4, which rounds the weights to 4 bits again.
        requantizing_error: largest relative error of a layer's weight from doing so.
    """

    reloaded_difference: float
    merged_difference: float
    trained_rounding: float
    merged_rounding: float
    trained: Losses
    reloaded: Losses
    merged: Losses
    requantized: Losses
    requantizing_error: float

    @property
    def agrees(self) -> bool:
        """Whether reloading changed no bit and merging no more than rounding does."""
        return self.reloaded_difference == 0 and self.merged_rounding <= ROUNDING_FACTOR * self.trained_rounding


def check_agreement(
    adapted: Adapted, base: Base, text: Text, settings: DemoSettings, device: torch.device, folder: Path
) -> Agreement:
    """Saves the adapter, loads it into fresh bases, merges it, and compares.

    Args:
        adapted: the model trained by QLoRA.
        base: what it was trained from.
        text: held-out text to compare on.
        settings: sizes.
        device: where to run.
        folder: where the adapter is saved in PEFT's layout.
    """
    save_adapter(adapted.model, folder)
    reloaded = load_adapter(base.quantized().to(device), folder)
    merged = merge_and_unload(load_adapter(base.dequantized().to(device), folder))
    truth = load_adapter(base.dequantized().to(device), folder).double()
    context = base.config.context
    windows = text.code_held_out[: settings.agreement_windows * context].view(-1, context).to(device)
    exact = logits(truth, windows)
    ours, theirs, plain = (logits(model, windows) for model in (adapted.model, reloaded, merged))
    losses = [measure(model, text, base, settings) for model in (reloaded, merged)]
    report = merge_adapter(reloaded)
    return Agreement(
        reloaded_difference=(ours - theirs).abs().max().item(),
        merged_difference=(ours - plain).abs().max().item(),
        trained_rounding=(ours - exact).square().mean().sqrt().item(),
        merged_rounding=(plain - exact).square().mean().sqrt().item(),
        trained=adapted.after,
        reloaded=losses[0],
        merged=losses[1],
        requantized=measure(reloaded, text, base, settings),
        requantizing_error=report.worst,
    )


@torch.no_grad()
def logits(model: nn.Module, windows: Tensor) -> Tensor:
    """The model's logits in float64."""
    model.eval()
    return model(windows).double()
