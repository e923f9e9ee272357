"""LoRA on a frozen NF4 weight with double-quantised scales: forward, backward (x, A and B), and both.

bfloat16 on a GPU, float32 on a CPU. Beside it bitsandbytes' 4-bit product with two products for the adapter, PEFT's
layer on bitsandbytes' Linear4bit, torchao's NF4 tensor likewise, on a GPU unsloth's layer, the formula in plain PyTorch
as written ("reference") and under torch.compile ("compiled"), and for scale the product with a dense weight ("matmul").
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import modes
from benchmarks.case import AHEAD, Case, Claim
from benchmarks.cases.lora_linear import (
    SCALING,
    bias_moved,
    flops,
    moved_beside_weights,
    on_x,
    peft_layer,
    unsloth_peer,
)
from benchmarks.llama import bitsandbytes_weight, linear4bit
from benchmarks.modes import Work
from benchmarks.peers import Peer, providers
from benchmarks.shapes import FEW_TOKENS, LLAMA_3_LINEARS, SMALL_LINEARS

SHAPES = (*SMALL_LINEARS, *FEW_TOKENS)
GPU_SHAPES = LLAMA_3_LINEARS

BLOCK_SIZE = 64


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode, for M tokens, W [N, K] and rank R."""
    import torch
    from torch import nn

    import lora_core as lc
    from lora_core import reference
    from lora_core.reference import lora

    m, n, k, r = (shape[name] for name in "MNKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x, weight, bias, lora_a, lora_b, d_y = (
        torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (n,), (r, k), (n, r), (m, n))
    )
    leaves = (x.requires_grad_(), nn.Parameter(lora_a), nn.Parameter(lora_b))
    q = lc.quantize_nf4(weight, block_size=BLOCK_SIZE)
    dense = q.dequantize(dtype)

    def written(x: Any, a: Any, b: Any) -> Any:
        w = reference.nf4.nf4_dequantize(*q.parts, q.shape, dtype, BLOCK_SIZE)
        return lora.lora_linear(x, w, bias, a, b, SCALING)

    ours = {
        "lora_core": lambda x, a, b: lc.nf4_lora_linear(x, q, bias, a, b, SCALING),
        "reference": written,
    }
    peers = {
        "compiled": modes.compiled_peer(written, device),
        "bitsandbytes": Peer(("bitsandbytes",), lambda: _bitsandbytes(q, bias)),
        "peft on bitsandbytes": Peer(
            ("peft", "bitsandbytes"), lambda: on_x(peft_layer(linear4bit(q, dtype, bias), leaves[1:], SCALING))
        ),
        "torchao": Peer(("torchao",), lambda: _torchao(weight, bias)),
        "unsloth": unsloth_peer(lambda: bitsandbytes_weight(q), bias, device),
    }
    layers, missing = providers(ours, peers)
    works = {
        name: Work(
            layer,
            leaves,
            modes.lora_truth,
            # torchao rounds its scales in a way of its own
            (x, _torchao_dense(weight) if name == "torchao" else dense, bias, *leaves[1:], SCALING),
            m + n + k + r,
        )
        for name, layer in layers.items()
    }
    works["matmul"] = Work(
        lambda x: nn.functional.linear(x, dense, bias), (x,), modes.linear_truth, (x, dense, bias), n + k
    )
    for mode in modes.MODES:
        ahead = AHEAD.get(("nf4_lora_linear", mode), ())
        compared = {name: work for name, work in works.items() if name not in ahead}
        moved = moved_beside_weights(shape, mode) + bias_moved(shape, mode)
        yield Case(
            op="nf4_lora_linear",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=BLOCK_SIZE,
            providers=modes.providers(compared, mode, d_y),
            check=modes.check(compared, mode, d_y),
            bytes_moved=packed_bytes(n * k) + dtype.itemsize * moved,
            flops=flops(shape, mode),
            claims=tuple(Claim(against=name, no_slower=True) for name in ("bitsandbytes", "peft on bitsandbytes")),
            note="double quantised, bias",
            missing=missing | dict.fromkeys(ahead, "its forward keeps W dense, which a backward alone would not show"),
        )


def packed_bytes(elements: int) -> int:
    """Bytes of an NF4 weight: codes, scales' codes, second scales in float32."""
    from lora_core.quant.double import NESTED_BLOCK_SIZE

    scales = math.ceil(elements / BLOCK_SIZE)
    return math.ceil(elements / 2) + scales + 4 * math.ceil(scales / NESTED_BLOCK_SIZE)


def _bitsandbytes(q: Any, bias: Any) -> Callable[..., Any]:
    import bitsandbytes as bnb
    from torch.nn.functional import linear

    codes, state = bitsandbytes_weight(q)

    def run(x: Any, a: Any, b: Any) -> Any:
        return bnb.matmul_4bit(x, codes.t(), bias=bias, quant_state=state) + linear(linear(x, a), b) * SCALING

    return run


def _torchao(weight: Any, bias: Any) -> Callable[..., Any]:
    from torch.nn.functional import linear

    w = torchao_weight(weight)

    def run(x: Any, a: Any, b: Any) -> Any:
        return linear(x, w) + bias + linear(linear(x, a), b) * SCALING

    return run


def torchao_weight(weight: Any) -> Any:
    """Return torchao's NF4 tensor of a weight; its scales are 8-bit integers of its own kind."""
    from torchao.quantization import to_nf4

    from lora_core.quant.double import NESTED_BLOCK_SIZE

    return to_nf4(weight.detach(), BLOCK_SIZE, NESTED_BLOCK_SIZE)


def _torchao_dense(weight: Any) -> Any:
    return torchao_weight(weight).get_original_weight()
