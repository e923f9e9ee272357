"""Adapts the base to source code by one method, and measures it."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lora_core.adapt.count import count_parameters
from lora_core.adapt.inject import add_adapter
from lora_core.demo.base import Base
from lora_core.demo.data import loss_of, nats_per_byte, training_batch
from lora_core.demo.schedule import learning_rate_at
from lora_core.demo.settings import DemoSettings, Method
from lora_core.demo.text import Text
from lora_core.methods.lora import LoraConfig

WARMUP = 10
# no weight decay: adapters start at zero and the run is short
BETAS = (0.9, 0.99)
# the first steps allocate memory and warm the caches
UNTIMED_STEPS = 3


@dataclass(frozen=True)
class Losses:
    """Nats per byte of held-out text."""

    code: float
    prose: float


@dataclass
class Adapted:
    """A trained model and what was measured while training it."""

    method: Method
    model: nn.Module
    trainable: int
    parameters: int
    weight_bytes: int
    optimizer_bytes: int
    step_ms: float
    before: Losses
    after: Losses
    train_curve: list[float]
    held_out_curve: list[tuple[int, float]]


def build(base: Base, method: Method, seed: int, device: torch.device) -> nn.Module:
    """The base made ready for a method; the same seed starts every adapter with the same numbers."""
    model = (base.quantized() if method.quantized else base.model()).to(device)
    torch.manual_seed(seed)
    return add_adapter(model, lora_config(method)) if method.adapter else model


def lora_config(method: Method) -> LoraConfig:
    """The method's configuration of the adapter."""
    return LoraConfig(r=method.rank, lora_alpha=method.alpha, target_modules="all-linear", use_rslora=method.rslora)


def adapt(
    base: Base,
    method: Method,
    text: Text,
    settings: DemoSettings,
    device: torch.device,
    before: Losses | None = None,
    advance: Callable[[float], None] = lambda loss: None,
) -> Adapted:
    """Trains by one method on batches that are the same for every method.

    Args:
        base: where to start.
        method: what to train, and how fast.
        text: what to train and measure on.
        settings: seed and sizes.
        device: where to run.
        before: the losses at the start, if they are known.
        advance: called after each step with its loss.
    """
    model = build(base, method, settings.seed, device)
    before = before or measure(model, text, base, settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=BETAS, weight_decay=0.0, fused=True)
    context = base.config.context
    every = max(1, settings.steps // settings.curve_points)

    def held_out() -> float:
        return nats_per_byte(model, text.code_held_out, base.tokenizer, context, settings.curve_windows)

    losses: list[float] = []
    times: list[float] = []
    curve = [(0, held_out())]
    model.train()
    for step in range(settings.steps):
        inputs, targets = training_batch(text.code_train, settings.batch, context, settings.seed, step)
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings.steps, method.learning_rate, WARMUP)
        loss = loss_of(model, inputs.to(device), targets.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if (step + 1) % every == 0:
            curve.append((step + 1, held_out()))
        advance(losses[-1])
    trainable, total = count_parameters(model)
    return Adapted(
        method=method,
        model=model,
        trainable=trainable,
        parameters=total,
        weight_bytes=held_bytes([*model.parameters(), *model.buffers()]),
        optimizer_bytes=held_bytes(value for state in optimizer.state.values() for value in state.values()),
        step_ms=1000 * statistics.median(times[UNTIMED_STEPS:] or times),
        before=before,
        after=measure(model, text, base, settings),
        train_curve=losses,
        held_out_curve=curve,
    )


def measure(model: nn.Module, text: Text, base: Base, settings: DemoSettings) -> Losses:
    """Losses on windows spread evenly over the held-out text of both domains."""
    streams = (text.code_held_out, text.prose_held_out)
    limit, context = settings.table_windows, base.config.context
    return Losses(*(nats_per_byte(model, stream, base.tokenizer, context, limit) for stream in streams))


def held_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the distinct tensors."""
    distinct = {tensor.data_ptr(): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
