"""What a benchmark case consists of.

A file in benchmarks/cases holds `SHAPES`, what a processor runs by default, `GPU_SHAPES` likewise, `NEEDS` where
nothing of it runs without some packages, and

    def cases(shape: dict[str, int], device: str) -> Iterator[Case]

A `Case` is one comparison: several providers doing the same work in the same mode. `check(name)` runs a provider once
and says how far its result is from the truth; a provider that is out of tolerance is neither timed nor recorded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

# PyTorch's product with a dense weight and its copy of one, for scale: other work than a case's, so no rivals, and no
# floor, as fewer bytes or another library's product can take less
YARDSTICKS = ("matmul", "copy", "frozen base")
# whose backward leaves out work that its forward has done and keeps: a dense weight, of which 4 bits are to be held
AHEAD = {("nf4_lora_linear", "bwd"): ("reference", "compiled")}


def is_rival(op: str, mode: str, provider: str, ours: str) -> bool:
    """Say whether a provider does the same work as this library, and is none of its paths, "lora_core fused" say."""
    return provider.split(" ")[0] != ours and provider not in (*YARDSTICKS, *AHEAD.get((op, mode), ()))


class CheckError(AssertionError):
    """A provider's result is out of tolerance, or was never checked."""


@dataclass(frozen=True)
class Check:
    """The outcome of comparing one provider's result with the truth.

    Args:
        passed: whether it is within the tolerance.
        max_error: largest absolute error.
        rms_error: root mean square error.
        reason: what is wrong, where it did not pass.
    """

    passed: bool
    max_error: float
    rms_error: float
    reason: str = ""


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    Args:
        name: "lora_core", "bitsandbytes", "peft", "torch", ...; the first provider of a case is this library.
        run: one sample; without arguments, or taking what `prepare` returns.
        prepare: run before every sample, not timed.
        measure_memory: makes what to run for the peak memory, where that is not `run`; what it makes counts.
    """

    name: str
    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    measure_memory: Callable[[], Callable[[], Any]] | None = None

    def fresh(self) -> Callable[[], Any]:
        """Return the work of one sample as a function without arguments."""
        return self.run if self.prepare is None else partial(self.run, self.prepare())


@dataclass(frozen=True)
class Claim:
    """What a case has to show, for the first provider; what is left at None is not claimed.

    Args:
        against: the other provider it is about, a rival or another path of this library.
        no_slower: the median is no larger than the other's, or a tie.
        speed: the other's median over ours is at least this.
        no_larger: the peak memory is no larger than the other's.
        limit_ms: the median is below this.
    """

    against: str = ""
    no_slower: bool = False
    speed: float | None = None
    no_larger: bool = False
    limit_ms: float | None = None


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        op: the operation's name, the case file's name.
        mode: "fwd", "bwd" or "fwdbwd".
        shape: M tokens, N out, K in, R rank; those that apply.
        dtype: "float32", "bfloat16", "float16".
        block_size: elements sharing a scale, None where nothing is quantised.
        providers: this library first, its rivals after it; none where `missing` says why.
        check: compares one provider's result, by its name, with the truth.
        bytes_moved: bytes that have to be read and written at least; None where it says nothing.
        flops: floating-point operations needed; None where it says nothing.
        claims: what the case has to show.
        note: what the fields leave open, for the table's title.
        missing: why each other provider of this work cannot run here, by its name.
        seed: of the random inputs.
    """

    op: str
    mode: str
    shape: dict[str, int]
    dtype: str
    block_size: int | None
    providers: list[Provider]
    check: Callable[[str], Check]
    bytes_moved: int | None = None
    flops: int | None = None
    claims: tuple[Claim, ...] = ()
    note: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
