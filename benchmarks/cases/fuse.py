"""Forward, loss and backward of a small Llama with PEFT's adapters, fused, beside the same model as PEFT runs it.

A shape's K is the hidden size, M the tokens of a step, R the rank. The base is dense, or NF4 held by bitsandbytes.
bfloat16 on a GPU, float32 on a CPU.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import llama, peers
from benchmarks.case import Case, Claim, Provider
from benchmarks.cases import training_step

SHAPES = ({"M": 512, "K": 256, "R": 16},)
NEEDS = llama.NEEDS


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison on a dense base and on a 4-bit one."""
    import torch

    base = llama.llama(shape["K"], device)
    size = (training_step.SEQUENCES, shape["M"] // training_step.SEQUENCES)
    tokens = torch.randint(base.config.vocab_size, size, device=device)
    start = llama.start_of(base, shape["R"])
    for four_bit in (False, True):
        rest = (shape["R"], start, four_bit)
        builders = {"lora_core": partial(_fused, rest=rest), "peft": partial(_plain, rest=rest)}
        needs = ("peft", "bitsandbytes") if four_bit else ("peft",)
        reason = peers.why_none(needs)
        models = {name: build(base) for name, build in builders.items()} if reason is None else {}
        yield Case(
            op="fuse",
            mode="fwdbwd",
            shape=shape,
            dtype=llama.dtype_of(device),
            block_size=llama.BLOCK_SIZE if four_bit else None,
            providers=[Provider(name, _step(model, tokens)) for name, model in models.items()],
            check=training_step.checker(base, builders, tokens, llama.written(base, *rest)),
            claims=(Claim(against="peft", no_slower=True),),
            note="Llama of 4 layers, all-linear, adapters of PEFT",
            missing={} if reason is None else dict.fromkeys(builders, reason),
        )


def _plain(base: Any, rest: tuple[Any, ...]) -> Any:
    return llama.pefts(base, *rest)


def _fused(base: Any, rest: tuple[Any, ...]) -> Any:
    import lora_core as lc

    model = llama.pefts(base, *rest)
    lc.fuse(model)
    return model


def _step(model: Any, tokens: Any) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    return step
