"""The shape of a model from its config.json, as transformers writes it."""

import json
from pathlib import Path
from typing import Any

from lora_core.errors import ConfigError
from lora_core.plan.shape import ModelShape

ROTARY_DECODERS = ("llama", "mistral", "qwen2")


def read_shape(path: Path) -> ModelShape:
    """The shape that a config.json states.

    Args:
        path: the file, or the folder it lies in.
    Raises:
        ConfigError: if there is no such file, it is not JSON, a size is missing, or the architecture is not known here.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); want a model's config.json") from error
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}); want a model's config.json") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} holds a {type(settings).__name__}; want a JSON object with a model's sizes")
    name = path.name if path.is_dir() else file.stem
    kind = settings.get("model_type")
    try:
        if kind in ROTARY_DECODERS:
            return _rotary_decoder(name, settings, str(file))
        if kind == "gpt2":
            return _gpt2(name, settings, str(file))
    except KeyError as error:
        raise ConfigError(f"{file} does not state {error}; want the whole config.json of a {kind} model") from error
    raise ConfigError(
        f"model_type of {file} is {kind!r}; its layers are not known here, only those of "
        f"{', '.join((*ROTARY_DECODERS, 'gpt2'))}"
    )


def _rotary_decoder(name: str, settings: dict[str, Any], source: str) -> ModelShape:
    if settings.get("attention_bias") or settings.get("mlp_bias"):
        raise ConfigError(f"{source} asks for attention_bias or mlp_bias, which is not counted here; want neither")
    return ModelShape(
        name=name,
        layers=settings["num_hidden_layers"],
        hidden=settings["hidden_size"],
        intermediate=settings["intermediate_size"],
        heads=settings["num_attention_heads"],
        # a file from before grouped-query attention states no number of key heads
        kv_heads=settings.get("num_key_value_heads") or settings["num_attention_heads"],
        vocabulary=settings["vocab_size"],
        head_size=settings.get("head_dim"),
        tied=bool(settings.get("tie_word_embeddings", False)),
        qkv_bias=settings["model_type"] == "qwen2",
        source=source,
    )


def _gpt2(name: str, settings: dict[str, Any], source: str) -> ModelShape:
    return ModelShape(
        name=name,
        layers=settings["n_layer"],
        hidden=settings["n_embd"],
        intermediate=settings.get("n_inner") or 4 * settings["n_embd"],
        heads=settings["n_head"],
        kv_heads=settings["n_head"],
        vocabulary=settings["vocab_size"],
        positions=settings["n_positions"],
        gated=False,
        tied=True,
        biases=True,
        source=source,
    )
