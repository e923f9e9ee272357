"""Codebooks: the finite sets of levels that block-wise quantisation rounds to.

A block of weights is divided by its largest magnitude and each quotient, in [-1, 1], is stored as the index of a level.

NF4 puts its levels at quantiles of the normal distribution. Normal weights would use them almost evenly, 5.6% to 7.1%
each, if they were divided by one scale; divided by the largest of 64 each, they use those around zero most (9%) and the
outermost least (2%).

    negative side:  -Phi^-1(linspace(t, 1/2, 8)) without its last
    zero
    positive side:   Phi^-1(linspace(t, 1/2, 9)) without its last
    with t = 0.9677083; all divided by the largest

Eight positive and seven negative levels with an exact zero. The dynamic 8-bit map spends its bits like a tiny floating
format whose exponent is unary: 1, 2, 4, ..., 64 levels per decade, evenly spaced inside a decade.

Sources: Dettmers et al. 2023 (arXiv 2305.14314), appendix E; Dettmers 2015 (arXiv 1511.04561), section 2.1.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_core.errors import ConfigError

# the end of the quantile range: the mean of 1 - 1 / 30 and 1 - 1 / 32; bitsandbytes' create_normal_map
NF4_OFFSET = 0.9677083

# Dettmers et al. 2023, appendix E, as bitsandbytes stores them
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# a sign bit and three bits of a float with two exponent bits and one mantissa bit, in twelfths; bitsandbytes' FP4
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

DYNAMIC_EXPONENT_BITS = 7


@dataclass(frozen=True, eq=False)
class Codebook:
    """A set of levels and the rule that finds the nearest.

    Args:
        name: "nf4", "fp4", "int4", "dynamic" or "dynamic_unsigned".
        levels: float32 of shape [16] or [256], on the CPU; a code is an index into it.
        sign_bit: where not 0, codes are sign and magnitude: this bit is set for negative values.
        ties_to_even: a value half-way between two levels takes the even code; else the lower one (for sign and
            magnitude: the one nearer zero).
    """

    name: str
    levels: Tensor
    sign_bit: int = 0
    ties_to_even: bool = False

    def __post_init__(self) -> None:
        # computed now: first asked for under a FakeTensorMode they would stay fake
        _ = self.midpoints, self.zero

    @functools.cached_property
    def _order(self) -> Tensor:
        """Codes by rising level; of sign-and-magnitude codes the non-negative half."""
        levels = self.levels[: self.sign_bit] if self.sign_bit else self.levels
        return levels.argsort()

    @functools.cached_property
    def midpoints(self) -> Tensor:
        """Return what separates neighbouring levels: float32 where ties go down, else float64, where they are exact."""
        ordered = self.levels[self._order]
        if self.ties_to_even:
            ordered = ordered.double()
        return (ordered[1:] + ordered[:-1]) / 2

    def encode(self, scaled: Tensor) -> Tensor:
        """Return the code of the level nearest to each value.

        Args:
            scaled: float32 of any shape, in [-1, 1].
        Returns:
            uint8 of the same shape.
        """
        values = scaled.abs() if self.sign_bit else scaled
        midpoints = self.midpoints.to(scaled.device)
        # counts the midpoints below the value: a tie stays below
        rank = torch.bucketize(values.to(midpoints.dtype), midpoints, out_int32=True)
        if self.ties_to_even:
            at = midpoints[rank.clamp(max=midpoints.numel() - 1)] == values
            rank = rank + (at & (rank % 2 == 1))
        code = self._order.to(scaled.device)[rank]
        return (code + self.sign_bit * (scaled < 0) if self.sign_bit else code).to(torch.uint8)

    @functools.cached_property
    def zero(self) -> int:
        """Return the code that zero gets."""
        return int(self.encode(torch.zeros(1, device="cpu")))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the levels of uint8 codes: float32, the same shape."""
        return self.levels.to(codes.device)[codes.int()]


def codebook(name: str) -> Codebook:
    """Return the codebook of this name.

    Raises:
        ConfigError: if there is none.
    """
    if not isinstance(name, str) or name not in _BOOKS:
        raise ConfigError(f"no codebook {name!r}: want one of {', '.join(_BOOKS)}")
    return _BOOKS[name]


def dynamic_map(signed: bool) -> Tensor:
    """Return the 256 levels of the dynamic map, sorted: float32 on the CPU.

    Decade i of 7, i = 0 the smallest, holds 2^i levels (unsigned: 2^(i+1)), the middles of equal steps from 0.1 to 1
    times 10^(i-6), and with sign their negatives; then 0 and 1.
    """
    levels = [0.0, 1.0]
    for decade in range(DYNAMIC_EXPONENT_BITS):
        steps = 2 ** (decade + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, steps + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (decade - DYNAMIC_EXPONENT_BITS + 1)) * (edges[:-1] + edges[1:]) / 2.0
        levels += middles.tolist() + ((-middles).tolist() if signed else [])
    levels += [0.0] * (256 - len(levels))
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


def derive_nf4() -> Tensor:
    """Return the NF4 levels from normal quantiles: float64 of shape [16]; equal to NF4_LEVELS within 1.2e-7."""
    from scipy.stats import norm

    half = torch.linspace(NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1]
    short = torch.linspace(NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1]
    positive, negative = torch.from_numpy(norm.ppf(half)), -torch.from_numpy(norm.ppf(short))
    levels = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return levels / levels.max()


def _tensor(levels: object) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device="cpu")


def _fp4() -> Codebook:
    magnitudes = _tensor(FP4_TWELFTHS) / 12
    return Codebook("fp4", torch.cat([magnitudes, -magnitudes]), sign_bit=8)


# Made when imported, all of each: made at their first use, inside torch.export say, they would be fake for good.
_BOOKS = {
    book.name: book
    for book in (
        Codebook("nf4", _tensor(NF4_LEVELS)),
        _fp4(),
        # sixteen levels, fifteen even steps; none of them is zero
        Codebook("int4", torch.linspace(-1, 1, 16, dtype=torch.float32, device="cpu")),
        Codebook("dynamic", dynamic_map(signed=True), ties_to_even=True),
        Codebook("dynamic_unsigned", dynamic_map(signed=False), ties_to_even=True),
    )
}
