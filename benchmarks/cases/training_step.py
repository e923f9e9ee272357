"""A training step of a small Llama: forward, loss, backward, AdamW. Full fine-tuning, LoRA and QLoRA in float32.

This library's adapters, fused, beside PEFT's, and on an NF4 base beside PEFT's on bitsandbytes' layers, each from one
start. Full fine-tuning is PyTorch's, for scale: with its AdamW, and with bitsandbytes', which keeps moments in 8 bits.
A shape's K is the hidden size, M the tokens of a step, R the rank.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks import llama, peers
from benchmarks.case import Case, Check, Claim, Provider

SHAPES = tuple({"M": 1024, "K": k, "R": 16} for k in (256, 512, 1024))
GPU_SHAPES = tuple({"M": 4096, "K": k, "R": 16} for k in (1024, 2048, 4096))

SEQUENCES = 2
LEARNING_RATE = 1e-3
STEPS_FOR_MEMORY = 2

# the check follows plain gradient descent: AdamW's first step is the gradient's sign, where rounding decides
CHECKED_STEPS = 3
CHECKED_LEARNING_RATE = 0.5
EIGHT_BIT = "bitsandbytes 8-bit AdamW"


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield LoRA, QLoRA and full fine-tuning of one hidden size K, M tokens a step and rank R."""
    import torch

    base = llama.llama(shape["K"], device)
    tokens = torch.randint(base.config.vocab_size, (SEQUENCES, shape["M"] // SEQUENCES), device=device)
    start = llama.start_of(base, shape["R"])
    for four_bit in (False, True):
        peer = "peft on bitsandbytes" if four_bit else "peft"
        arguments = (base, shape["R"], start, four_bit)
        builders = {"lora_core": partial(llama.ours, *arguments), peer: partial(llama.pefts, *arguments)}
        truth = losses(llama.spelt_out(llama.pefts(*arguments)).double(), tokens)
        note = "QLoRA, double quantised" if four_bit else "LoRA"
        claims = (Claim(against=peer, no_slower=True, no_larger=not four_bit),)
        yield _case(shape, builders, tokens, truth, note, claims, llama.BLOCK_SIZE if four_bit else None)
    yield _full(base, {k: v for k, v in shape.items() if k != "R"}, tokens, device)


def _full(base: Any, shape: dict[str, int], tokens: Any, device: str) -> Case:
    import torch

    def build() -> Any:
        return copy.deepcopy(base).train()

    truth = losses(copy.deepcopy(base).double(), tokens)
    after_one = _losses(build(), tokens, torch.optim.AdamW, LEARNING_RATE, 2)

    def check_eight_bit(name: str) -> Check:
        # the first step is still that of AdamW: the moments are rounded after it
        got = _losses(build(), tokens, _eight_bit(), LEARNING_RATE, 2)
        return llama.near(got, after_one, base.config, "a loss") if name == EIGHT_BIT else check(build(), tokens, truth)

    case = _case(shape, {"torch": build}, tokens, truth, "full fine-tuning")
    works, missing = peers.providers({}, {EIGHT_BIT: lambda: partial(_step, build(), tokens, _eight_bit())}, device)
    rivals = [
        Provider(name, step(), measure_memory=partial(_several_steps, build, tokens, _eight_bit()))
        for name, step in works.items()
    ]
    return dataclasses.replace(case, providers=[*case.providers, *rivals], check=check_eight_bit, missing=missing)


def _eight_bit() -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _case(
    shape: dict[str, int],
    builders: Mapping[str, Callable[[], Any]],
    tokens: Any,
    truth: list[float],
    note: str,
    claims: tuple[Claim, ...] = (),
    block_size: int | None = None,
) -> Case:
    providers = [
        Provider(name, _step(build(), tokens), measure_memory=partial(_several_steps, build, tokens))
        for name, build in builders.items()
    ]
    return Case(
        op="training_step",
        mode="fwdbwd",
        shape=shape,
        dtype="float32",
        block_size=block_size,
        providers=providers,
        check=lambda name: check(builders[name](), tokens, truth),
        claims=claims,
        note=f"{note}, Llama of 4 layers, AdamW",
    )


def _step(model: Any, tokens: Any, adamw: Any = None) -> Callable[[], None]:
    import torch

    optimizer = (adamw or torch.optim.AdamW)(_trainable(model), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def _several_steps(build: Callable[[], Any], tokens: Any, adamw: Any = None) -> None:
    """Build the model and train it past the point where AdamW has its states."""
    step = _step(build(), tokens, adamw)
    for _ in range(STEPS_FOR_MEMORY):
        step()


def losses(model: Any, tokens: Any) -> list[float]:
    """Return the losses of a few steps of gradient descent."""
    import torch

    return _losses(model, tokens, torch.optim.SGD, CHECKED_LEARNING_RATE, CHECKED_STEPS)


def _losses(model: Any, tokens: Any, kind: Any, learning_rate: float, steps: int) -> list[float]:
    import torch

    optimizer = kind(_trainable(model), lr=learning_rate)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        # transformers computes its loss in float32, whatever the model's dtype
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def _trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def check(model: Any, tokens: Any, truth: list[float]) -> Check:
    """Compare the losses of a few steps with those in float64; a scaling 1% off does not pass."""
    return llama.near(losses(model, tokens), truth, model.config, "a loss")
