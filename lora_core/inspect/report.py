"""What an inspection finds, as plain data."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Pair:
    """One adapted module of an adapter.

    Args:
        module: its name in the base model.
        rank: R, from the shape of A.
        scaling: s, or None without a configuration.
        shape_a: of A.
        shape_b: of B.
        dtype: of A and B.
        update_norm: Frobenius norm of s B A; of B A where s is not known.
        untrained: B A is exactly zero.
    """

    module: str
    rank: int
    scaling: float | None
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    dtype: str
    update_norm: float
    untrained: bool


@dataclass(frozen=True)
class Quantised:
    """One weight in bitsandbytes' 4-bit format.

    Args:
        name: of the weight.
        quant_type: "nf4" or "fp4".
        shape: of the original weight.
        dtype: of the original weight.
        block_size: elements sharing one scale.
        double_quant: whether the scales are quantised too.
        bits_per_parameter: of codes and scales, without the tables every weight repeats.
    """

    name: str
    quant_type: str
    shape: tuple[int, ...]
    dtype: str
    block_size: int
    double_quant: bool
    bits_per_parameter: float


@dataclass(frozen=True)
class Plain:
    """A tensor that is neither part of an adapter's pair nor of a quantised weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass
class Report:
    """Everything known about a checkpoint.

    Args:
        path: what was inspected.
        kind: "adapter" or "checkpoint".
        files: size in bytes by name.
        settings: method, rank, alpha, targets, ...; empty for a checkpoint.
        pairs: adapted modules.
        quantised: quantised weights.
        plain: all other tensors.
        problems: what is wrong.
        notes: what is worth knowing.
    """

    path: str
    kind: str
    files: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    quantised: list[Quantised] = field(default_factory=list)
    plain: list[Plain] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
