"""Models people fine-tune, as data: every size with its source."""

import difflib
import reprlib

from lora_core.errors import ConfigError
from lora_core.plan.shape import ModelShape

# sizes are those of config.json in the named repository of the Hugging Face hub, or of the named paper's table
SHAPES = (
    ModelShape(
        name="GPT-2",
        layers=12,
        hidden=768,
        intermediate=3072,
        heads=12,
        kv_heads=12,
        vocabulary=50257,
        positions=1024,
        gated=False,
        tied=True,
        biases=True,
        fused=True,
        source="openai-community/gpt2",
    ),
    ModelShape(
        name="GPT-3",
        layers=96,
        hidden=12288,
        intermediate=49152,
        heads=96,
        kv_heads=96,
        vocabulary=50257,
        positions=2048,
        gated=False,
        tied=True,
        biases=True,
        source="Brown et al. 2020 (arXiv 2005.14165), table 2.1, with GPT-2's vocabulary and biases",
    ),
    ModelShape(
        name="LLaMA-65B",
        layers=80,
        hidden=8192,
        intermediate=22016,
        heads=64,
        kv_heads=64,
        vocabulary=32000,
        source="Touvron et al. 2023 (arXiv 2302.13971), table 2; huggyllama/llama-65b",
    ),
    ModelShape(
        name="Llama-2-7B",
        layers=32,
        hidden=4096,
        intermediate=11008,
        heads=32,
        kv_heads=32,
        vocabulary=32000,
        source="meta-llama/Llama-2-7b-hf",
    ),
    ModelShape(
        name="Llama-2-13B",
        layers=40,
        hidden=5120,
        intermediate=13824,
        heads=40,
        kv_heads=40,
        vocabulary=32000,
        source="meta-llama/Llama-2-13b-hf",
    ),
    ModelShape(
        name="Llama-2-70B",
        layers=80,
        hidden=8192,
        intermediate=28672,
        heads=64,
        kv_heads=8,
        vocabulary=32000,
        source="meta-llama/Llama-2-70b-hf",
    ),
    ModelShape(
        name="Llama-3-8B",
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        vocabulary=128256,
        source="meta-llama/Meta-Llama-3-8B",
    ),
    ModelShape(
        name="Llama-3-70B",
        layers=80,
        hidden=8192,
        intermediate=28672,
        heads=64,
        kv_heads=8,
        vocabulary=128256,
        source="meta-llama/Meta-Llama-3-70B",
    ),
    ModelShape(
        name="Llama-3.2-1B",
        layers=16,
        hidden=2048,
        intermediate=8192,
        heads=32,
        kv_heads=8,
        vocabulary=128256,
        tied=True,
        source="meta-llama/Llama-3.2-1B",
    ),
    ModelShape(
        name="Llama-3.2-3B",
        layers=28,
        hidden=3072,
        intermediate=8192,
        heads=24,
        kv_heads=8,
        vocabulary=128256,
        tied=True,
        source="meta-llama/Llama-3.2-3B",
    ),
    ModelShape(
        name="Mistral-7B",
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        vocabulary=32000,
        source="mistralai/Mistral-7B-v0.1",
    ),
    ModelShape(
        name="Qwen2.5-0.5B",
        layers=24,
        hidden=896,
        intermediate=4864,
        heads=14,
        kv_heads=2,
        vocabulary=151936,
        tied=True,
        qkv_bias=True,
        source="Qwen/Qwen2.5-0.5B",
    ),
    ModelShape(
        name="Qwen2.5-7B",
        layers=28,
        hidden=3584,
        intermediate=18944,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        qkv_bias=True,
        source="Qwen/Qwen2.5-7B",
    ),
)


# similarity, by difflib, from which on a name is suggested
LIKE = 0.4


def find_shape(name: str) -> ModelShape:
    """The shape of the model with this name or in this repository, upper and lower case alike.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    known = {shape.name.lower(): shape for shape in SHAPES}
    found = known.get(name.lower()) or _of_repository(name)
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=LIKE)
    meant = f"; did you mean {known[near[0]].name!r}?" if near else "."
    raise ConfigError(
        f"no model {reprlib.repr(name)} is known{meant} Known: {', '.join(s.name for s in SHAPES)}. Any other model: "
        "give the path of its config.json"
    )


def is_known(name: str) -> bool:
    """Say whether find_shape has a model of this name."""
    return any(shape.name.lower() == name.lower() for shape in SHAPES) or _of_repository(name) is not None


def _of_repository(name: str) -> ModelShape | None:
    return next((shape for shape in SHAPES if shape.source.rpartition("; ")[2].lower() == name.lower()), None)
