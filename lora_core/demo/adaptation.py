"""Adapts the base to source code by one method, and measures it."""

import statistics
import time
from collections.abc import Iterable
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


class Adaptation:
    """One method's training, a step at a time: the methods take turns, so that what else the machine does slows all.

    Args:
        base: where to start.
        method: what to train, and how fast.
        text: what to train and measure on; the batches are the same for every method.
        settings: seed and sizes.
        device: where to run.
        before: the losses at the start, if they are known.
    """

    def __init__(
        self,
        base: Base,
        method: Method,
        text: Text,
        settings: DemoSettings,
        device: torch.device,
        before: Losses | None = None,
    ) -> None:
        self.base, self.method, self.text, self.settings, self.device = base, method, text, settings, device
        self.model = build(base, method, settings.seed, device)
        self.before = before or measure(self.model, text, base, settings)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=BETAS, weight_decay=0.0, fused=True)
        self.losses: list[float] = []
        self.times: list[float] = []
        self.curve = [(0, self._held_out())]

    def step(self) -> float:
        """Takes the next step and returns its loss in nats per token."""
        step, settings = len(self.losses), self.settings
        inputs, targets = training_batch(
            self.text.code_train, settings.batch, self.base.config.context, settings.seed, step
        )
        self.model.train()
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings.steps, self.method.learning_rate, WARMUP)
        loss = loss_of(self.model, inputs.to(self.device), targets.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - started)
        if (step + 1) % max(1, settings.steps // settings.curve_points) == 0:
            self.curve.append((step + 1, self._held_out()))
        return self.losses[-1]

    def finish(self) -> Adapted:
        """What was trained, and every figure of it."""
        return Adapted(
            method=self.method,
            model=self.model,
            trainable=count_parameters(self.model)[0],
            weight_bytes=held_bytes([*self.model.parameters(), *self.model.buffers()]),
            optimizer_bytes=held_bytes(value for state in self.optimizer.state.values() for value in state.values()),
            step_ms=1000 * statistics.median(self.times[UNTIMED_STEPS:] or self.times),
            before=self.before,
            after=measure(self.model, self.text, self.base, self.settings),
            train_curve=self.losses,
            held_out_curve=self.curve,
        )

    def _held_out(self) -> float:
        """A point of the held-out curve."""
        windows, context = self.settings.curve_windows, self.base.config.context
        return nats_per_byte(self.model, self.text.code_held_out, self.base.tokenizer, context, windows)


def measure(model: nn.Module, text: Text, base: Base, settings: DemoSettings) -> Losses:
    """Losses on windows spread evenly over the held-out text of both domains."""
    streams = (text.code_held_out, text.prose_held_out)
    limit, context = settings.table_windows, base.config.context
    return Losses(*(nats_per_byte(model, stream, base.tokenizer, context, limit) for stream in streams))


def held_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the distinct tensors."""
    distinct = {tensor.data_ptr(): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())
