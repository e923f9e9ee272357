"""Forward, loss and backward of a small Llama with PEFT's adapters, fused, beside the same model as PEFT runs it.

A shape's K is the hidden size, M the tokens of a step, R the rank. The base is float32, or NF4 held by bitsandbytes.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import llama
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.cases import training_step

SHAPES = ({"M": 1024, "K": 256, "R": 16},)


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison on a dense base and on a 4-bit one."""
    import torch

    import lora_core as lc

    base = llama.llama(shape["K"], device)
    size = (training_step.SEQUENCES, shape["M"] // training_step.SEQUENCES)
    tokens = torch.randint(base.config.vocab_size, size, device=device)
    start = llama.start_of(base, shape["R"])
    for four_bit in (False, True):
        plain = llama.pefts(base, shape["R"], start, four_bit)
        fused = copy.deepcopy(plain)
        lc.fuse(fused)
        models = {"lora_core": fused, "peft": plain}
        truth = training_step.losses(llama.spelt_out(plain).double(), tokens)
        yield Case(
            op="fuse",
            mode="fwdbwd",
            shape=shape,
            dtype="float32",
            block_size=llama.BLOCK_SIZE if four_bit else None,
            providers=[Provider(name, _step(model, tokens)) for name, model in models.items()],
            check=partial(_check, models, tokens, truth),
            claims=(Claim(against="peft", no_slower=True),),
            note="Llama of 4 layers, all-linear, adapters of PEFT",
        )


def _step(model: Any, tokens: Any) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    return step


def _check(models: dict[str, Any], tokens: Any, truth: list[float], name: str) -> Check:
    """Compare the losses of a few steps of a copy with those in float64."""
    return training_step.check(copy.deepcopy(models[name]), tokens, truth)
