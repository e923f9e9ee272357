"""DoRA's row norms of W + s B A by algebra, beside forming the dense update. The shape is N x K, and R.

Beside it the dense update in plain PyTorch as written ("torch") and under torch.compile ("compiled"), the algebra under
torch.compile ("compiled algebra"), and PEFT's norm. W is dense, then NF4 with double-quantised scales, which PEFT
dequantises as bitsandbytes does and all others as this library does. bfloat16 on a GPU, float32 on a CPU.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import modes, peers
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.cases.lora_linear import linear_of
from benchmarks.cases.nf4_lora_linear import packed_bytes
from benchmarks.llama import linear4bit
from benchmarks.peers import Peer
from benchmarks.rounding import within_rounding
from benchmarks.shapes import GPU_WEIGHTS

SHAPES = ({"N": 2048, "K": 2048, "R": 16},)
GPU_SHAPES = tuple({**shape, "R": 16} for shape in GPU_WEIGHTS)

SCALING = 2.0
BLOCK_SIZE = 64


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison on a dense W and on an NF4 one."""
    import torch

    import lora_core as lc

    n, k, r = (shape[name] for name in "NKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    weight, lora_a, lora_b = (torch.randn(*size, device=device).to(dtype) for size in ((n, k), (r, k), (n, r)))
    unfit = "" if dtype == torch.float32 else "rounds its norms to bfloat16, where all others have them in float32"
    peer = {"peft": Peer(("peft",), lambda: _peft(linear_of(weight, None), lora_a, lora_b), unfit)}
    yield _case(shape, weight, weight, lora_a, lora_b, dtype.itemsize * n * k, peer, device)
    q = lc.quantize_nf4(weight, block_size=BLOCK_SIZE)

    def on_bitsandbytes() -> Any:
        return _peft(linear4bit(q, dtype), lora_a, lora_b)

    peer = {"peft on bitsandbytes": Peer(("peft", "bitsandbytes"), on_bitsandbytes, unfit)}
    case = _case(shape, q, q.dequantize(dtype), lora_a, lora_b, packed_bytes(n * k), peer, device)
    yield dataclasses.replace(case, block_size=BLOCK_SIZE, note="double quantised")


def _case(
    shape: dict[str, int],
    held: Any,
    dense: Any,
    lora_a: Any,
    lora_b: Any,
    weight_bytes: int,
    peer: dict[str, Peer],
    device: str,
) -> Case:
    """Return the comparison for W as it is held, with W dense for the truth."""
    from lora_core.ops.dora_norm import dora_norm
    from lora_core.reference import dora

    n, k, r = (shape[name] for name in "NKR")

    def by(norm: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: norm(held if held is dense else held.dequantize(dense.dtype), lora_a, lora_b, SCALING)

    written = by(dora.dora_norm_dense)

    plain = {"lora_core": lambda: dora_norm(held, lora_a, lora_b, SCALING), "torch": written}
    rivals = {
        "compiled": modes.compiled_peer(written, device),
        "compiled algebra": modes.compiled_peer(by(dora.dora_norm), device),
        **peer,
    }
    runs, missing = peers.providers(plain, rivals)
    return Case(
        op="dora_norm",
        mode="fwd",
        shape=shape,
        dtype=str(dense.dtype).removeprefix("torch."),
        block_size=None,
        providers=[Provider(name, run) for name, run in runs.items()],
        check=lambda name: _check(runs[name](), (dense, lora_a, lora_b)),
        # W, A and B read, norms in float32 written
        bytes_moved=weight_bytes + dense.itemsize * r * (n + k) + 4 * n,
        # B A added to W, then squares
        flops=2 * n * k * (r + 1),
        claims=(Claim(against="torch", no_slower=True, no_larger=True),),
        missing=missing,
    )


def _peft(base: Any, lora_a: Any, lora_b: Any) -> Callable[[], Any]:
    """Return what PEFT's DoRA does for its norm in every forward: W dense, B A by a product with the identity."""
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.utils.integrations import dequantize_module_weight

    layer = DoraLinearLayer(fan_in_fan_out=False)
    pair = linear_of(lora_a, None), linear_of(lora_b, None)

    def norm() -> Any:
        with torch.no_grad():
            update = layer.get_lora_weight(*pair)
            weight = dequantize_module_weight(base).to(lora_a.dtype)
            return layer.get_weight_norm(weight, update, SCALING)

    return norm


def _check(norm: Any, operands: tuple[Any, ...]) -> Check:
    """Compare the squares, as a root of a small sum magnifies its error."""
    w, a, b = (t.double() for t in operands)
    truth = (w + SCALING * b @ a).square().sum(1)
    magnitude = (w.abs() + SCALING * b.abs() @ a.abs()).square().sum(1)
    return within_rounding(norm.float().double().square().float(), truth, magnitude, sum(a.shape) * 2, roundings=4)
