"""What the exercises in plain PyTorch must do, and what their usual mistakes give."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_core.puzzles.compare import WrongAnswer, compare, rounding
from lora_core.puzzles.watch import Watch, by_hand
from lora_core.quant.codebook import codebook
from lora_core.quant.double import absmax_offset, dequantize_absmax, quantize_absmax
from lora_core.quant.packing import pack
from lora_core.reference.dora import dora_norm
from lora_core.reference.lora import backward, lora_linear
from lora_core.reference.nf4 import nf4_quantize

# M, N, K, R; sides that differ show what is transposed
SHAPES = ((5, 7, 11, 3), (1, 4, 6, 8), (9, 16, 8, 1))


def drawn(*shape: int) -> Tensor:
    """Return float32 numbers."""
    return torch.randn(*shape)


def lora(m: int, n: int, k: int, r: int) -> tuple[Tensor, ...]:
    """Return x, weight, bias, lora_a, lora_b."""
    return drawn(m, k), drawn(n, k), drawn(n), drawn(r, k), drawn(n, r)


def absolute(*tensors: Tensor) -> list[Any]:
    """Return magnitudes in float64: what a formula on them gives bounds its rounding."""
    return [t.double().abs() for t in tensors]


def refuse_product(watch: Watch, n: int, k: int, given: str, instead: str) -> None:
    """Raise WrongAnswer if something as large as B A was made from A and B."""
    if not watch.formed(n, k):
        return
    equation = watch.einsum(n, k)
    if equation:
        raise WrongAnswer(
            f"{given}: right, but torch.einsum({equation!r}, ...) formed inside what is as large as B A, {n} x {k}: it "
            "multiplies its operands two at a time, beginning with the first two. Write one product of two operands "
            f"after another: {instead}"
        )
    raise WrongAnswer(f"{given}: right, but you formed B A, a matrix of {n} x {k}: {instead}")


def refuse_pieces(watch: Watch, n: int, k: int, given: str, instead: str) -> None:
    """Raise WrongAnswer if as many elements as B A has were computed from A and B alone, a few at a time."""
    if watch.joint >= n * k:
        raise WrongAnswer(
            f"{given}: right, but you formed B A in pieces: {watch.joint} elements were computed from A and B alone, "
            f"and B A has {n} x {k}. That saves memory, but is all the work of the product: {instead}"
        )


def check_forward(solve: Callable[..., Any]) -> None:
    """y = x W^T + b + s (x A^T) B^T."""
    for shape in SHAPES:
        x, weight, bias, a, b = lora(*shape)
        s = 16 / shape[-1] / 3
        wide_x, wide_weight, wide_bias, wide_a, wide_b = absolute(x, weight, bias, a, b)
        magnitude = lora_linear(wide_x, wide_weight, wide_bias, wide_a, wide_b, s)
        base, update = x @ weight.T + bias, x @ a.T @ b.T
        guesses = (
            (base + update, "you forgot the scaling s = alpha / r: your update is 1 / s of what it should be"),
            (s * (base + update), "you scaled the frozen path too: s belongs to the update alone"),
            (base - bias + s * update, "you forgot the bias"),
            (base, "your result is the frozen layer's: the update is missing"),
        )
        given = "M, N, K, R = {}, {}, {}, {}".format(*shape)
        with Watch((a, b), (x,)) as watch:
            got = solve(x, weight, bias, a, b, s)
        compare(got, base + s * update, rounding(magnitude, sum(shape)), given, guesses)
        instead = "multiply x by A^T first, and what comes out, [M, R], by B^T"
        refuse_product(watch, shape[1], shape[2], given, instead)
        refuse_pieces(watch, shape[1], shape[2], given, instead)


def check_backward(solve: Callable[..., Any]) -> None:
    """The gradients of x, A and B."""
    for shape in SHAPES:
        x, weight, _, a, b = lora(*shape)
        d_y, s = drawn(shape[0], shape[1]), 16 / shape[-1] / 3

        def grads(d_y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, s: float = s) -> list[Tensor]:
            found = backward(d_y, x, weight, a, b, x @ a.T, s, 0.0, None, (True, False, False, True, True))
            return [t for t in found if t is not None]

        want = grads(d_y, x, weight, a, b)
        magnitude = grads(*absolute(d_y, x, weight, a, b))
        given = "M, N, K, R = {}, {}, {}, {}".format(*shape)
        with Watch((d_y, x)) as whole, Watch((a, b), (d_y, x)) as watch:
            got = by_hand(given, solve, d_y, x, weight, a, b, s)
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            raise WrongAnswer(f"{given}: want three gradients, (d_x, d_lora_a, d_lora_b)")
        for name, mine, right, size in zip(("d_x", "d_lora_a", "d_lora_b"), got, want, magnitude, strict=True):
            guesses: list[tuple[Tensor | None, str]] = [
                (right / s, f"{name} lacks the scaling s: y depends on A and B through s"),
                (right * s, f"{name} has the scaling twice"),
            ]
            if name == "d_x":
                guesses += [
                    (d_y @ weight, "d_x is that of the frozen path alone: x also reaches y through A and B"),
                    (d_y @ weight + d_y @ b @ a, "the low-rank part of d_x lacks the scaling s"),
                ]
            compare(mine, right, rounding(size, 2 * sum(shape)), f"{given}, {name}", guesses)
        n, k = shape[1:3]
        if whole.formed(n, k):
            raise WrongAnswer(f"{given}: right, but you formed G^T x, the weight's gradient of {n} x {k}")
        instead = "multiply G by B first, and what comes out, [M, R], by A"
        refuse_product(watch, n, k, given, instead)
        refuse_pieces(watch, n, k, given, instead)


def check_unpack(solve: Callable[..., Any]) -> None:
    """Codes of bytes, the high half first."""
    for n in (8, 7, 1, 2, 33):
        codes = torch.randint(16, (n,), dtype=torch.uint8)
        packed = pack(codes, 0).view(-1)
        whole = torch.stack([packed >> 4, packed & 15], 1).flatten()
        swapped = torch.stack([packed & 15, packed >> 4], 1).flatten()[:n]
        halves = torch.cat([packed >> 4, packed & 15])[:n]
        got = solve(packed, n)
        if isinstance(got, Tensor) and got.shape == whole.shape != codes.shape:
            raise WrongAnswer(f"n = {n}: you returned {len(whole)} codes: the last byte holds one and a filler")
        guesses = (
            (swapped, "your nibbles are swapped: the first code is in the high half of its byte"),
            (halves, "all high halves come first in your result: the two codes of a byte are neighbours"),
        )
        compare(got, codes, 0, f"n = {n}", guesses)


def beside_midpoints() -> Tensor:
    """Return weights under one scale whose quotients a reciprocal moves over a midpoint."""
    midpoints, scale = codebook("nf4").midpoints, torch.tensor(0.77)
    up = down = (midpoints.double() * float(scale)).float()
    near = [up]
    for _ in range(4):
        up, down = up.nextafter(torch.tensor(torch.inf)), down.nextafter(torch.tensor(-torch.inf))
        near += [up, down]
    every = torch.cat(near)
    moved = torch.bucketize(every / scale, midpoints) != torch.bucketize(every * (1 / scale), midpoints)
    return torch.cat([scale.view(1), every[moved]])


def check_quantize(solve: Callable[..., Any]) -> None:
    """Codes and scales, to the bit."""
    book = codebook("nf4")
    for title, weight, block in (
        ("two blocks of 4", torch.tensor([0.03, -0.12, 0.0, 0.06, -0.5, 0.25, 0.125, 0.011]), 4),
        ("a short last block", drawn(3 * 64 + 5), 64),
        ("a block of zeros", torch.cat([torch.zeros(32), drawn(32)]), 32),
        ("negative weights alone", -drawn(64).abs() - 0.1, 32),
        ("values at the midpoints of levels", torch.cat([torch.ones(1), book.midpoints]), 64),
        ("weights of 2e-5", 2e-5 * drawn(256), 64),
        ("weights of 1e-30", 1e-30 * drawn(64), 32),
        ("quotients beside midpoints", beside_midpoints(), 64),
    ):
        n = weight.numel()
        packed, want_absmax = nf4_quantize(weight, block)
        want = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).flatten()[:n]
        got = solve(weight, block)
        if not isinstance(got, (tuple, list)) or len(got) != 2:
            raise WrongAnswer(f"{title}: want (codes, absmax)")
        padded = torch.nn.functional.pad(weight, (0, -n % block)).view(-1, block)
        compare(got[1], want_absmax, 0, f"{title}, absmax", (
            (padded.amax(1), "you took the largest value: a scale is the largest magnitude, so that -1 fits too"),
        ))  # fmt: skip
        scaled = (padded / padded.abs().amax(1, keepdim=True)).flatten()[:n]
        floor = (torch.bucketize(scaled, book.levels, right=True) - 1).clamp(0).to(torch.uint8)
        ties = torch.bucketize(scaled, book.midpoints, right=True).to(torch.uint8)
        nothing = scaled.isnan()
        by_reciprocal = torch.bucketize(
            (padded * (1 / padded.abs().amax(1, keepdim=True))).flatten()[:n], book.midpoints
        ).to(torch.uint8)
        distance = (scaled.nan_to_num()[:, None].double() - book.levels.double()).abs()
        compare(got[0], want, 0, f"{title}, codes", (
            *((torch.where(nothing, c, want), "a block of zeros gets the code of zero, 7") for c in (0, 15)),
            (floor, "you took the level below: want the nearest"),
            (ties, "a value half-way between two levels belongs to the lower one"),
            (by_reciprocal, "you multiplied by 1 / absmax, which rounds twice: divide"),
            (distance.argmin(1).to(torch.uint8), "the halves are MIDPOINTS, rounded to float32: count those below"),
        ))  # fmt: skip


def check_absmax(solve: Callable[..., Any]) -> None:
    """Scales from codes, to the bit."""
    levels = codebook("dynamic").levels
    for count, block in ((600, 256), (256, 256), (5, 256), (40, 8)):
        absmax = drawn(count).abs() + 1
        offset = absmax_offset(absmax)
        codes, absmax2 = quantize_absmax(absmax, offset, block)
        want = dequantize_absmax(codes, absmax2, offset, block)
        plain = levels[codes.long()]
        spread = absmax2.repeat_interleave(block)[:count]
        cycled = absmax2[torch.arange(count) % len(absmax2)]
        wide = (plain.double() * spread.double() + offset.double()).float()
        guesses = (
            (plain * spread, "you forgot the mean: it was subtracted before the scales were coded"),
            (plain * cycled + offset, "scale i belongs to second-level block i // block_size, not i % blocks"),
            (wide, "product and sum are rounded once together: round each to float32, as the kernel does"),
        )
        compare(solve(codes, absmax2, offset, levels, block), want, 0, f"{count} scales in blocks of {block}", guesses)


def check_dora(solve: Callable[..., Any]) -> None:
    """Row norms of W + s B A."""
    for n, k, r in ((7, 11, 3), (16, 5, 2), (4, 9, 1)):
        weight, a, b = drawn(n, k), drawn(r, k), drawn(n, r)
        s = 2.0
        with Watch((a, b)) as watch:
            got = solve(weight, a, b, s)
        want = dora_norm(weight, a, b, s)
        wide = [t.double().abs() for t in (weight, a, b)]
        squares = (wide[0] + s * wide[2] @ wide[1]).square().sum(1)
        # the sum of squares is off by so much, its root by that over twice the root
        room = rounding(squares, n + k + r * r) / want.double()
        given = f"N, K, R = {n}, {k}, {r}"
        plain, columns = weight.norm(dim=1), (weight + s * b @ a).norm(dim=0)
        if isinstance(got, Tensor) and got.shape == columns.shape != want.shape:
            raise WrongAnswer(f"{given}: you took the norms of the columns; each output, a row of W, has a norm")
        guesses = (
            (dora_norm(weight, a, b, 1.0), "you forgot the scaling s: it belongs inside the norm"),
            (want.square(), "these are the squares: take the root"),
            ((plain.square() + (s * b @ a).square().sum(1)).sqrt(), "you forgot the mixed term 2 s <W, B A>"),
        )
        compare(got, want, room, given, guesses)
        refuse_product(watch, n, k, given, "W A^T, [N, R], and A A^T, [R, R], are enough")


def check_grouped(solve: Callable[..., Any]) -> None:
    """One batch, an adapter of its own for each row."""
    # no number of rows or rank, so that only B A has both
    n, k = 6, 11
    for ranks, which in (((2, 3), [0, 1, 1, 0, -1]), ((4, 1, 2), [2, 2, 0, -1, 0, 2, 1]), ((3,), [-1, -1])):
        x, base, index = drawn(len(which), k), drawn(len(which), n), torch.tensor(which)
        a, b = [drawn(r, k) for r in ranks], [drawn(n, r) for r in ranks]
        scaling = [2.0 / r + 0.3 for r in ranks]
        want, magnitude, none = base.clone(), base.double().abs(), base.clone()
        for row, g in enumerate(which):
            chosen = g if g >= 0 else len(ranks) - 1
            step = scaling[chosen] * (x[row] @ a[chosen].T) @ b[chosen].T
            none[row] += step
            if g >= 0:
                want[row] += step
                size = (x[row].double().abs() @ a[g].double().abs().T) @ b[g].double().abs().T
                magnitude[row] += scaling[g] * size
        kept, given = base.clone(), f"ranks {ranks}, rows of adapters {which}"
        with Watch(a, (x, base)) as projections, Watch(b, (x, base)) as ups:
            got = solve(x, base, index, a, b, scaling)
        guesses = (
            (none, "-1 is no adapter: Python counts it from the end"),
            (want - base, "the base's output is missing: the adapters are added to it"),
        )
        compare(got, want, rounding(magnitude, k + max(ranks)), given, guesses)
        if not torch.equal(base, kept):
            raise WrongAnswer(f"{given}: you changed base in place: its owner still needs it")
        refuse_product(projections, n, k, given, "multiply the rows of x by A_g^T first, then by B_g^T")
        refuse_padding(projections, "A", f"R_g x {k}", given)
        refuse_padding(ups, "B", f"{n} x R_g", given)


def refuse_padding(watch: Watch, name: str, sides: str, given: str) -> None:
    """Raise WrongAnswer if a tensor made from adapters alone holds more than these adapters do."""
    grown = watch.grown()
    if grown is None:
        return
    whose = ", ".join(str(source) for source in grown.sources)
    whose = f"adapter {whose}, whose {name} has" if len(grown.sources) == 1 else f"adapters {whose}, whose {name} have"
    raise WrongAnswer(
        f"{given}: right, but you made {grown.elements} elements from {name} of {whose} {grown.held}: none is to be "
        f"padded or repeated. What is added to a smaller rank is multiplied for nothing; every {name}_g can be "
        f"multiplied as it is, {sides}, with the rows of its own adapter"
    )
