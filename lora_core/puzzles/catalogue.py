"""The exercises: their order, titles and hints."""

from dataclasses import dataclass
from pathlib import Path

import lora_core
from lora_core.errors import ConfigError

# where the stubs are: in an installed package beside this file, in a checkout among the documents
INSTALLED = Path(__file__).resolve().parent / "stubs"
CHECKOUT = Path(lora_core.__file__).resolve().parent.parent / "docs" / "puzzles"


@dataclass(frozen=True)
class Puzzle:
    """One exercise.

    Args:
        number: its place, from 1.
        name: of its file, without number and ending.
        title: what it is about.
        function: what the learner writes.
        triton: it is a Triton kernel.
        hints: from a nudge to nearly all.
    """

    number: int
    name: str
    title: str
    function: str
    triton: bool
    hints: tuple[str, ...]

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.number:02}-{self.name}.py"


PUZZLES = (
    Puzzle(1, "lora-forward", "LoRA forward", "lora_forward", False, (
        "Two paths: the frozen x W^T + b, and s (x A^T) B^T.",
        "x @ lora_a.T is [M, R]; that @ lora_b.T is [M, N]. Never form B A.",
        "return x @ weight.T + bias + scaling * (x @ lora_a.T) @ lora_b.T",
    )),
    Puzzle(2, "lora-backward", "LoRA backward by hand", "lora_backward", False, (
        "Write S = x A^T, so y = x W^T + s S B^T; then follow every input's change to y.",
        "dS = s G B belongs to both dA = dS^T x and dx = G W + dS A; dB = s G^T S.",
        "d_s = scaling * d_y @ lora_b, and the rest is one product each.",
    )),
    Puzzle(3, "nf4-unpack", "NF4 unpack", "unpack", False, (
        "A byte holds two codes, the first in its high half.",
        "packed >> 4 and packed & 15; torch.stack(..., dim=-1) interleaves them.",
        "Interleave, flatten, and cut to n: an odd n leaves half a byte over.",
    )),
    Puzzle(4, "nf4-quantize", "NF4 quantise", "quantize", False, (
        "Each block is divided by its largest magnitude, then each weight takes the nearest level.",
        "A last block may be short, and a block of zeros must not be divided by zero.",
        "Pad with zeros to whole blocks; torch.bucketize with the midpoints counts the levels below.",
    )),
    Puzzle(5, "nested-absmax", "Nested absmax", "decode_absmax", False, (
        "Scale i has code codes[i] and shares absmax2[i // block_size] with its block.",
        "The mean was subtracted before the codes were made: add it last.",
        "levels[codes.long()] * absmax2.repeat_interleave(block_size)[:n] + offset, each rounded by itself.",
    )),
    Puzzle(6, "first-kernel", "A first kernel: tiles and bounds", "scale_kernel", True, (
        "Program p does elements p BLOCK to (p + 1) BLOCK - 1; tl.program_id(0) is p.",
        "tl.arange(0, BLOCK) counts inside the tile; the last tile reaches past n.",
        "mask = place < n, in the load and in the store.",
    )),
    Puzzle(7, "nf4-dequantize", "NF4 dequantise, as a kernel", "dequantize_kernel", True, (
        "Let a program do BLOCK weights: weight i is in byte i // 2 and under scale i // BLOCK_SIZE.",
        "Even weights are in the high half: shift by 4 where i is even.",
        "tl.load(levels_ptr + code) * tl.load(absmax_ptr + place // BLOCK_SIZE), masked throughout.",
    )),
    Puzzle(8, "fused-epilogue", "Fused epilogue", "lora_matmul_kernel", True, (
        "First a plain tiled product x W^T over K, in a float32 accumulator.",
        "When K is done, and only then, add scaling times S B^T, over R in the same way.",
        "Mask rows, columns, K and R in every load with other=0.0: what lies beyond may be NaN.",
    )),
    Puzzle(9, "no-atomics", "Backward without atomics", "partial_kernel", True, (
        "Program (i, p) sums rows p ROWS to (p + 1) ROWS - 1 of G^T S into part p; a second kernel adds the parts.",
        "The order of the additions must be the same in every run: no tl.atomic_add.",
        "sum_kernel: for p in range(PARTS), in this order, acc += part p.",
    )),
    Puzzle(10, "dropout", "Counter-based dropout", "dropout_kernel", True, (
        "Whether an element is kept depends on seed, row and column alone, not on its tile.",
        "row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M): the element's own row, and its column likewise.",
        "keep = mix(mix(seed ^ mix(row))[:, None] ^ column[None, :]) >= threshold, in uint32.",
    )),
    Puzzle(11, "dora-norm", "DoRA norm without B A", "dora_norm", False, (
        "|W_n + s (B A)_n|^2 is a binomial: three sums.",
        "W A^T is [N, R] and A A^T is [R, R]: both small. An einsum of three starts with its first two: not B and A.",
        "(W W).sum(1) + 2 s (B * (W A^T)).sum(1) + s^2 (B * (B (A A^T))).sum(1), then the root.",
    )),
    Puzzle(12, "grouped-adapters", "Grouped adapters", "grouped_lora", False, (
        "Rows of the same adapter can be done together; -1 means none.",
        "torch.nonzero(which == g) are adapter g's rows; ranks may differ, so no stacking of A.",
        "y = base.clone(); y[rows] += scaling * (x[rows] @ a.T) @ b.T for every adapter that has rows.",
    )),
    Puzzle(13, "speed-gate", "NF4 dequantise under a budget of instructions", "dequantize_kernel", True, (
        "One byte at a time is too dear: load 32-bit words of eight codes, so that loads and stores are wide.",
        "Look levels up with tl.gather in a tile of sixteen; loads from global memory cost address arithmetic.",
        "A scale belongs to a whole word: load absmax_ptr + word // (BLOCK_SIZE // 8), and broadcast it over eight.",
    )),
)  # fmt: skip


def find_puzzle(number: int) -> Puzzle:
    """Return the exercise with this number.

    Raises:
        ConfigError: if there is none.
    """
    if not 1 <= number <= len(PUZZLES):
        raise ConfigError(f"there is no exercise {number}: they are 1 to {len(PUZZLES)}, see lora-core puzzles list")
    return PUZZLES[number - 1]


def stub(puzzle: Puzzle) -> Path:
    """Return the exercise's file as it was before anybody worked on it; in a checkout, the one to work on."""
    folder = INSTALLED if INSTALLED.is_dir() else CHECKOUT
    return folder / puzzle.file
