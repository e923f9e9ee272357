"""What the forward pass keeps for the backward pass, tensor by tensor.

The blocks are those of transformers' Llama, of its Phi-3 where layers are fused and of its GPT-2 where positions are
learned, with scaled_dot_product_attention, which keeps no matrix of scores. A tensor is kept where some gradient needs
it: a matrix product keeps its input only if its weight is trained, so that a frozen layer without an adapter keeps
nothing; one with an adapter keeps its input once, shared with its neighbours, and x A^T. Norms compute in fp32 whatever
the dtype.

Checkpointing keeps each block's input and runs the block again, so that one block's tensors exist at a time (Chen et
al. 2016, arXiv 1604.06174).
"""

from dataclasses import dataclass

from lora_core.plan.setup import Setup
from lora_core.plan.shape import ModelShape

FP32_BYTES = 4
# token numbers and labels
INT64_BYTES = 8


@dataclass(frozen=True)
class Kept:
    """One kept tensor: its bytes for one token, and for one block unless it belongs to the ends of the model."""

    name: str
    bytes_per_token: int


def kept_by_block(shape: ModelShape, setup: Setup) -> list[Kept]:
    """The tensors that one block keeps when it runs in full."""
    trained = {layer.name for layer in (shape.linears if setup.trains_all else shape.targets(setup.targets))}
    c = setup.element_bytes
    q, kv, f = shape.query_width, shape.kv_width, shape.intermediate
    kept = [
        *_norm("attention norm", shape, setup),
        *_input("input of q, k and v", shape.hidden, {"q_proj", "k_proj", "v_proj", "qkv_proj"} & trained, setup),
        *(_norm("q norm", shape, setup, q, shape.heads) if shape.head_norms else []),
        *(_norm("k norm", shape, setup, kv, shape.kv_heads) if shape.head_norms else []),
        Kept("q", c * q),
        Kept("k", c * kv),
        # a part of one layer's result keeps the whole of it, the part that was rotated since too
        Kept("v", c * (q + 2 * kv) if shape.fused and shape.rotary else c * kv),
        # the input of o_proj is this very tensor, unless joining what is rotated has laid the heads out anew
        Kept("attention output", c * q),
        *(_input("input of o_proj", q, {"o_proj"} & trained, setup) if shape.fused and shape.rotary else []),
        Kept("log of the softmax's sums", FP32_BYTES * shape.heads),
        *_norm("feed-forward norm", shape, setup),
        *_input(
            "input of the feed-forward layer", shape.hidden, {"gate_proj", "up_proj", "gate_up_proj"} & trained, setup
        ),
    ]
    if shape.gated:
        kept += [Kept("gate", c * f), Kept("up", c * f), Kept("silu(gate)", c * f)]
    else:
        kept += [Kept("up", c * f)]
    kept += _input("input of down_proj", f, {"down_proj"} & trained, setup)
    if not setup.trains_all:
        hidden = len(trained) * setup.rank * setup.adapter_bytes
        kept.append(Kept("x A^T of every adapter", hidden))
    return kept


def kept_by_ends(shape: ModelShape, setup: Setup) -> list[Kept]:
    """The tensors that the embedding, the last norm, the head and the loss keep."""
    return [
        *([Kept("token numbers", INT64_BYTES)] if setup.trains_all else []),
        *_norm("last norm", shape, setup),
        *_input("input of the head", shape.hidden, {"head"} if setup.trains_all else set(), setup),
        Kept("log-probabilities, fp32", FP32_BYTES * shape.vocabulary),
        Kept("labels", INT64_BYTES),
    ]


def block_bytes(shape: ModelShape, setup: Setup) -> int:
    """Bytes one block keeps for one token."""
    return sum(kept.bytes_per_token for kept in kept_by_block(shape, setup))


def kept_bytes(shape: ModelShape, setup: Setup) -> int:
    """Bytes kept when the forward pass is over; with checkpointing, block inputs and the ends alone."""
    ends = sum(kept.bytes_per_token for kept in kept_by_ends(shape, setup))
    block = setup.element_bytes * shape.hidden if setup.checkpointing else block_bytes(shape, setup)
    return setup.tokens * (shape.layers * block + ends)


def workspace_bytes(shape: ModelShape, setup: Setup) -> int:
    """Bytes that come and go in the backward pass, at the worse of its two peaks.

    At its start stand the logits, which the model's output holds, and the gradients of loss and log-softmax in fp32.
    Inside a block stand the gradients of the feed-forward layer's inner tensors, the adapters' input in their own
    dtype where x has another, and one whole weight: the dequantised one (QLoRA) or a new gradient before it is added
    (full); with checkpointing also the block's own tensors, while the loss's are gone.
    """
    c = setup.element_bytes
    head = shape.vocabulary * shape.hidden
    start = setup.tokens * shape.vocabulary * (c + 2 * FP32_BYTES) + (c * head if setup.trains_all else 0)
    inner = 3 if shape.gated else 2
    inside = setup.tokens * c * (inner * shape.intermediate + 2 * shape.hidden)
    if not setup.trains_all and setup.adapter_bytes != c:
        inside += setup.tokens * setup.adapter_bytes * shape.intermediate
    if setup.method != "lora":
        inside += c * max(layer.weights for layer in shape.linears)
    if setup.checkpointing:
        inside += setup.tokens * block_bytes(shape, setup)
    # the loss's own kept tensor is gone by then
    return max(start, inside - setup.tokens * FP32_BYTES * shape.vocabulary)


def _norm(name: str, shape: ModelShape, setup: Setup, width: int = 0, vectors: int = 1) -> list[Kept]:
    """Return what norms of so many vectors keep for a token, which together have this width: by default the hidden."""
    width = width or shape.hidden
    if shape.biases:
        return [Kept(f"{name}: input, mean, deviation", setup.element_bytes * width + 2 * FP32_BYTES * vectors)]
    kept = [Kept(f"{name}: input in fp32, root mean square", FP32_BYTES * (width + vectors))]
    # the gradient of its weight needs the normalised input
    return kept + ([Kept(f"{name}: normalised", setup.element_bytes * width)] if setup.trains_all else [])


def _input(name: str, width: int, trained: set[str], setup: Setup) -> list[Kept]:
    return [Kept(name, setup.element_bytes * width)] if trained else []
