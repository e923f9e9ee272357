"""Training in random subspaces of growing dimension: `python docs/notebooks/records/intrinsic_dimension.py`.

The demo's base is adapted to source code along d random directions of all its parameters, and once along all of them;
for each d the best of some learning rates counts. The held-out losses go into intrinsic_dimension.jsonl. About ten
minutes on two cores; run again, it continues.
"""

import torch
from lines import Lines
from torch import nn

from lora_core.demo.base import Base, load_base
from lora_core.demo.data import loss_of, nats_per_byte, training_batch
from lora_core.demo.schedule import learning_rate_at
from lora_core.demo.text import Text, load_text
from lora_core.reference.subspace import Subspace

STEPS, BATCH, WINDOWS, SEED, WARMUP = 32, 8, 32, 0, 4
# Adam moves a coordinate by about the rate, and a coordinate of n parameters moves each by 1 / sqrt(n) of that: a rate
# that suits all D parameters is multiplied by sqrt(D / d), and by these
RATE, FACTORS = 1e-3, (1 / 3, 1.0, 3.0, 9.0)
DIMENSIONS = (10, 100, 1_000, 10_000, 100_000, 200_000, 500_000, 1_000_000)
BETAS = (0.9, 0.99)


def main() -> None:
    """Run what is not on record yet."""
    record = Lines("intrinsic_dimension", ("dimension", "rate"))
    base = load_base()
    text = load_text(base)
    count = sum(p.numel() for p in base.model().parameters())
    for dimension in (*DIMENSIONS, count):
        for factor in FACTORS:
            rate = float(f"{RATE * factor * (count / dimension) ** 0.5:.3g}")
            if not record.holds(dimension=dimension, rate=rate):
                before, after = train(base, text, dimension, rate)
                record.append(
                    dimension=dimension, rate=rate, before=before, after=after, parameters=count, steps=STEPS,
                    batch=BATCH, seed=SEED,
                )  # fmt: skip


def train(base: Base, text: Text, dimension: int, rate: float) -> tuple[float, float]:
    """Return the held-out loss before and after, in nats per byte."""
    model = base.model()
    parameters = list(model.parameters())
    space = Subspace(parameters, dimension, SEED)
    z = nn.Parameter(torch.zeros(dimension))
    optimizer = torch.optim.AdamW([z], betas=BETAS, weight_decay=0.0)
    context = base.config.context
    before = nats_per_byte(model, text.code_held_out, base.tokenizer, context, WINDOWS)
    for step in range(STEPS):
        inputs, targets = training_batch(text.code_train, BATCH, context, SEED, step)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, STEPS, rate, WARMUP)
        z.grad = space.gradient(torch.autograd.grad(loss_of(model, inputs, targets), parameters))
        nn.utils.clip_grad_norm_([z], 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, moved in zip(parameters, space.point(z.detach()), strict=True):
                parameter.copy_(moved)
    return before, nats_per_byte(model, text.code_held_out, base.tokenizer, context, WINDOWS)


if __name__ == "__main__":
    main()
