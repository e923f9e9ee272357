"""One token of generation by a small Llama with adapters, after a prompt in the cache; on a dense and on an NF4 base.

This library's adapters, fused, beside PEFT's (on bitsandbytes' layers for NF4). float32. A shape's K is the hidden
size, M the sequences, R the rank.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import llama
from benchmarks.case import Case, Check, Claim, Provider

SHAPES = tuple({"M": 1, "K": k, "R": 16} for k in (256, 512))
GPU_SHAPES = tuple({"M": m, "K": 4096, "R": 16} for m in (1, 16))

PROMPT = 64
UNIT_BF16 = 2.0**-9


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison on a dense base and on a 4-bit one."""
    import torch

    base = llama.llama(shape["K"], device, cache=True).eval()
    tokens = torch.randint(base.config.vocab_size, (shape["M"], PROMPT + 1), device=device)
    start = llama.start_of(base, shape["R"])
    for four_bit in (False, True):
        peer = "peft on bitsandbytes" if four_bit else "peft"
        arguments = (base, shape["R"], start, four_bit)
        models = {"lora_core": llama.ours(*arguments).eval(), peer: llama.pefts(*arguments).eval()}
        with torch.no_grad():
            wide = llama.spelt_out(models[peer]).double()
            truth = wide(input_ids=tokens).logits[:, -1].flatten().tolist()
        # in eval mode on a CPU, bitsandbytes multiplies in bfloat16 where the processor can
        units = {peer: UNIT_BF16} if four_bit and device == "cpu" else {}
        steps = {name: _step(model, tokens) for name, model in models.items()}
        yield Case(
            op="generation_step",
            mode="fwd",
            shape=shape,
            dtype="float32",
            block_size=llama.BLOCK_SIZE if four_bit else None,
            providers=[Provider(name, run, prepare=prepare) for name, (prepare, run) in steps.items()],
            check=partial(_check, steps, truth, base.config, units),
            claims=(Claim(against=peer, no_slower=True),),
            note=f"Llama of 4 layers, {PROMPT} tokens in the cache",
        )


def _step(model: Any, tokens: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return what prepares a copy of the prompt's cache, and what generates one token after it."""
    import torch

    with torch.no_grad():
        cache = model(input_ids=tokens[:, :-1]).past_key_values

    def run(copied: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=tokens[:, -1:], past_key_values=copied).logits[:, -1]

    return lambda: copy.deepcopy(cache), run


def _check(steps: dict[str, Any], truth: list[float], config: Any, units: dict[str, float], name: str) -> Check:
    """Compare the token's logits with those of the whole sequence at once in float64."""
    prepare, run = steps[name]
    unit = units.get(name, llama.UNIT_FP32)
    return llama.near(run(prepare()).flatten().tolist(), truth, config, "a logit", unit)
