"""Injecting all-linear LoRA into a Llama-2-7B shape on the meta device, beside PEFT. The shape's R is the rank."""

from collections.abc import Iterator
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.peers import Peer, providers
from benchmarks.shapes import LLAMA_2_7B

SHAPES = ({"R": 16},)

NEEDS = ("transformers",)

LIMIT_MS = 500


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the one comparison; no arithmetic runs, so the device does not matter."""
    rank = shape["R"]
    peers = {"peft": Peer(("peft",), lambda: lambda model: _peft(model, rank))}
    runs, missing = providers({"lora_core": lambda model: _ours(model, rank)}, peers)
    yield Case(
        op="inject",
        mode="fwd",
        shape=shape,
        dtype="float32",
        block_size=None,
        providers=[Provider(name, run, prepare=_llama) for name, run in runs.items()],
        check=lambda name: _check(runs[name](_llama()), rank),
        claims=(Claim(against="peft", no_slower=True, limit_ms=LIMIT_MS),),
        note="Llama-2-7B on meta, all-linear",
        missing=missing,
    )


def _llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B))


def _ours(model: Any, rank: int) -> Any:
    import lora_core as lc

    return lc.add_adapter(model, lc.LoraConfig(r=rank, target_modules="all-linear"))


def _peft(model: Any, rank: int) -> Any:
    import warnings

    import peft

    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # a FutureWarning of transformers' own
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def _check(model: Any, rank: int) -> Check:
    """Count trainable parameters: R (N + K) for each of the seven linear layers of a block."""
    hidden, inner, layers = (LLAMA_2_7B[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    wanted = layers * rank * (4 * 2 * hidden + 3 * (hidden + inner))
    got = sum(p.numel() for p in model.parameters() if p.requires_grad)
    error = float(abs(got - wanted))
    return Check(error == 0, error, error, f"{got} trainable parameters, want {wanted}")
