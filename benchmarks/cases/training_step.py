"""A training step of a small Llama: forward, loss, backward, AdamW. Full fine-tuning, LoRA and QLoRA.

This library's adapters, fused with what stands between the layers ("lora_core") and alone ("lora_core layers"), beside
PEFT's, and on an NF4 base beside PEFT's on bitsandbytes' layers, each from one start. "frozen base" is what no adapter
can be faster than by the same operations: forward, loss and the gradients that adapters are given, without one. Full
fine-tuning is PyTorch's, for scale: with its AdamW, and with bitsandbytes', which keeps moments in 8 bits. bfloat16 on
a GPU, float32 on a CPU. A shape's K is the hidden size, M the tokens of a step, R the rank.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from benchmarks import llama, peers
from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.peers import Peer

SHAPES = tuple({"M": 1024, "K": k, "R": 16} for k in (256, 512, 1024))
GPU_SHAPES = tuple({"M": 4096, "K": k, "R": 16} for k in (1024, 2048, 4096))
NEEDS = llama.NEEDS

SEQUENCES = 2
LEARNING_RATE = 1e-3
STEPS_FOR_MEMORY = 2
# on a CPU larger models are trained with adapters alone, and then by LoRA alone: a step takes seconds
LARGEST_WHOLE, LARGEST_FOUR_BIT = 256, 512

# the check follows plain gradient descent: AdamW's first step is the gradient's sign, where rounding decides
CHECKED_STEPS = 3
CHECKED_LEARNING_RATE = 0.5
EIGHT_BIT, FROZEN = "bitsandbytes 8-bit AdamW", "frozen base"


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield LoRA, QLoRA and full fine-tuning of one hidden size K, M tokens a step and rank R."""
    import torch

    base = llama.llama(shape["K"], device)
    tokens = torch.randint(base.config.vocab_size, (SEQUENCES, shape["M"] // SEQUENCES), device=device)
    start = llama.start_of(base, shape["R"])
    whole, four_bits = (device != "cpu" or shape["K"] <= most for most in (LARGEST_WHOLE, LARGEST_FOUR_BIT))
    for four_bit in (False, True) if four_bits else (False,):
        peer, needs = llama.peer_of(four_bit)
        rest = (shape["R"], start, four_bit)
        builders = {
            "lora_core": partial(_build, llama.ours_whole, rest),
            "lora_core layers": partial(_build, llama.ours, rest),
            peer: partial(_build, llama.pefts, rest),
        }
        note = "QLoRA, double quantised" if four_bit else "LoRA"
        works: dict[str, Work] = {
            name: Work(partial(build, base), tokens, needs if name == peer else ()) for name, build in builders.items()
        }
        check = checker(base, builders, tokens, llama.written(base, *rest))
        if not four_bit:
            works[FROZEN] = FrozenWork(partial(_copied, base), tokens)
            check = _also_frozen(check, base, tokens)
        yield dataclasses.replace(
            _case(shape, works, note, device),
            block_size=llama.BLOCK_SIZE if four_bit else None,
            check=check,
            claims=(Claim(against=peer, no_slower=True, no_larger=not four_bit),),
        )
    if whole:
        yield _full(base, {k: v for k, v in shape.items() if k != "R"}, tokens, device)


@dataclasses.dataclass(frozen=True)
class Work:
    """A model to train.

    Args:
        build: makes it.
        tokens: of every step.
        needs: packages it takes.
        optimizer: the class; by default PyTorch's AdamW.
    """

    build: Callable[[], Any]
    tokens: Any
    needs: tuple[str, ...] = ()
    optimizer: Callable[[], Any] | None = None

    def step(self) -> Callable[[], None]:
        """Return one step of a model of its own."""
        return _step(self.build(), self.tokens, self.optimizer and self.optimizer())

    def several_steps(self) -> Callable[[], None]:
        """Return what trains a model of its own past the point where AdamW has its states."""
        step = self.step()

        def run() -> None:
            for _ in range(STEPS_FOR_MEMORY):
                step()

        return run


class FrozenWork(Work):
    """A model that passes gradients on and trains nothing."""

    def step(self) -> Callable[[], None]:
        """Return one step of a model of its own."""
        model = self.build().requires_grad_(False)
        for _, layer in llama.adapted(model):
            layer.register_forward_hook(_as_adapted)
        return lambda: _loss(model, self.tokens).backward()


def _as_adapted(layer: Any, given: Any, output: Any) -> Any:
    """Ask for the gradient of an output as an adapter in the layer would; before the first of them there is none."""
    return output if output.requires_grad else output.requires_grad_()


def _loss(model: Any, tokens: Any) -> Any:
    return model(input_ids=tokens, labels=tokens).loss


def _also_frozen(check: Callable[[str], Check], base: Any, tokens: Any) -> Callable[[str], Check]:
    def compare(name: str) -> Check:
        if name != FROZEN:
            return check(name)
        got, truth = (float(_loss(m, tokens).detach()) for m in (_copied(base), _copied(base).double()))
        return (llama.near if llama.in_float32(base) else llama.near_bf16)([got], [truth], base.config, "the loss")

    return compare


def _build(make: Callable[..., Any], rest: tuple[Any, ...], base: Any) -> Any:
    return make(base, *rest)


def _copied(base: Any) -> Any:
    return copy.deepcopy(base).train()


def _full(base: Any, shape: dict[str, int], tokens: Any, device: str) -> Case:
    import torch

    wide = copy.deepcopy(base).float()
    after_one = _losses(_copied(wide), tokens, torch.optim.AdamW, LEARNING_RATE, 2)
    plain = checker(base, {"torch": _copied}, tokens, copy.deepcopy(base).double())

    def check(name: str) -> Check:
        if name != EIGHT_BIT:
            return plain(name)
        # the first step is still that of AdamW: the moments are rounded after it
        got = _losses(_copied(wide), tokens, _eight_bit(), LEARNING_RATE, 2)
        return llama.near(got, after_one, base.config, "a loss")

    build = partial(_copied, base)
    works = {"torch": Work(build, tokens), EIGHT_BIT: Work(build, tokens, ("bitsandbytes",), _eight_bit)}
    return dataclasses.replace(_case(shape, works, "full fine-tuning", device), check=check)


def _eight_bit() -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def _case(shape: dict[str, int], works: Mapping[str, Work], note: str, device: str) -> Case:
    """Return the comparison, still without a check."""
    steps, missing = peers.providers(
        {name: work.step() for name, work in works.items() if not work.needs},
        {name: Peer(work.needs, work.step) for name, work in works.items() if work.needs},
    )
    return Case(
        op="training_step",
        mode="fwdbwd",
        shape=shape,
        dtype=llama.dtype_of(device),
        block_size=None,
        providers=[Provider(n, step, measure_memory=works[n].several_steps) for n, step in steps.items()],
        check=_unchecked,
        note=f"{note}, Llama of 4 layers, AdamW",
        missing=missing,
    )


def _unchecked(name: str) -> Check:
    return Check(False, 0.0, 0.0, f"{name} was never checked")


def _step(model: Any, tokens: Any, adamw: Any = None) -> Callable[[], None]:
    import torch

    optimizer = (adamw or torch.optim.AdamW)(_trainable(model), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        _loss(model, tokens).backward()
        optimizer.step()

    return step


def losses(model: Any, tokens: Any) -> list[float]:
    """Return the losses of a few steps of gradient descent."""
    import torch

    return _losses(model, tokens, torch.optim.SGD, CHECKED_LEARNING_RATE, CHECKED_STEPS)


def _losses(model: Any, tokens: Any, kind: Any, learning_rate: float, steps: int) -> list[float]:
    import torch

    optimizer = kind(_trainable(model), lr=learning_rate)

    def forward() -> Any:
        # transformers computes its loss in float32, whatever the model's dtype
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())

    loss = forward()
    found = [float(loss.detach())]
    # what follows the last loss would not be seen
    for _ in range(steps - 1):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = forward()
        found.append(float(loss.detach()))
    return found


def _trainable(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def checker(
    base: Any, builders: Mapping[str, Callable[[Any], Any]], tokens: Any, true_model: Any
) -> Callable[[str], Check]:
    """Return what compares the losses of a few steps with those of a model in float64; a scaling 1% off does not pass.

    In bfloat16 it would: there the same model in float32 has to pass first, and the loss of the first step after it.

    Args:
        base: what the models are built on.
        builders: make each provider's model on a base.
        tokens: of every step.
        true_model: in float64; it is trained.
    """
    truth = losses(true_model, tokens)

    def check(name: str) -> Check:
        build, config = builders[name], base.config
        if llama.in_float32(base):
            return llama.near(losses(build(base), tokens), truth, config, "a loss")
        wide = llama.near(losses(build(copy.deepcopy(base).float()), tokens), truth, config, "in float32, a loss")
        first = losses(build(base), tokens)[:1]
        return llama.near_bf16(first, truth[:1], config, "the loss") if wide.passed else wide

    return check
