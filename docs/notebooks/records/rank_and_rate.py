"""LoRA of many ranks and rates, scaled by three rules: `python docs/notebooks/records/rank_and_rate.py`.

The demo's base is adapted to source code for a few steps with each; the held-out loss afterwards goes into
rank_and_rate.jsonl. About ten minutes on two cores; run again, it continues.
"""

from math import sqrt

import torch
from lines import Lines

from lora_core.demo.adaptation import Adaptation, Losses
from lora_core.demo.base import load_base
from lora_core.demo.settings import DemoSettings, Method
from lora_core.demo.text import load_text

STEPS, BATCH, WINDOWS, SEED = 24, 8, 32, 0
RANKS = (1, 4, 16, 64, 256)
RATES = tuple(1e-3 * 10 ** (i / 2) for i in range(5))
ALPHA = 8
# s by rank; the last is the advice to keep alpha at twice the rank
RULES = {"alpha / r": lambda r: ALPHA / r, "alpha / sqrt(r)": lambda r: ALPHA / sqrt(r), "2": lambda r: 2.0}


def main() -> None:
    """Run what is not on record yet."""
    record = Lines("rank_and_rate", ("rule", "rank", "rate"))
    base = load_base()
    text = load_text(base)
    settings = DemoSettings(seed=SEED, steps=STEPS, batch=BATCH, curve_windows=WINDOWS, curve_points=1)
    for rule, scale in RULES.items():
        for rank in RANKS:
            for rate in RATES:
                rate = float(f"{rate:.3g}")
                if record.holds(rule=rule, rank=rank, rate=rate):
                    continue
                method = Method("lora", "LoRA", rate, adapter=True, rank=rank, alpha=scale(rank) * rank)
                # the losses before are those of the base, and not asked for here
                run = Adaptation(base, method, text, settings, torch.device("cpu"), before=Losses(0.0, 0.0))
                for _ in range(STEPS):
                    run.step()
                (_, before), (_, after) = run.curve
                record.append(
                    rule=rule, rank=rank, rate=rate, scaling=scale(rank), before=before, after=after,
                    first=run.losses[0], last=run.losses[-1], steps=STEPS, batch=BATCH, seed=SEED,
                )  # fmt: skip


if __name__ == "__main__":
    main()
