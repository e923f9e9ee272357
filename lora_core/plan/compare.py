"""The methods side by side on one model: what they train, what they cost at inference, and how they are judged."""

from dataclasses import dataclass

from lora_core.plan.parameters import houlsby_parameters, ia3_parameters, lora_parameters, prefix_parameters
from lora_core.plan.shape import ModelShape


@dataclass(frozen=True)
class Comparison:
    """One method.

    Args:
        method: its name and size.
        trainable: parameters trained.
        share: of the model's parameters, from 0 to 1.
        overhead: what is left to compute at inference.
        stability: of training, as commonly judged; not measured here.
        quality: as commonly judged; not measured here.
    """

    method: str
    trainable: int
    share: float
    overhead: str
    stability: str
    quality: str


def compare_methods(
    shape: ModelShape, rank: int = 16, prefix_length: int = 20, bottleneck: int = 64
) -> list[Comparison]:
    """The methods on a model of this shape; LoRA on q, k, v and o.

    Raises:
        ConfigError: if a size is below 1.
    """
    lora = lora_parameters(shape, rank, "attention")
    rows = [
        ("full fine-tuning", shape.parameters, "none", "good", "best"),
        (f"LoRA, r = {rank}", lora, "none once merged", "good", "close to best"),
        (f"QLoRA, r = {rank}", lora, "none once merged; merging into 4 bits rounds", "good", "close to best"),
        (
            f"prefix, p = {prefix_length}",
            prefix_parameters(shape, prefix_length),
            "longer keys and values",
            "poor",
            "good",
        ),
        (
            f"Houlsby, m = {bottleneck}",
            houlsby_parameters(shape, bottleneck),
            "two more layers a block",
            "good",
            "good",
        ),
        ("IA3", ia3_parameters(shape), "none once merged", "good", "moderate"),
    ]
    return [Comparison(name, count, count / shape.parameters, *rest) for name, count, *rest in rows]
