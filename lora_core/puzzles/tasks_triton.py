"""What the exercises in Triton must do, and what their usual mistakes give."""

import ast
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_core.puzzles.compare import WrongAnswer, compare, rounding
from lora_core.puzzles.tiles import Sizes, check_blocks, in_words, refuse_tile
from lora_core.puzzles.walls import DEVICE, blank, refuse_reads, walled
from lora_core.quant.codebook import codebook
from lora_core.quant.packing import pack
from lora_core.reference.dropout import dropout, keep_mask, threshold


def drawn(*shape: int) -> Tensor:
    """Return float32 numbers on the device."""
    return torch.randn(*shape, device=DEVICE)


def check_scale(kernel: Any) -> None:
    """y = factor x, a tile a program."""
    for n, factor in ((16, 3.0), (5, 3.0), (33, -1.75), (64, 0.3)):
        run_scale(kernel, n, factor, 16)
    check_blocks(lambda sizes: run_scale(kernel, 2100, 0.3, **sizes), {"BLOCK": 16}, (64, 2048), {
        "BLOCK": "the elements of a program, in its first place and in tl.arange",
    })  # fmt: skip


def run_scale(kernel: Any, n: int, factor: float, BLOCK: int) -> None:
    """Raise WrongAnswer unless the kernel does these elements."""
    x, (y, untouched) = walled(drawn(n)), blank(n)
    kernel[(-(-n // BLOCK),)](x, y, n, factor, BLOCK=BLOCK)
    given = f"{n} elements in tiles of {BLOCK}, factor {factor}"
    untouched(given)
    want = torch.tensor(factor, device=DEVICE) * x
    compare(y, want, 0, given, ((x, "you copied x: multiply by factor"), (3 * x, "the factor is not always 3")))
    refuse_reads(given)


def check_dequantize(kernel: Any) -> None:
    """Weights from codes and scales, to the bit."""
    for n, block in ((128, 32), (64, 64), (99, 32), (1, 32), (200, 128)):
        run_dequantize(kernel, n, block, 64)
    check_blocks(lambda sizes: run_dequantize(kernel, 2101, 64, **sizes), {"BLOCK": 64}, (256, 2048), {
        "BLOCK": "the weights of a program; those that share a scale, BLOCK_SIZE, are another number",
    })  # fmt: skip


def run_dequantize(kernel: Any, n: int, block: int, BLOCK: int) -> None:
    """Raise WrongAnswer unless the kernel does these weights, with a scale for so many."""
    levels = codebook("nf4").levels.to(DEVICE)
    codes = torch.randint(16, (n,), dtype=torch.uint8)
    absmax, packed = drawn(-(-n // block)).abs() + 1, pack(codes, 0).view(-1).to(DEVICE)
    (w, untouched), given = blank(n), f"{n} weights in blocks of {block}, {BLOCK} a program"
    kernel[(-(-n // BLOCK),)](walled(packed), walled(absmax), walled(levels), w, n, BLOCK_SIZE=block, BLOCK=BLOCK)
    untouched(given)
    scale = absmax.repeat_interleave(block)[:n]
    codes = codes.to(DEVICE)
    swapped = torch.stack([packed & 15, packed >> 4], 1).flatten()[:n]
    by_byte = absmax[(torch.arange(n, device=DEVICE) // 2 // block)]
    guesses = (
        (levels[swapped.long()] * scale, "your nibbles are swapped: the first code is in the high half"),
        (levels[codes.long()] * by_byte, "you looked the scale up by byte: block i // BLOCK_SIZE counts weights"),
        (levels[codes.long()], "the scale is missing"),
    )
    compare(w, levels[codes.long()] * scale, 0, given, guesses)
    refuse_reads(given)


def check_epilogue(kernel: Any) -> None:
    """y = x W^T + s S B^T, tiled."""
    equal = dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R"), 16)
    # one ragged side after another, so that the first wrong shape tells which mask is missing
    for shape in ((16, 16, 32, 16), (16, 16, 32, 5), (16, 16, 33, 16), (7, 19, 16, 16), (33, 17, 15, 20)):
        run_epilogue(kernel, shape, equal)
    check_blocks(lambda sizes: run_epilogue(kernel, ragged(sizes), sizes), equal, (64,), {
        "BLOCK_M": "the rows of y, by tl.program_id(0)",
        "BLOCK_N": "the columns of y, by tl.program_id(1)",
        "BLOCK_K": "the steps of the first product, over K",
        "BLOCK_R": "the steps of the low-rank product, over R",
    })  # fmt: skip


def ragged(sizes: Sizes) -> tuple[int, ...]:
    """Return sides that end in their second tiles, all in another place."""
    return tuple(size + 3 + place for place, size in enumerate(sizes.values()))


def run_epilogue(kernel: Any, shape: tuple[int, ...], sizes: Sizes) -> None:
    """Raise WrongAnswer unless the kernel does operands of this shape in tiles of these sizes."""
    m, n, k, r = shape
    x, w, hidden, b = walled(drawn(m, k)), walled(drawn(n, k)), walled(drawn(m, r)), walled(drawn(n, r))
    s, (y, untouched), given = 0.7, blank(m, n), f"M, N, K, R = {m}, {n}, {k}, {r}"
    if len(set(sizes.values())) > 1:
        given += f", {in_words(sizes)}"
    kernel[(-(-m // sizes["BLOCK_M"]), -(-n // sizes["BLOCK_N"]))](x, w, hidden, b, y, m, n, k, r, s, **sizes)
    untouched(given)
    base, low = x @ w.T, hidden @ b.T
    magnitude = x.double().abs() @ w.double().abs().T + s * hidden.double().abs() @ b.double().abs().T
    steps = -(-k // sizes["BLOCK_K"])
    every_step = f"you added the low-rank part in every step over K, {steps} times: add it once, after"
    guesses = (
        (base, "the low-rank part is missing"),
        (base + low, "the low-rank part lacks the scaling"),
        (s * (base + low), "the scaling belongs to the low-rank part alone"),
        (base + steps * s * low, every_step),
    )
    if bool(y.isnan().any()):
        short = ", ".join(name for name, side in zip("MNKR", shape, strict=True) if side % sizes[f"BLOCK_{name}"])
        raise WrongAnswer(
            f"{given}: NaN from beyond an operand's end came in: mask the last tile of {short} in the loads, with "
            "other=0.0"
        )
    compare(y, base + s * low, rounding(magnitude, k + r), given, guesses)
    refuse_reads(given)
    for name, operand, rows, columns in (
        ("x", x, "BLOCK_M", "BLOCK_K"),
        ("W", w, "BLOCK_N", "BLOCK_K"),
        ("S", hidden, "BLOCK_M", "BLOCK_R"),
        ("B", b, "BLOCK_N", "BLOCK_R"),
    ):
        refuse_tile(name, operand, (rows, columns), sizes, given)


def check_partial(kernel: Any, module: ModuleType) -> None:
    """G^T S in parts, added in order."""
    add = getattr(module, "sum_kernel", None)
    if add is None:
        raise WrongAnswer("the file has no sum_kernel: it is to add the parts")
    for name, function in (("partial_kernel", kernel), ("sum_kernel", add)):
        refuse_atomics(name, function)
    equal = dict.fromkeys(("ROWS", "BLOCK_N", "BLOCK_R"), 16)
    for m, n, r in ((32, 16, 16), (70, 7, 5), (3, 20, 1)):
        run_sum(add, run_partial(kernel, (m, n, r), equal), f"M, N, R = {m}, {n}, {r}", 32)
    check_blocks(lambda sizes: run_partial(kernel, three_parts(**sizes), sizes), equal, (64,), {
        "ROWS": "the rows of a part, by tl.program_id(1)",
        "BLOCK_N": "the rows of dB, by tl.program_id(0)",
        "BLOCK_R": "the columns of dB, all R in one tile",
    })  # fmt: skip
    part, given = drawn(3, 70, 30), "PARTS, N, R = 3, 70, 30"
    check_blocks(lambda sizes: run_sum(add, part, f"{given}, {in_words(sizes)}", **sizes), {"BLOCK": 32}, (128, 2048), {
        "BLOCK": "the elements of a program of sum_kernel",
    })  # fmt: skip


def refuse_atomics(name: str, function: Any) -> None:
    """Raise WrongAnswer if a kernel adds by an atomic."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(function.fn)))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if any(name.startswith("atomic_") for name in names):
        raise WrongAnswer(f"{name} uses an atomic: programs then add in whatever order they come, and runs differ")


def three_parts(ROWS: int, BLOCK_N: int, BLOCK_R: int) -> tuple[int, int, int]:
    """Return M, N, R of three parts in two tiles, the last ones short; one tile covers the rank."""
    return 2 * ROWS + 5, BLOCK_N + 3, BLOCK_R - 4


def run_partial(kernel: Any, shape: tuple[int, int, int], sizes: Sizes) -> Tensor:
    """Return the parts; raise WrongAnswer unless the kernel does them right."""
    m, n, r = shape
    rows, given = sizes["ROWS"], f"M, N, R = {m}, {n}, {r}"
    if len(set(sizes.values())) > 1:
        given += f", {in_words(sizes)}"
    g, hidden, parts = walled(drawn(m, n)), walled(drawn(m, r)), -(-m // rows)
    part, untouched = blank(parts, n, r)
    kernel[(-(-n // sizes["BLOCK_N"]), parts)](g, hidden, part, m, n, r, **sizes)
    untouched(f"{given}, partial_kernel")
    for p in range(parts):
        mine, theirs = g[p * rows : (p + 1) * rows], hidden[p * rows : (p + 1) * rows]
        room = rounding(mine.double().abs().T @ theirs.double().abs(), rows)
        compare(part[p], mine.T @ theirs, room, f"{given}, part {p} of partial_kernel", (
            (g.T @ hidden, "every program sums all rows: it has only its own ROWS"),
        ))  # fmt: skip
    refuse_reads(given)
    return part


def run_sum(add: Any, part: Tensor, given: str, BLOCK: int) -> None:
    """Raise WrongAnswer unless the kernel adds the parts."""
    parts, n, r = part.shape
    (out, untouched), factor = blank(n, r), 0.3
    add[(-(-n * r // BLOCK),)](walled(part), out, n * r, factor, PARTS=parts, BLOCK=BLOCK)
    untouched(f"{given}, sum_kernel")
    total, each = torch.zeros_like(out), torch.zeros_like(out)
    for p in range(parts):
        total += part[p]
        each += factor * part[p]
    compare(out, factor * total, 0, f"{given}, sum_kernel, to the bit of part 0 + part 1 + ...", (
        (total, "the factor is missing"),
        (factor * part[0], "only the first part was taken"),
        (each, "multiply by the factor at the end: multiplied part by part it rounds differently"),
    ))  # fmt: skip
    refuse_reads(given)


def check_dropout(kernel: Any) -> None:
    """The same mask in any tiling."""
    seed, p = torch.tensor([12345], device=DEVICE), 0.3
    for m, n in ((16, 16), (21, 37)):
        x = drawn(m, n)
        want, seen = dropout(x, p, seed), []
        for block_m, block_n in ((16, 16), (8, 32), (32, 8)):
            y, untouched = blank(m, n)
            grid, given = (-(-m // block_m), -(-n // block_n)), f"[{m}, {n}] in tiles of {block_m} x {block_n}"
            limit, factor = threshold(p), 1 / (1 - p)
            kernel[grid](walled(x), y, 12345, m, n, limit, factor, BLOCK_M=block_m, BLOCK_N=block_n)
            untouched(given)
            seen.append(y.clone())
            inside = keep_mask(seed, block_m, block_n, p).repeat(grid)[:m, :n]
            kept = keep_mask(seed, m, n, p)
            # x / (1 - p) and x times its reciprocal are one rounding apart
            room = 2.0**-23 * want.double().abs()
            guesses = (
                (
                    torch.where(inside, x * factor, 0),
                    "every tile has the same mask: hash the element's own row and column",
                ),
                (torch.where(kept, x, 0), "what is kept is not divided by 1 - p: its mean shrinks"),
                (torch.where(kept, 0, x * factor), "you keep what is to be dropped: a hash from threshold on is kept"),
            )
            compare(y, want, room, given, guesses)
            refuse_reads(given)
        if any(not torch.equal(seen[0], other) for other in seen[1:]):
            raise WrongAnswer(f"[{m}, {n}]: two tilings give different results")
