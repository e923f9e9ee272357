"""`lora-core demo`: one small GPT on real text, adapted four ways."""

from pathlib import Path
from typing import Annotated

import typer

from lora_core.terminal import INTERRUPTED, printable


def demo(
    output: Annotated[str, typer.Option(help="Folder for the table, charts, page and adapter.")] = "demo-output",
    seed: Annotated[int, typer.Option(help="Same seed and device, same numbers; timings aside.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    steps: Annotated[int | None, typer.Option(help="Training steps of each method, or of --pretrain.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps: shows that all parts work.")] = False,
    base: Annotated[Path | None, typer.Option(help="Folder of a base made by --pretrain.")] = None,
    pretrain: Annotated[bool, typer.Option("--pretrain", help="Make the base instead: about half an hour.")] = False,
) -> None:
    """Adapt a small GPT to Python source code: full fine-tuning, LoRA, rsLoRA and QLoRA, measured side by side."""
    if not output:
        from lora_core.errors import ConfigError

        raise ConfigError("--output is empty; want a folder, . for this one")
    try:
        if pretrain:
            _refuse_beside_pretrain(device, quick, base)
            _pretrain(Path(output), seed, steps)
        else:
            _demo(Path(output), seed, device, steps, quick, base)
    except KeyboardInterrupt:
        typer.echo(
            f"lora-core: interrupted; every file in {output} is whole, from this run or an earlier one", err=True
        )
        raise typer.Exit(INTERRUPTED) from None


def _demo(output: Path, seed: int, device: str, steps: int | None, quick: bool, base: Path | None) -> None:
    import dataclasses

    from rich.console import Console

    from lora_core.demo.run import run_demo
    from lora_core.demo.settings import SHIPPED, DemoSettings, choose_device
    from lora_core.demo.table import print_results

    settings = DemoSettings.quick(seed) if quick else DemoSettings(seed)
    settings = dataclasses.replace(settings, base=base or SHIPPED, steps=settings.steps if steps is None else steps)
    results = run_demo(output, settings, choose_device(device))
    console = Console()
    # a pipe or a file has no width of its own
    wide = console if console.is_terminal else Console(width=130)
    print_results(results, wide)
    page = printable(str((output / "index.html").resolve()))
    wide.print(f"Page: {page}", soft_wrap=True, highlight=False, markup=False)
    if not results.agreement.agrees:
        raise typer.Exit(1)


def _refuse_beside_pretrain(device: str, quick: bool, base: Path | None) -> None:
    from lora_core.errors import ConfigError

    for given, why in (
        (device not in ("auto", "cpu"), f"--device {device}: pre-training runs on the CPU"),
        (quick, "--quick: give fewer --steps"),
        (base is not None, f"--base {base}: pre-training makes a base, in --output"),
    ):
        if given:
            raise ConfigError(f"--pretrain does not go with {why}; leave one of the two out")


def _pretrain(output: Path, seed: int, steps: int | None) -> None:
    from lora_core.demo.model import GPTConfig
    from lora_core.demo.pretrain import DEFAULT_STEPS, FILES, PretrainSettings, pretrain
    from lora_core.demo.settings import check_output, check_seed, check_steps

    steps = DEFAULT_STEPS if steps is None else steps
    check_seed(seed)
    check_steps(steps)
    scratch = output / f"unfinished-{steps}-{seed}.safetensors"
    check_output(output, (*FILES, scratch.name))
    record = pretrain(output, PretrainSettings(steps=steps, seed=seed), GPTConfig(), scratch)
    scratch.unlink(missing_ok=True)
    typer.echo(f"{record['held_out_nats_per_byte']:.4f} nats/byte on held-out prose; the base is in {output}")
