"""Causal attention of M tokens of N numbers, in heads of 64: forward, backward, and both, on a CPU.

Beside it PyTorch's scaled_dot_product_attention ("torch"), and the formula under torch.compile ("compiled"). Queries,
keys and values lie as a projection leaves them, token by token. float32. On a GPU PyTorch's runs either way.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import elementwise
from benchmarks.case import Case

SHAPES = ({"M": 1024, "N": 512},)

SEQUENCES, HEAD = 2, 64
SCALE = HEAD**-0.5


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode."""
    import torch

    from lora_core.ops.causal_attention import causal_attention
    from lora_core.reference import causal_attention as reference

    m, n = shape["M"], shape["N"]
    tokens = m // SEQUENCES
    made = elementwise.operands(device, *((SEQUENCES, tokens, n // HEAD, HEAD),) * 3)
    q, k, v = (t.detach().float().transpose(1, 2).requires_grad_() for t in made)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)

    def fused(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

    def written(q: Any, k: Any, v: Any) -> Any:
        return (SCALE * q @ k.mT).masked_fill(later, -torch.inf).softmax(-1) @ v

    def magnitudes(q: Any, k: Any, v: Any, d_o: Any) -> tuple[Any, ...]:
        return reference.magnitudes(d_o, q, k, v, SCALE)

    size = q.element_size() * m * n
    product = m * (tokens + 1) * n
    yield from elementwise.cases(
        "causal_attention",
        shape,
        device,
        lambda q, k, v: causal_attention(q, k, v, SCALE),
        written,
        {"torch": fused},
        (q, k, v),
        magnitudes,
        tokens,
        {"fwd": 4 * size, "bwd": 7 * size, "fwdbwd": 11 * size},
        # of what tokens see; in the backward scores are made anew, as they would take more memory than all else
        {"fwd": 2 * product, "bwd": 5 * product, "fwdbwd": 7 * product},
    )
