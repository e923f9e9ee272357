"""Shapes that benchmarks run on, with where they come from."""

# M tokens, N out, K in, R rank
TOKENS = 1024

# one square weight: the quantiser's benchmark shape
SQUARE_4096 = {"N": 4096, "K": 4096}

# query and output projections of Llama-3-8B; source: its config.json, hidden_size 4096
LLAMA_8B_ATTENTION = {"M": TOKENS, "N": 4096, "K": 4096, "R": 16}
# gate and up projections of Llama-3-8B; source: its config.json, intermediate_size 14336
LLAMA_8B_GATE = {"M": TOKENS, "N": 14336, "K": 4096, "R": 16}
# small enough for a processor with two cores
SMALL_LINEAR = {"M": TOKENS, "N": 512, "K": 512, "R": 16}

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
    if not set(shape) <= {"M", "N", "K", "R"} or min(shape.values()) < 1:
        raise ValueError(f"shape {text!r}: want positive numbers under M (tokens), N (out), K (in), R (rank)")
    return shape
