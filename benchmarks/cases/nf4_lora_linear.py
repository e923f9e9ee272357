"""LoRA on a frozen NF4 weight with double-quantised scales, beside bitsandbytes' 4-bit product and a plain adapter.

bfloat16 on a GPU, float32 on a CPU. The backward has gradients of x, A and B.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Claim, Provider
from benchmarks.cases.lora_linear import SCALING, check, forward
from benchmarks.shapes import SMALL_LINEAR

SHAPES = ({**SMALL_LINEAR, "M": 1}, SMALL_LINEAR)

BLOCK_SIZE = 64


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the forward and forward with backward for M tokens, W [N, K] and rank R."""
    import bitsandbytes as bnb
    import bitsandbytes.functional
    import torch
    from torch.nn.functional import linear

    import lora_core as lc

    m, n, k, r = (shape[name] for name in "MNKR")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    x, weight, bias, lora_a, lora_b, d_y = (
        torch.randn(*size, device=device).to(dtype) for size in ((m, k), (n, k), (n,), (r, k), (n, r), (m, n))
    )
    leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
    q = lc.quantize_nf4(weight, block_size=BLOCK_SIZE)
    packed = q.to_bitsandbytes()
    state = bnb.functional.QuantState.from_dict(
        {name.removeprefix("weight."): t for name, t in packed.items() if name != "weight"}, torch.device(device)
    )

    def peer(x: Any, a: Any, b: Any) -> Any:
        base = bnb.matmul_4bit(x, packed["weight"].t(), bias=bias, quant_state=state)
        return base + linear(linear(x, a), b) * SCALING

    layers: dict[str, Callable[..., Any]] = {
        "lora_core": lambda x, a, b: lc.nf4_lora_linear(x, q, bias, a, b, SCALING),
        "bitsandbytes": peer,
    }
    runs = {
        "fwd": lambda layer: forward(layer, leaves),
        "fwdbwd": lambda layer: torch.autograd.grad(layer(*leaves), leaves, d_y),
    }
    dense = q.dequantize(dtype)
    for mode, run in runs.items():
        yield Case(
            op="nf4_lora_linear",
            mode=mode,
            shape=shape,
            dtype=str(dtype).removeprefix("torch."),
            block_size=BLOCK_SIZE,
            providers=[Provider(name, partial(run, layer)) for name, layer in layers.items()],
            check=lambda name, run=run: check(run(layers[name]), (x, dense, bias, lora_a, lora_b), d_y),
            # codes, scales and second scales read
            bytes_moved=n * k // 2 + n * k // BLOCK_SIZE + dtype.itemsize * m * (n + k) if mode == "fwd" else None,
            flops=2 * m * (n * k + r * (n + k)) * (1 if mode == "fwd" else 2),
            claims=(Claim(against="bitsandbytes", no_slower=True),),
            note="double quantised, bias",
        )
