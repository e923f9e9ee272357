"""The shape of a model from its config.json, as transformers writes it."""

import os
import reprlib
from pathlib import Path
from typing import Any

from lora_core.adapt.json_text import parse_json
from lora_core.errors import ConfigError
from lora_core.plan.shape import ModelShape

ROTARY_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "phi3")
# where the file states none and it is not hidden / heads; source: transformers' configuration
HEAD_SIZES = {"qwen3": 128}
# whose attention heeds attention_bias
BIASED = ("llama", "qwen3")
MODEL_TYPES = (*ROTARY_DECODERS, "gpt2")


def read_shape(path: Path) -> ModelShape:
    """The shape that a config.json of one of MODEL_TYPES states; of a model with other parts, that of its text_config.

    Args:
        path: the file, or the folder it lies in.
    Raises:
        ConfigError: if there is no such file, it is not JSON, a size is missing or cannot be, or the architecture is
            none of MODEL_TYPES.
    """
    folder = os.path.isdir(path)
    file = path / "config.json" if folder else path
    settings, source = _read(file), str(file)
    kind, inner = settings.get("model_type"), settings.get("text_config")
    if kind not in MODEL_TYPES and isinstance(inner, dict) and inner.get("model_type") in MODEL_TYPES:
        settings, kind, source = inner, inner["model_type"], f"text_config of {file}"
    if kind not in MODEL_TYPES:
        raise ConfigError(
            f"model_type of {file} is {reprlib.repr(kind)}; its layers are not known here, only those of "
            f"{', '.join(MODEL_TYPES)}; for an estimate take the known model nearest to it in size"
        )
    try:
        shape = _gpt2 if kind == "gpt2" else _rotary_decoder
        return shape(path.name if folder else file.stem, settings, source)
    except KeyError as error:
        raise ConfigError(f"{source} does not state {error}; want the whole config.json of a {kind} model") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        # some editors write a byte order mark
        settings = parse_json(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{file} cannot be read: {why}; want a model's config.json, downloaded before, or a known model's name"
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); want a model's config.json") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds a {type(settings).__name__}; want a JSON object with a model's sizes")
    return settings


def _rotary_decoder(name: str, settings: dict[str, Any], source: str) -> ModelShape:
    kind, biased = settings["model_type"], _flag(settings, "attention_bias", source)
    if _flag(settings, "mlp_bias", source) or (biased and kind not in BIASED):
        raise ConfigError(
            f"{source} asks for biases that are not counted here; want no mlp_bias, and attention_bias in a "
            f"{' or '.join(BIASED)} alone"
        )
    # a file from before grouped-query attention states no number of key heads
    kv_heads = settings.get("num_key_value_heads")
    return ModelShape(
        name=name,
        layers=settings["num_hidden_layers"],
        hidden=settings["hidden_size"],
        intermediate=settings["intermediate_size"],
        heads=settings["num_attention_heads"],
        kv_heads=settings["num_attention_heads"] if kv_heads is None else kv_heads,
        vocabulary=settings["vocab_size"],
        head_size=settings.get("head_dim", HEAD_SIZES.get(kind)),
        tied=_flag(settings, "tie_word_embeddings", source),
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased,
        fused=kind == "phi3",
        head_norms=kind == "qwen3",
        source=source,
    )


def _gpt2(name: str, settings: dict[str, Any], source: str) -> ModelShape:
    if _flag(settings, "add_cross_attention", source):
        raise ConfigError(f"{source} asks for add_cross_attention, whose layers are not counted here; want a decoder")
    hidden = settings["n_embd"]
    inner: Any = settings.get("n_inner")
    if inner is None and isinstance(hidden, int):
        inner = 4 * hidden
    return ModelShape(
        name=name,
        layers=settings["n_layer"],
        hidden=hidden,
        intermediate=inner,
        heads=settings["n_head"],
        kv_heads=settings["n_head"],
        vocabulary=settings["vocab_size"],
        positions=settings["n_positions"],
        gated=False,
        tied=_flag(settings, "tie_word_embeddings", source, default=True),
        biases=True,
        fused=True,
        source=source,
    )


def _flag(settings: dict[str, Any], name: str, source: str, default: bool = False) -> bool:
    value = settings.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} of {source} is {reprlib.repr(value)}; want true or false")
    return value
