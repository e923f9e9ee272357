"""A LoRA training step of a small Llama: forward, loss, backward, AdamW. This library beside PEFT, from one start.

A shape's K is the hidden size, M the tokens of a step, R the rank.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.case import Case, Check, Claim, Provider
from benchmarks.shapes import small_llama

SHAPES = ({"M": 1024, "K": 256, "R": 16}, {"M": 1024, "K": 512, "R": 16})

SEQUENCES = 2
ALPHA = 32
LEARNING_RATE = 1e-3
STEPS_FOR_MEMORY = 2

# the check follows plain gradient descent: AdamW's first step is the gradient's sign, where rounding decides
CHECKED_STEPS = 3
CHECKED_LEARNING_RATE = 0.5
UNIT_FP32 = 2.0**-24


def cases(shape: dict[str, int], device: str) -> Iterator[Case]:
    """Yield the comparison for one hidden size K, M tokens a step and rank R."""
    import torch

    torch.manual_seed(0)
    base = _llama(shape["K"], device)
    tokens = torch.randint(base.config.vocab_size, (SEQUENCES, shape["M"] // SEQUENCES), device=device)
    start = _start(with_peft(copy.deepcopy(base), shape["R"]))
    builders = {"lora_core": partial(_ours, base, shape["R"], start), "peft": partial(_peft, base, shape["R"], start)}
    truth = losses(_peft(base, shape["R"], start).double(), tokens)
    providers = [
        Provider(name, _step(build(), tokens), measure_memory=partial(_several_steps, build, tokens))
        for name, build in builders.items()
    ]
    yield Case(
        op="training_step",
        mode="fwdbwd",
        shape=shape,
        dtype="float32",
        block_size=None,
        providers=providers,
        check=lambda name: check(builders[name](), tokens, truth),
        claims=(Claim(against="peft", no_slower=True, no_larger=True),),
        note=f"Llama of {base.config.num_hidden_layers} layers, all-linear, AdamW",
    )


def _llama(hidden_size: int, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**small_llama(hidden_size), use_cache=False)).to(device)


def with_peft(model: Any, rank: int) -> Any:
    import warnings

    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # a FutureWarning of transformers' own
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def _start(model: Any) -> dict[str, tuple[Any, Any]]:
    """Return A and B for every adapted layer: A as PEFT draws it, B not zero, so that a wrong scaling shows at once."""
    import torch

    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            lora_a = module.lora_A["default"].weight.detach().clone()
            lora_b = torch.randn_like(module.lora_B["default"].weight) * lora_a.std()
            found[name] = (lora_a, lora_b)
    return found


def _ours(base: Any, rank: int, start: dict[str, tuple[Any, Any]]) -> Any:
    import torch

    import lora_core as lc

    model = copy.deepcopy(base)
    lc.add_adapter(model, lc.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear"))
    with torch.no_grad():
        for name, (lora_a, lora_b) in start.items():
            layer = model.get_submodule(name)
            layer.lora_a["default"].copy_(lora_a)
            layer.lora_b["default"].copy_(lora_b)
    return model.train()


def _peft(base: Any, rank: int, start: dict[str, tuple[Any, Any]]) -> Any:
    import torch

    model = with_peft(copy.deepcopy(base), rank)
    with torch.no_grad():
        for name, (lora_a, lora_b) in start.items():
            layer = model.get_base_model().get_submodule(name)
            layer.lora_A["default"].weight.copy_(lora_a)
            layer.lora_B["default"].weight.copy_(lora_b)
    return model.train()


def _step(model: Any, tokens: Any) -> Callable[[], None]:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def _several_steps(build: Callable[[], Any], tokens: Any) -> None:
    """Build the model and train it past the point where AdamW has its states."""
    step = _step(build(), tokens)
    for _ in range(STEPS_FOR_MEMORY):
        step()


def losses(model: Any, tokens: Any) -> list[float]:
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=CHECKED_LEARNING_RATE)
    found = []
    for _ in range(CHECKED_STEPS):
        optimizer.zero_grad()
        # transformers computes its loss in float32, whatever the model's dtype
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def check(model: Any, tokens: Any, truth: list[float]) -> Check:
    """Compare the losses of a few steps with those of PEFT's model in float64; a scaling 1% off does not pass.

    The bound is that of a sum as long as all products one token passes through, in fp32.
    """
    config = model.config
    products = config.num_hidden_layers * (6 * config.hidden_size + config.intermediate_size) + config.hidden_size
    errors = [abs(a - b) for a, b in zip(losses(model, tokens), truth, strict=True)]
    bound = 2 * UNIT_FP32 * products**0.5 * max(truth)
    worst = max(errors)
    rms = (sum(e * e for e in errors) / len(errors)) ** 0.5
    return Check(worst <= bound, worst, rms, f"a loss is {worst:.3g} off, want at most {bound:.3g}")
