"""One token of generation by a small Llama with adapters, after a prompt in the cache; on a dense and on an NF4 base.

This library's adapters, fused, beside PEFT's (on bitsandbytes' layers for NF4). bfloat16 on a GPU, float32 on a CPU. A
shape's K is the hidden size, M the sequences, R the rank.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import llama, peers
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.peers import Peer

SHAPES = tuple({"M": 1, "K": k, "R": 16} for k in (256, 512))
GPU_SHAPES = tuple({"M": m, "K": 4096, "R": 16} for m in (1, 16))
NEEDS = llama.NEEDS

PROMPT = 64


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison on a dense base and on a 4-bit one."""
    import torch

    base = llama.llama(shape["K"], device, cache=True).eval()
    tokens = torch.randint(base.config.vocab_size, (shape["M"], PROMPT + 1), device=device)
    start = llama.start_of(base, shape["R"])
    for four_bit in (False, True):
        peer, needs = llama.peer_of(four_bit)
        rest = (shape["R"], start, four_bit)
        builders = {"lora_core": partial(_build, llama.ours, rest), peer: partial(_build, llama.pefts, rest)}
        models, missing = peers.providers(
            {"lora_core": builders["lora_core"](base)}, {peer: Peer(needs, partial(builders[peer], base))}
        )
        with torch.no_grad():
            truth = llama.written(base, *rest)(input_ids=tokens).logits[:, -1].flatten().tolist()
        # in eval mode on a CPU, bitsandbytes multiplies in bfloat16 where the processor can
        units = {peer: llama.UNIT_BF16} if four_bit and device == "cpu" else {}
        steps = {name: _step(model, tokens) for name, model in models.items()}
        yield Case(
            op="generation_step",
            mode="fwd",
            shape=shape,
            dtype=llama.dtype_of(device),
            block_size=llama.BLOCK_SIZE if four_bit else None,
            providers=[Provider(name, run, prepare=prepare) for name, (prepare, run) in steps.items()],
            check=partial(_check, base, builders, steps, tokens, truth, units),
            claims=(Claim(against=peer, no_slower=True),),
            note=f"Llama of 4 layers, {PROMPT} tokens in the cache",
            missing=missing,
        )


def _build(make: Callable[..., Any], rest: tuple[Any, ...], base: Any) -> Any:
    return make(base, *rest).eval()


def _step(model: Any, tokens: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return what prepares a copy of the prompt's cache, and what generates one token after it."""
    import torch

    with torch.no_grad():
        cache = model(input_ids=tokens[:, :-1]).past_key_values

    def run(copied: Any) -> Any:
        with torch.no_grad():
            return model(input_ids=tokens[:, -1:], past_key_values=copied).logits[:, -1]

    return lambda: copy.deepcopy(cache), run


def _check(
    base: Any,
    builders: dict[str, Callable[[Any], Any]],
    steps: dict[str, Any],
    tokens: Any,
    truth: list[float],
    units: dict[str, float],
    name: str,
) -> Check:
    """Compare the token's logits with those of the whole sequence at once in float64.

    In bfloat16 they would hide a wrong scaling, so the same model in float32 has to pass first.
    """

    def logits(prepare: Callable[[], Any], run: Callable[[Any], Any]) -> list[float]:
        found: list[float] = run(prepare()).flatten().tolist()
        return found

    unit = units.get(name, llama.UNIT_FP32)
    if llama.in_float32(base):
        return llama.near(logits(*steps[name]), truth, base.config, "a logit", unit)
    wide = _step(builders[name](copy.deepcopy(base).float()), tokens)
    first = llama.near(logits(*wide), truth, base.config, "in float32, a logit", unit)
    return llama.near_bf16(logits(*steps[name]), truth, base.config, "a logit") if first.passed else first
