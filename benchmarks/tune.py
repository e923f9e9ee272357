"""Time candidate configurations of the kernels on a GPU: `python -m benchmarks.tune --part nf4_matmul`.

Prints a line for each candidate, the fastest of a shape first. A result that is wrong is said to be, and not timed.
Configurations live in tables in the kernels' files: what wins here is written there by hand.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks import options
from benchmarks.case import Provider
from benchmarks.peers import told
from benchmarks.timing import ProviderError, interleave

SAMPLES = 7
RANK = 16
SCALING = 2.0
# relative error in the 2-norm that no right result in half precision comes near
WRONG = 5e-3
# M and W [N, K]: gate or up, down, and query of Llama-3-8B
WEIGHTS = ((14336, 4096), (4096, 14336), (4096, 4096))

Run = Callable[[], Any]
Part = Iterator[tuple[str, Any, dict[str, Run]]]


@contextmanager
def _changed(table: Any, key: Any, value: Any) -> Iterator[None]:
    """Set an entry of a kernel's table, or an attribute of its module, for as long as this is entered."""
    entries = table if isinstance(table, dict) else vars(table)
    before = entries[key]
    entries[key] = value
    try:
        yield
    finally:
        entries[key] = before


def _with(changes: Sequence[tuple[Any, Any, Any]], run: Run) -> Run:
    def changed() -> Any:
        if not changes:
            return run()
        with _changed(*changes[0]):
            return _with(changes[1:], run)()

    return changed


def nf4_dequantize(n: int, k: int, device: str) -> Part:
    """Warps of a program, and shuffles or a table."""
    from lora_core.kernels import nf4_dequantize as kernel
    from lora_core.kernels.nf4_levels import SHUFFLED

    w = _packed(n, k, device)
    given = (*w[:5], _half(device), w.block_size, w.nested_block_size)
    yield (
        f"nf4_dequantize {n}x{k}",
        w.dense(_half(device)),
        {
            f"{warps} warps, {'shuffles' if shuffled else 'table'}": _with(
                [(kernel.WORDS, _half(device), (256, warps))], partial(kernel.launch_nf4_dequantize, *given, shuffled)
            )
            for warps, shuffled in itertools.product((1, 2, 4), {SHUFFLED, False})
        },
    )


def nf4_matmul(n: int, k: int, device: str) -> Part:
    """Tiles, warps, stages and steps of a program, beside W made whole and a library's product."""
    import torch

    from lora_core.kernels import nf4_matmul as kernel

    tiles = ((32, 64), (64, 64), (32, 128), (64, 128), (16, 256), (32, 256), (16, 512), (16, 1024))
    w = _packed(n, k, device)
    for m in (1, 16, 64):
        x, hidden, lora_b, truth = _layer(m, w, device)
        run = partial(kernel.launch_nf4_matmul, x, *w, None, hidden, lora_b, SCALING)
        runs = {"as it is": run}
        for tile, warps, (stages, steps) in itertools.product(
            tiles, (2, 4, 8), ((1, 1), (1, 2), (2, 4), (2, 8), (3, 8))
        ):
            splits = k // (tile[1] * steps)
            if splits > 1 and tile[0] * tile[1] >= 1024 * warps:
                changes = [(kernel, "TILE", tile), (kernel, "WARPS", warps), (kernel.STAGES, "blocks", stages)]
                name = f"tile {tile}, {warps} warps, {stages} stages, {splits} splits"
                runs[name] = _with(changes, partial(run, splits=splits))
        update = SCALING * hidden @ lora_b.T

        def whole(x: Any = x, update: Any = update) -> Any:
            return torch.addmm(update, x, w.dense(x.dtype).T)

        runs["made whole, then a product, without the update's"] = whole
        yield f"nf4_matmul M={m} {n}x{k}", truth, runs


def low_rank_part(n: int, k: int, device: str) -> Part:
    """What y holds before the product is added: by a library, and by tiles of the kernel, which takes a bias too."""
    from lora_core.kernels import low_rank
    from lora_core.kernels import low_rank_matmul as kernel

    tilings = ((128, 128, 8), (128, 128, 4), (64, 128, 4), (64, 64, 4), (32, 256, 4), (64, 256, 8))
    for m in (512, 4096):
        x, hidden, lora_b = (_normal(device, *size) for size in ((m, 16), (m, RANK), (n, RANK)))
        truth = SCALING * hidden.double() @ lora_b.double().T
        runs = {"library": partial(low_rank.low_rank_part, x, n, None, hidden, lora_b, SCALING)}
        nothing = (x[:, :0], x.new_empty(n, 0), None)
        for rows, columns, warps in tilings:
            tiling = kernel.Tiling(rows, columns, 64, warps, 2)
            runs[f"tile {rows}x{columns}, {warps} warps"] = _with(
                [(kernel.TILINGS, x.dtype, (tiling,))],
                partial(kernel.launch_low_rank_matmul, *nothing, hidden, lora_b, SCALING),
            )
        yield f"low_rank_part M={m} N={n}", truth, runs


def panels(n: int, k: int, device: str) -> Part:
    """Sizes of the panels in which a packed weight is dequantised for more tokens, forward and for dL/dx."""
    from lora_core.kernels import nf4_lora_linear as kernel

    sizes = {f"{size} MiB": size * 2**20 for size in (16, 32, 64, 128, 1024)}
    w = _packed(n, k, device)
    for m in (512, 4096):
        x, hidden, lora_b, truth = _layer(m, w, device)
        run = partial(kernel.packed_low_rank_linear, x, w, None, hidden, lora_b, SCALING, "library")
        yield f"panels M={m} {n}x{k}", truth, {name: partial(run, size) for name, size in sizes.items()}
        d_y, lora_a = _normal(device, m, n), _normal(device, RANK, k)
        truth = d_y.double() @ w.dense(d_y.dtype).double() + hidden.double() @ lora_a.double()
        back = partial(kernel.packed_input_gradient, d_y, w, hidden, lora_a, path="library")
        runs = {name: partial(back, panel_bytes=size) for name, size in sizes.items()}
        yield f"panels of columns M={m} {n}x{k}", truth, runs


PARTS = {part.__name__: part for part in (nf4_dequantize, nf4_matmul, low_rank_part, panels)}


def _half(device: str) -> Any:
    import torch

    # the interpreter's bfloat16 takes long
    return torch.bfloat16 if device == "cuda" else torch.float32


def _normal(device: str, *shape: int) -> Any:
    import torch

    return torch.randn(*shape, device=device).to(_half(device))


def _layer(m: int, w: Any, device: str) -> tuple[Any, Any, Any, Any]:
    """Return x [M, K], S [M, R], B [N, R] and the product in float64."""
    n, k = w.shape
    x, hidden, lora_b = (_normal(device, *size) for size in ((m, k), (m, RANK), (n, RANK)))
    truth = x.double() @ w.dense(x.dtype).double().T + SCALING * hidden.double() @ lora_b.double().T
    return x, hidden, lora_b, truth


def _packed(n: int, k: int, device: str) -> Any:
    import lora_core as lc
    from lora_core.ops.packed import Packed

    return Packed.of(lc.quantize_nf4(_normal(device, n, k)))


def _sound(name: str, run: Run, truth: Any) -> bool:
    """Say whether a candidate's result is right, and print what is wrong with it if not."""
    try:
        off = float((run().double() - truth.double()).norm() / truth.double().norm())
    except Exception as error:
        print(f"  {name}: {told(error)}")
        return False
    if not off < WRONG:
        print(f"  {name}: wrong by {off:.2g}")
    return off < WRONG


def main(arguments: Sequence[str] | None = None) -> int:
    """Time the candidates asked for; return 2 where there is nothing to measure on."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="repeat for more; all by default")
    parser.add_argument(
        "--weight", action="append", type=options.count, nargs=2, metavar=("N", "K"), help="repeat for more"
    )
    parser.add_argument("--samples", type=options.count, default=SAMPLES)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.stderr.write("benchmarks.tune: there is no GPU here to measure on\n")
        return 2
    torch.manual_seed(0)
    for part, (n, k) in itertools.product(given.part or PARTS, given.weight or WEIGHTS):
        for title, truth, runs in PARTS[part](n, k, "cuda"):
            print(title, flush=True)
            sound = [Provider(name, run) for name, run in runs.items() if _sound(name, run, truth)]
            try:
                *_, timings = interleave(sound, given.samples, "cuda")
            except ProviderError as error:
                print(f"  {error.name} raised: {told(error.__cause__ or error)}")
                continue
            for name, timing in sorted(timings.items(), key=lambda item: item[1].median_ms):
                print(f"  {1e3 * timing.median_ms:8.1f} us  {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
