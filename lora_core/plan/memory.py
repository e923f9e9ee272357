"""The bytes that fine-tuning holds at its peak, row by row.

    full    weights c N, gradients c N, AdamW's two states 8 N, fp32 master copy 4 N: 16 N in half precision
    LoRA    weights c N, and 16 bytes for each of the adapters' parameters, which are in fp32
    QLoRA   the blocks' linear weights in about 4.13 bits, everything else as LoRA

Gradients are counted whole, as they are there when a step accumulates several passes. The optimiser is taken to work
in place (torch.optim.AdamW with fused=True; its foreach form holds 4 more bytes for each trained parameter while it
steps). The CUDA context and the gaps of the allocator are not in it.

Sources: Micikevicius et al. 2017 (arXiv 1710.03740), section 3.1; Rajbhandari et al. 2019 (arXiv 1910.02054), section
3.1; Dettmers et al. 2023 (arXiv 2305.14314), section 3; Dettmers et al. 2021 (arXiv 2110.02861), section 2.
"""

from dataclasses import dataclass

from lora_core.plan.activations import kept_bytes, workspace_bytes
from lora_core.plan.parameters import lora_parameters
from lora_core.plan.setup import Setup
from lora_core.plan.shape import ModelShape
from lora_core.quant.double import NESTED_BLOCK_SIZE

FP32_BYTES = 4
# 8-bit states: elements sharing one fp32 scale, and the size below which a tensor keeps fp32 states
STATE_BLOCK_SIZE = 256
SMALLEST_8BIT_STATE = 4096


@dataclass(frozen=True)
class MemoryRow:
    """One thing that takes memory, and how its bytes come about; every plan has the same rows, some of no bytes."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class MemoryPlan:
    """All rows of one setup.

    Args:
        shape: of the model.
        setup: how it is trained.
        trainable: parameters trained.
        rows: in the order of a training step.
    """

    shape: ModelShape
    setup: Setup
    trainable: int
    rows: tuple[MemoryRow, ...]

    @property
    def total_bytes(self) -> int:
        """All rows together."""
        return sum(row.bytes for row in self.rows)

    @property
    def trainable_share(self) -> float:
        """Trained parameters in relation to all, the adapters among them."""
        adapters = 0 if self.setup.trains_all else self.trainable
        return self.trainable / (self.shape.parameters + adapters)


def plan_memory(shape: ModelShape, setup: Setup) -> MemoryPlan:
    """The peak memory of fine-tuning a model of this shape in this way.

    Raises:
        ConfigError: if a target is none of the model's layers.
    """
    trainable = shape.parameters if setup.trains_all else lora_parameters(shape, setup.rank, setup.targets)
    gradient_bytes = setup.element_bytes if setup.trains_all else setup.adapter_bytes
    adapters = 0 if setup.trains_all else trainable
    copied = trainable if setup.trains_all and setup.master_copy and setup.element_bytes < FP32_BYTES else 0
    mode = "block inputs only" if setup.checkpointing else "all blocks"
    shown = f"{setup.batch} x {setup.sequence} tokens"
    rows = (
        _weights(shape, setup),
        _product("adapters", adapters, setup.adapter_bytes),
        _product("master copy", copied, FP32_BYTES),
        _product("gradients", trainable, gradient_bytes),
        _optimizer(shape, setup, trainable),
        MemoryRow("activations", kept_bytes(shape, setup), f"{shown}, {mode}"),
        MemoryRow("workspace", workspace_bytes(shape, setup), f"{shown}, at the peak of the backward pass"),
    )
    return MemoryPlan(shape, setup, trainable, rows)


def quantized_bytes(elements: int, block_size: int, double_quant: bool) -> int:
    """Bytes of a weight in 4 bits: codes, and scales of one byte (with their own scales and mean) or four."""
    blocks = -(-elements // block_size)
    scales = blocks + FP32_BYTES * (-(-blocks // NESTED_BLOCK_SIZE) + 1) if double_quant else FP32_BYTES * blocks
    return (elements + 1) // 2 + scales


def _product(name: str, elements: int, size: int) -> MemoryRow:
    return MemoryRow(name, elements * size, f"{elements:,} x {size} bytes" if elements else "none")


def _weights(shape: ModelShape, setup: Setup) -> MemoryRow:
    c = setup.element_bytes
    if setup.method != "qlora":
        return MemoryRow("weights", c * shape.parameters, f"{shape.parameters:,} x {c} bytes")
    quantized = shape.layers * sum(
        quantized_bytes(layer.weights, setup.block_size, setup.double_quant) for layer in shape.linears
    )
    kept = shape.parameters - shape.linear_weights
    bits = 8 * quantized / shape.linear_weights
    reason = f"{shape.linear_weights:,} x {bits:.3f} bits + {kept:,} x {c} bytes"
    return MemoryRow("weights", quantized + c * kept, reason)


def _optimizer(shape: ModelShape, setup: Setup, trainable: int) -> MemoryRow:
    if setup.optimizer == "sgd":
        return MemoryRow("optimiser states", 0, "plain SGD keeps none")
    if setup.optimizer == "adamw":
        return MemoryRow("optimiser states", 2 * FP32_BYTES * trainable, f"{trainable:,} x 2 fp32 states")
    sizes = _tensor_sizes(shape, setup)
    held = sum(count * _state_bytes(size) for size, count in sizes)
    return MemoryRow("optimiser states", 2 * held, f"{trainable:,} x 2 8-bit states, a scale for {STATE_BLOCK_SIZE}")


def _state_bytes(elements: int) -> int:
    if elements < SMALLEST_8BIT_STATE:
        return FP32_BYTES * elements
    return elements + FP32_BYTES * -(-elements // STATE_BLOCK_SIZE)


def _tensor_sizes(shape: ModelShape, setup: Setup) -> list[tuple[int, int]]:
    """(elements, how many) of the trained tensors."""
    if not setup.trains_all:
        targets = shape.targets(setup.targets)
        return [(setup.rank * side, shape.layers) for layer in targets for side in (layer.rows, layer.columns)]
    norms = (shape.hidden, (2 * shape.layers + 1) * (2 if shape.biases else 1))
    linears = [(layer.weights, shape.layers) for layer in shape.linears]
    biases = [(layer.rows, shape.layers) for layer in shape.linears if layer.bias]
    tables = [(shape.vocabulary * shape.hidden, 1 if shape.tied else 2)]
    positions = [(shape.positions * shape.hidden, 1)] if shape.positions else []
    return [*linears, *biases, norms, *tables, *positions]
