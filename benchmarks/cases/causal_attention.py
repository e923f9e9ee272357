"""Causal attention of M tokens of N numbers, in heads of 64: forward, backward, and both, on a CPU.

Beside it PyTorch's scaled_dot_product_attention ("torch"), and the formula under torch.compile ("compiled"). Queries,
keys and values lie as a projection leaves them, token by token. float32. On a GPU PyTorch's runs either way.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks import elementwise
from benchmarks.case import Case

SHAPES = tuple({"M": 1024, "N": n} for n in (256, 512))
GPU_SHAPES = ()

SEQUENCES, HEAD = 2, 64
SCALE = HEAD**-0.5
# roundings of a probability that do not grow with anything: of its exponential, its sum, and the quotient
OF_A_PROBABILITY = 10


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield one comparison a mode."""
    import torch

    from lora_core.ops.causal_attention import causal_attention

    m, n = shape["M"], shape["N"]
    tokens = m // SEQUENCES
    made = elementwise.operands(device, *((SEQUENCES, tokens, n // HEAD, HEAD),) * 3)
    q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in made)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)

    def fused(q: Any, k: Any, v: Any) -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)

    def scores(q: Any, k: Any) -> Any:
        return (SCALE * q @ k.mT).masked_fill(later, -torch.inf)

    def written(q: Any, k: Any, v: Any) -> Any:
        return scores(q, k).softmax(-1) @ v

    def magnitudes(q: Any, k: Any, v: Any, d_o: Any) -> tuple[Any, ...]:
        s = scores(q, k)
        p = s.softmax(-1)
        # a probability is off by its score's rounding, which may be that of all its products, and by its own
        off = 2 * HEAD**0.5 * SCALE * q.abs() @ k.abs().mT + 3 * (s.amax(-1, keepdim=True) - s) + OF_A_PROBABILITY
        p_off = p * off.masked_fill(later, 0)
        d_p, most = d_o @ v.mT, d_o.abs() @ v.abs().mT
        less = (d_p - (p * d_p).sum(-1, keepdim=True)).abs()
        s_off = SCALE * (p_off * less + p * HEAD**0.5 * most + p * (p_off * most).sum(-1, keepdim=True))
        return p_off @ v.abs(), s_off @ k.abs(), s_off.mT @ q.abs(), p_off.mT @ d_o.abs()

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
        {"fwd": 4 * size, "bwd": 7 * size, "fwdbwd": 8 * size},
        # of probabilities that are not kept their product is made twice; what is needed is two, and four
        {"fwd": 2 * product, "bwd": 4 * product, "fwdbwd": 6 * product},
    )
