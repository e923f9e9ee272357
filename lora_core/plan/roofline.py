"""Which term binds a linear layer with an adapter on a GPU: bytes or operations.

    y = x W^T + s (x A^T) B^T        x [M, K], W [N, K], A [R, K], B [N, R]

    weight bytes        e N K with e bytes an element; N K / 2 codes and a scale's share in NF4
    activation bytes    e M (K + N)
    adapter bytes       e R (N + K)
    operations          2 M N K for the base, 2 M R (N + K) for the adapter

    time >= max(bytes / memory rate, operations / matmul rate)

A kernel that decodes NF4 inside the product reads the codes alone; one that dequantises first also writes W and reads
it back. The rates are data sheets' peaks times a share that real programs reach, which is an assumption.

Source: Williams et al. 2009 (Communications of the ACM 52, 65-76).
"""

from dataclasses import dataclass

from lora_core.errors import ConfigError
from lora_core.plan.memory import quantized_bytes
from lora_core.plan.parameters import check_count

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
BLOCK_SIZE = 64
PATHS = ("dense", "nf4 fused", "nf4 dequantised")


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Args:
        name: of the card.
        memory_gb_s: bandwidth of its memory.
        matmul_tflop_s: dense half-precision products with float32 sums, without sparsity.
        float32_tflop_s: products in float32, without tensor cores, which would round the factors (TF32).
        source: the document.
    """

    name: str
    memory_gb_s: float
    matmul_tflop_s: float
    float32_tflop_s: float
    source: str


GPUS = (
    Gpu("H200 SXM", 4800, 989, 67, "NVIDIA H200 data sheet"),
    Gpu("H100 SXM", 3350, 989, 67, "NVIDIA H100 data sheet"),
    Gpu("A100 80 GB SXM", 2039, 312, 19.5, "NVIDIA A100 data sheet"),
    Gpu("RTX 4090", 1008, 165.2, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A"),
    Gpu("RTX 3090", 936, 71, 35.6, "NVIDIA Ampere GA102 white paper, appendix A"),
)


@dataclass(frozen=True)
class Roofline:
    """The least time of one layer, term by term.

    Args:
        weight_bytes, activation_bytes, adapter_bytes: moved once each.
        base_operations, adapter_operations: of the products.
        memory_s: time of all bytes.
        compute_s: time of all operations.
        before_s: time of a dequantisation that has to come first, 0 without one.
    """

    weight_bytes: int
    activation_bytes: int
    adapter_bytes: int
    base_operations: int
    adapter_operations: int
    memory_s: float
    compute_s: float
    before_s: float

    @property
    def total_s(self) -> float:
        """The least time: the larger of the two, after what comes before."""
        return self.before_s + max(self.memory_s, self.compute_s)

    @property
    def binds(self) -> str:
        """Return "memory" or "compute", whichever the product itself waits for."""
        return "memory" if self.memory_s >= self.compute_s else "compute"

    @property
    def intensity(self) -> float:
        """Operations for each byte of the product."""
        moved = self.weight_bytes + self.activation_bytes + self.adapter_bytes
        return (self.base_operations + self.adapter_operations) / moved


def roofline(
    m: int,
    n: int,
    k: int,
    rank: int,
    gpu: Gpu,
    path: str = "dense",
    memory_share: float = 0.9,
    matmul_share: float = 0.8,
    dtype: str = "bfloat16",
) -> Roofline:
    """Return the least time of a forward of M tokens through a layer [N, K] with an adapter of this rank.

    Args:
        m: tokens.
        n: rows of W.
        k: columns of W.
        rank: R; 0 for no adapter.
        gpu: whose rates.
        path: "dense", "nf4 fused" (decoded inside the product) or "nf4 dequantised" (to the dtype first); NF4 in
            blocks of 64 with double quantisation.
        memory_share: of the bandwidth that is reached.
        matmul_share: of the matmul rate that is reached.
        dtype: "bfloat16", "float16" or "float32", of x, the adapter and a dense W.
    Raises:
        ConfigError: on a size below 1, a share outside (0, 1], an unknown path or dtype.
    """
    for name, size in (("m", m), ("n", n), ("k", k), ("rank", rank or 1)):
        check_count(name, size)
    for name, share in (("memory_share", memory_share), ("matmul_share", matmul_share)):
        if not 0 < share <= 1:
            raise ConfigError(f"{name} is {share}; want a share in (0, 1]")
    if path not in PATHS:
        raise ConfigError(f"path is {path!r}; want one of {', '.join(PATHS)}")
    if dtype not in BYTES:
        raise ConfigError(f"dtype is {dtype!r}; want one of {', '.join(BYTES)}")
    element, tflop_s = BYTES[dtype], gpu.float32_tflop_s if dtype == "float32" else gpu.matmul_tflop_s
    dense, packed = element * n * k, quantized_bytes(n * k, BLOCK_SIZE, True)
    weight = packed if path == "nf4 fused" else dense
    activations, adapter = element * m * (k + n), element * rank * (n + k)
    base, low_rank = 2 * m * n * k, 2 * m * rank * (n + k)
    memory_rate, matmul_rate = gpu.memory_gb_s * 1e9 * memory_share, tflop_s * 1e12 * matmul_share
    return Roofline(
        weight_bytes=weight,
        activation_bytes=activations,
        adapter_bytes=adapter,
        base_operations=base,
        adapter_operations=low_rank,
        memory_s=(weight + activations + adapter) / memory_rate,
        compute_s=(base + low_rank) / matmul_rate,
        before_s=(packed + dense) / memory_rate if path == "nf4 dequantised" else 0.0,
    )
