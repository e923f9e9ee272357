"""Pre-trains the base on prose; makes base.safetensors, base.json and tokenizer.json."""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.demo.corpus import Corpus, load_corpus
from lora_core.demo.data import loss_of, nats_per_byte, seed_dropout, token_stream, training_batch
from lora_core.demo.files import write_atomically
from lora_core.demo.model import GPT, GPTConfig
from lora_core.demo.progress import progress_bars
from lora_core.demo.schedule import learning_rate_at
from lora_core.demo.tokenizer import Tokenizer, train_tokenizer
from lora_core.errors import CheckpointError

DEFAULT_STEPS = 6000
# all that pre-training writes
FILES = ("tokenizer.json", "base.safetensors", "base.json")
CHECKPOINT_SECONDS = 180.0


@dataclass(frozen=True)
class PretrainSettings:
    """How the base is made; with the corpus, this decides the result."""

    steps: int = DEFAULT_STEPS
    seed: int = 0
    batch: int = 16
    learning_rate: float = 1.5e-3
    warmup: int = 200
    weight_decay: float = 0.1
    threads: int = 2
    # bfloat16 matmuls are 1.6 times as fast on cores with AVX512_BF16 and slower on others; False runs in float32
    bfloat16: bool = True


def pretrain(
    output: Path, settings: PretrainSettings, config: GPTConfig, scratch: Path | None = None
) -> dict[str, object]:
    """Trains a GPT on the prose and writes it in half precision with a record of how it was made.

    Args:
        output: folder for base.safetensors, base.json and tokenizer.json.
        settings: steps, seed and rates.
        config: the shape of the model; the vocabulary is the tokenizer's size.
        scratch: a checkpoint file; where it exists the run goes on from it, with the same result.
    Returns:
        The record that base.json holds.
    """
    from safetensors.torch import save_file

    torch.set_num_threads(settings.threads)
    corpus = load_corpus()
    tokenizer = train_tokenizer(tokenizer_text(corpus), config.vocabulary)
    train = token_stream(corpus.prose.train, tokenizer)
    held_out = token_stream(corpus.prose.held_out, tokenizer)
    torch.manual_seed(settings.seed)
    model = GPT(config)
    untrained = nats_per_byte(model, held_out, tokenizer, config.context)
    started = time.perf_counter()
    _train(model, train, held_out, tokenizer, settings, scratch)
    minutes = (time.perf_counter() - started) / 60

    state = {name: tensor.to(torch.float16).contiguous() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    record: dict[str, object] = {
        "command": f"lora-core demo --pretrain --steps {settings.steps} --seed {settings.seed}",
        "steps": settings.steps,
        "seed": settings.seed,
        "batch_tokens": settings.batch * config.context,
        "learning_rate": settings.learning_rate,
        "warmup": settings.warmup,
        "weight_decay": settings.weight_decay,
        "threads": settings.threads,
        "precision": "bfloat16 autocast" if settings.bfloat16 else "float32",
        "minutes": round(minutes, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "config": config.as_dict(),
        "prose_sha256": corpus.prose.sha256,
        "code_sha256": corpus.code.sha256,
        "train_tokens": len(train),
        "untrained_nats_per_byte": untrained,
        "held_out_nats_per_byte": nats_per_byte(model, held_out, tokenizer, config.context),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_atomically(output / "tokenizer.json", tokenizer.save)
    metadata = {"format": "pt", "record": json.dumps(record)}
    write_atomically(output / "base.safetensors", lambda path: save_file(state, path, metadata=metadata))
    write_atomically(output / "base.json", lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
    return record


def tokenizer_text(corpus: Corpus) -> list[str]:
    """The training prose and as much training code, so that a token spells about as many bytes of either."""
    budget = sum(map(len, corpus.prose.train))
    text = list(corpus.prose.train)
    for document in corpus.code.train:
        if budget <= 0:
            break
        text.append(document)
        budget -= len(document)
    return text


def _train(
    model: GPT, train: Tensor, held_out: Tensor, tokenizer: Tokenizer, settings: PretrainSettings, scratch: Path | None
) -> None:
    """AdamW with a cosine schedule; matrices decay, norms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True)
    first = _resume(model, optimizer, scratch) if scratch is not None and scratch.exists() else 0
    context, saved_at, smooth = model.config.context, time.perf_counter(), 0.0
    model.train()
    with progress_bars() as progress:
        bar = progress.add_task("pre-training", total=settings.steps, completed=first, note="")
        for step in range(first, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, settings.steps, settings.learning_rate, settings.warmup)
            seed_dropout(settings.seed, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
                loss = loss_of(model, *training_batch(train, settings.batch, context, settings.seed, step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            smooth = loss.item() if step == first else 0.98 * smooth + 0.02 * loss.item()
            progress.update(bar, advance=1, note=f"{smooth:.3f} nats/token")
            if scratch is not None and time.perf_counter() - saved_at > CHECKPOINT_SECONDS:
                _checkpoint(model, optimizer, scratch, step + 1)
                held = nats_per_byte(model, held_out, tokenizer, context, limit=64)
                progress.console.print(f"step {step + 1}: {smooth:.3f} nats/token, held out {held:.4f} nats/byte")
                saved_at = time.perf_counter()


def _checkpoint(model: GPT, optimizer: torch.optim.Optimizer, path: Path, step: int) -> None:
    """Parameters and the optimiser's moments: batches and dropout follow from the seed and the step."""
    from safetensors.torch import save_file

    tensors = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"{name}/{key}"] = optimizer.state[parameter][key]
    write_atomically(path, lambda temporary: save_file(tensors, temporary))


def _resume(model: GPT, optimizer: torch.optim.Optimizer, path: Path) -> int:
    """Loads a checkpoint and returns the step to go on with."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(tensors[name])
            state = {key: tensors[f"{name}/{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter].update(state)
        return int(tensors["step"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no checkpoint of this pre-training ({type(error).__name__}: {error}); remove it to start anew"
        ) from error
