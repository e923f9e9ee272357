"""What the exercises in Triton must do, and what their usual mistakes give."""

import ast
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lora_core.puzzles.compare import WrongAnswer, compare, rounding
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
        x, (y, untouched) = walled(drawn(n)), blank(n)
        kernel[(-(-n // 16),)](x, y, n, factor, BLOCK=16)
        given = f"{n} elements in tiles of 16, factor {factor}"
        untouched(given)
        want = torch.tensor(factor, device=DEVICE) * x
        compare(y, want, 0, given, ((x, "you copied x: multiply by factor"), (3 * x, "the factor is not always 3")))
        refuse_reads(given)


def check_dequantize(kernel: Any) -> None:
    """Weights from codes and scales, to the bit."""
    levels = codebook("nf4").levels.to(DEVICE)
    for n, block in ((128, 32), (64, 64), (99, 32), (1, 32), (200, 128)):
        codes = torch.randint(16, (n,), dtype=torch.uint8)
        absmax, packed = drawn(-(-n // block)).abs() + 1, pack(codes, 0).view(-1).to(DEVICE)
        (w, untouched), given = blank(n), f"{n} weights in blocks of {block}"
        kernel[(-(-n // 64),)](walled(packed), walled(absmax), walled(levels), w, n, BLOCK_SIZE=block, BLOCK=64)
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
    # one ragged side after another, so that the first wrong shape tells which mask is missing
    for m, n, k, r in ((16, 16, 32, 16), (16, 16, 32, 5), (16, 16, 33, 16), (7, 19, 16, 16), (33, 17, 15, 20)):
        x, w, hidden, b = drawn(m, k), drawn(n, k), drawn(m, r), drawn(n, r)
        s, given, (y, untouched) = 0.7, f"M, N, K, R = {m}, {n}, {k}, {r}", blank(m, n)
        tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_R": 16}
        grid = (-(-m // 16), -(-n // 16))
        kernel[grid](walled(x), walled(w), walled(hidden), walled(b), y, m, n, k, r, s, **tiles)
        untouched(given)
        base, low = x @ w.T, hidden @ b.T
        magnitude = x.double().abs() @ w.double().abs().T + s * hidden.double().abs() @ b.double().abs().T
        steps = -(-k // 16)
        guesses = (
            (base, "the low-rank part is missing"),
            (base + low, "the low-rank part lacks the scaling"),
            (s * (base + low), "the scaling belongs to the low-rank part alone"),
            (
                base + steps * s * low,
                f"you added the low-rank part in every step over K, {steps} times: add it once, after",
            ),
        )
        if bool(y.isnan().any()):
            ragged = ", ".join(name for name, side in zip("MNKR", (m, n, k, r), strict=True) if side % 16)
            raise WrongAnswer(
                f"{given}: NaN from beyond an operand's end came in: mask the last tile of {ragged} in the loads, with "
                "other=0.0"
            )
        compare(y, base + s * low, rounding(magnitude, k + r), given, guesses)
        refuse_reads(given)


def check_partial(kernel: Any, module: ModuleType) -> None:
    """G^T S in parts, added in order."""
    add = getattr(module, "sum_kernel", None)
    if add is None:
        raise WrongAnswer("the file has no sum_kernel: it is to add the parts")
    for name, function in (("partial_kernel", kernel), ("sum_kernel", add)):
        tree = ast.parse(inspect.cleandoc(inspect.getsource(function.fn)))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        if any(name.startswith("atomic_") for name in names):
            raise WrongAnswer(f"{name} uses an atomic: programs then add in whatever order they come, and runs differ")
    for m, n, r in ((32, 16, 16), (70, 7, 5), (3, 20, 1)):
        rows, given = 16, f"M, N, R = {m}, {n}, {r}"
        g, hidden, parts = walled(drawn(m, n)), walled(drawn(m, r)), -(-m // rows)
        part, untouched = blank(parts, n, r)
        kernel[(-(-n // 16), parts)](g, hidden, part, m, n, r, ROWS=rows, BLOCK_N=16, BLOCK_R=16)
        untouched(f"{given}, partial_kernel")
        for p in range(parts):
            mine, theirs = g[p * rows : (p + 1) * rows], hidden[p * rows : (p + 1) * rows]
            room = rounding(mine.double().abs().T @ theirs.double().abs(), rows)
            compare(part[p], mine.T @ theirs, room, f"{given}, part {p} of partial_kernel", (
                (g.T @ hidden, "every program sums all rows: it has only its own ROWS"),
            ))  # fmt: skip
        out, untouched = blank(n, r)
        factor = 0.3
        add[(-(-n * r // 32),)](walled(part), out, n * r, factor, PARTS=parts, BLOCK=32)
        untouched(f"{given}, sum_kernel")
        total = torch.zeros_like(out)
        for p in range(parts):
            total += part[p]
        each = torch.zeros_like(out)
        for p in range(parts):
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
