"""`lora-core memory`: what fine-tuning takes, and whether it fits."""

from typing import Annotated, Any

import typer

GIGA = 10**9
# an exabyte: more than any machine has, and its bytes are still a whole number as a float
LARGEST_GB = 10**9
# lora_core.plan.config_file.MODEL_TYPES, which is loaded only when it is needed
MODEL_TYPES = "llama, mistral, qwen2, qwen3, phi3 or gpt2"


def memory(
    model: Annotated[
        str, typer.Option(help=f"A known model (--list-models), or a config.json of type {MODEL_TYPES}.")
    ] = "Llama-2-7B",
    method: Annotated[str, typer.Option(help="full, lora, qlora, or all side by side.")] = "all",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    targets: Annotated[str, typer.Option(help="all-linear, attention, or names with commas between.")] = "all-linear",
    batch: Annotated[int, typer.Option(help="Sequences in one forward pass.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens in each sequence.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of weights and activations: bfloat16, float16, float32.")] = "bfloat16",
    block_size: Annotated[int, typer.Option(help="4-bit weights sharing one scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantise the scales too.")] = True,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit or sgd.")] = "adamw",
    checkpointing: Annotated[bool, typer.Option(help="Run each block again in the backward pass.")] = False,
    gpu_gb: Annotated[float | None, typer.Option(help="A card's memory in GB of 10^9 bytes: does it fit?")] = None,
    figures: Annotated[
        bool,
        typer.Option("--figures", help="Show often quoted figures, and the methods on --model at --rank."),
    ] = False,
    list_models: Annotated[bool, typer.Option("--list-models", help="Show the known models.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Count trained parameters and bytes of full fine-tuning, LoRA and QLoRA, and say what fits on a card."""
    from lora_core.errors import ConfigError
    from lora_core.plan import show

    if figures:
        shape = _shape(model)
        _print_json(_figures(shape, rank)) if as_json else show.show_figures(shape, rank)
        return
    if list_models:
        _print_json(_models()) if as_json else show.show_models()
        return
    if gpu_gb is not None and not 0 < gpu_gb <= LARGEST_GB:
        raise ConfigError(f"gpu-gb is {gpu_gb:g}; want the card's memory in GB, more than 0 and at most {LARGEST_GB:,}")
    from lora_core.plan.setup import METHODS

    if method not in (*METHODS, "all"):
        raise ConfigError(f"method is {method!r}; want one of {', '.join((*METHODS, 'all'))}")
    chosen = METHODS if method == "all" else (method,)
    settings = {
        "rank": rank,
        "targets": _targets(targets),
        "batch": batch,
        "sequence": seq,
        "dtype": dtype,
        "block_size": block_size,
        "double_quant": double_quant,
        "optimizer": optimizer,
        "checkpointing": checkpointing,
    }
    plans = _plan(model, chosen, settings)
    fits = [] if gpu_gb is None else _fit(plans, int(gpu_gb * GIGA))
    if as_json:
        _print_json(_as_data(plans, fits))
        return
    show.show_plans(plans)
    if gpu_gb is not None:
        show.show_fits(plans, fits, gpu_gb)


def _targets(text: str) -> str | list[str]:
    return text if text in ("all-linear", "attention") else [name.strip() for name in text.split(",") if name.strip()]


def _shape(model: str) -> Any:
    import os
    from pathlib import Path

    from lora_core.plan.catalogue import find_shape, is_known
    from lora_core.plan.config_file import read_shape

    # a name that cannot be a path, too long or empty, does not exist either
    is_path = os.path.exists(model) or (not is_known(model) and (os.sep in model or model.endswith(".json")))
    return read_shape(Path(model)) if is_path else find_shape(model)


def _plan(model: str, methods: tuple[str, ...], settings: dict[str, Any]) -> list[Any]:
    from lora_core.plan.memory import plan_memory
    from lora_core.plan.setup import Setup

    shape = _shape(model)
    shape.check_sequence(settings["sequence"])
    return [plan_memory(shape, Setup(method=method, **settings)) for method in methods]


def _fit(plans: list[Any], budget_bytes: int) -> list[Any]:
    from lora_core.plan.fit import fit

    return [fit(plan.shape, plan.setup, budget_bytes) for plan in plans]


def _as_data(plans: list[Any], fits: list[Any]) -> dict[str, Any]:
    import dataclasses

    data = [
        {
            "setup": dataclasses.asdict(plan.setup),
            "trainable": plan.trainable,
            "trainable_percent": 100 * plan.trainable_share,
            "rows": [dataclasses.asdict(row) for row in plan.rows],
            "total_bytes": plan.total_bytes,
        }
        for plan in plans
    ]
    for entry, found in zip(data, fits, strict=False):
        entry["fit"] = {**dataclasses.asdict(found), "fits": found.fits}
    return {"model": dataclasses.asdict(plans[0].shape), "parameters": plans[0].shape.parameters, "plans": data}


def _figures(shape: Any, rank: int) -> dict[str, Any]:
    import dataclasses

    from lora_core.plan.compare import compare_methods
    from lora_core.plan.figures import figures

    return {
        "figures": [dataclasses.asdict(figure) for figure in figures()],
        "model": shape.name,
        "methods": [dataclasses.asdict(method) for method in compare_methods(shape, rank)],
    }


def _models() -> list[dict[str, Any]]:
    import dataclasses

    from lora_core.plan.catalogue import SHAPES

    return [{**dataclasses.asdict(shape), "parameters": shape.parameters} for shape in SHAPES]


def _print_json(data: Any) -> None:
    import json

    typer.echo(json.dumps(data, indent=2))
