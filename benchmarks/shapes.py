"""Shapes that benchmarks run on, with where they come from."""

import importlib
from collections.abc import Iterable

# M tokens, N out, K in, R rank
TOKENS = 1024

# one square weight: the quantiser's benchmark shape
SQUARE_4096 = {"N": 4096, "K": 4096}

# N x K of the quantiser's benchmarks on a GPU: attention of Llama-3-8B, its feed-forward, that of Llama-3-70B
GPU_WEIGHTS = (SQUARE_4096, {"N": 4096, "K": 14336}, {"N": 8192, "K": 28672})

# the same for the scales of blocks of 64, of which a weight has few: four times as many weights
GPU_SCALES = (*GPU_WEIGHTS, {"N": 16384, "K": 57344})

# small enough for a processor with two cores
SMALL_LINEAR = {"M": TOKENS, "N": 512, "K": 512, "R": 16}
SMALL_LINEARS = (
    *({**SMALL_LINEAR, "M": m} for m in (1, 16, 512)),
    {**SMALL_LINEAR, "R": 64},
    {**SMALL_LINEAR, "N": 1408},
)

# as generation meets them: a query projection of Llama-3-8B and few tokens
FEW_TOKENS = tuple({"M": m, "N": 4096, "K": 4096, "R": 16} for m in (1, 16))

# N x K of the linear layers: query and output, key and value, gate and up, down
# source: config.json of Llama-3-8B (hidden 4096, 8 heads of 128 for keys, feed-forward 14336) and of Llama-3-70B
# (8192, 8 of 128, 28672)
LLAMA_3_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
LLAMA_3_70B = ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672))
LLAMA_3_LINEARS = tuple(
    {"M": m, "N": n, "K": k, "R": r}
    for n, k in (*LLAMA_3_8B, *LLAMA_3_70B)
    for m in (1, 16, 64, 512, 4096, 8192)
    for r in (8, 16, 64, 256)
)

# what a sweep varies: the benchmark, its sizes on a processor and on a GPU, and all else that stays
SWEEPS = {
    "M": ("lora_linear", [4**i for i in range(8)], [4**i for i in range(8)], {"N": 512, "K": 512, "R": 16}),
    "R": ("lora_linear", [2**i for i in range(9)], [2**i for i in range(9)], {"M": 512, "N": 512, "K": 512}),
    "G": ("grouped_lora", [4**i for i in range(5)], [4**i for i in range(5)], {"M": 256, "N": 512, "K": 512, "R": 8}),
    # a million parameters at 128; as many as a machine holds, as what does not fit is listed and left
    "K": ("training_step", [2**i for i in range(6, 12)], [2**i for i in range(7, 15)], {"M": 256, "R": 16}),
}
# on a GPU a layer is that of Llama-3-8B
GPU_LAYER = {"N": 4096, "K": 4096}


def sweep(name: str, suite: str) -> list[tuple[str, dict[str, int]]]:
    """Return the benchmark and shape of every point of a sweep."""
    op, on_cpu, on_gpu, rest = SWEEPS[name]
    if suite == "gpu":
        rest = {**rest, **{k: v for k, v in GPU_LAYER.items() if k in rest}}
    return [(op, ordered({**rest, name: size})) for size in (on_gpu if suite == "gpu" else on_cpu)]


def ordered(shape: dict[str, int]) -> dict[str, int]:
    """Return the sizes in the order M, N, K, R, then others."""
    return dict(sorted(shape.items(), key=lambda item: "MNKR".find(item[0]) % 5))


def written(shape: dict[str, int], between: str = " ") -> str:
    """Return a shape in words, as "M=1024 N=512"; with a comma between them as `parse` takes it."""
    return between.join(f"{name}={size}" for name, size in shape.items())


def swept_only(op: str, shape: dict[str, int]) -> bool:
    """Say whether a shape, or one with more sizes, such as a rank, is a point of a sweep and of no suite."""
    module = importlib.import_module(f"benchmarks.cases.{op}")
    swept = [point for name in SWEEPS for suite in ("cpu", "gpu") for of, point in sweep(name, suite) if of == op]
    in_suites = (*module.SHAPES, *getattr(module, "GPU_SHAPES", ()))
    return _among(shape, swept) and not _among(shape, in_suites)


def _among(shape: dict[str, int], others: Iterable[dict[str, int]]) -> bool:
    return any(shape.items() <= other.items() for other in others)


# what a comparison takes however small it is, in multiplications of a matrix product: building, checking, 15 rounds;
# and at most, as rounds end after some seconds
LEAST_COST, MOST_COST = 2**27, 2**33


def cost(shape: dict[str, int]) -> int:
    """Return how much longer one shape takes than another, roughly: M N K, where a model's N is its K.

    K alone is a number of bytes.
    """
    k = shape.get("K", 1)
    work = k if shape.keys() == {"K"} else shape.get("M", 1) * shape.get("N", k) * k
    return min(LEAST_COST + work, MOST_COST)


# Llama-2-7B; source: its config.json
LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}


def small_llama(hidden_size: int) -> dict[str, int]:
    """Return the shape of a small Llama: heads of 64, a feed-forward of 8/3 hidden rounded up to 128, 4 layers.

    Args:
        hidden_size: a multiple of 64.
    """
    return {
        "vocab_size": 1024,
        "hidden_size": hidden_size,
        "intermediate_size": -(-hidden_size * 8 // 3 // 128) * 128,
        "num_hidden_layers": 4,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": hidden_size // 64,
    }


def parse(text: str) -> dict[str, int]:
    """Return the shape written as "M=1024,N=512,K=512,R=16" or, for a weight, "4096x4096" (N x K).

    Raises:
        ValueError: if it is neither.
    """
    try:
        if "=" in text:
            shape = {name.strip(): int(number) for name, number in (part.split("=") for part in text.split(","))}
        else:
            n, k = text.split("x")
            shape = {"N": int(n), "K": int(k)}
    except ValueError as error:
        raise ValueError(f"shape {text!r} is not understood; write M=1024,N=512,K=512,R=16 or 4096x4096") from error
    if not set(shape) <= {"M", "N", "K", "R", "G"} or min(shape.values()) < 1:
        raise ValueError(
            f"shape {text!r}: want positive numbers under M (tokens), N (out), K (in), R (rank), G (adapters)"
        )
    return shape
