"""The table of a run, for the terminal."""

from typing import TYPE_CHECKING

from lora_core.demo.results import MIB, Results, Row

if TYPE_CHECKING:
    from rich.console import Console

# steps shorter than this differ by less than a millisecond
SHORT_MS = 20
LOSSES = ("code before", "code after", "prose before", "prose after")
COLUMNS = ("method", "trainable", "weights (MiB)", "optimiser (MiB)", "step (ms)", *LOSSES)


def cells(row: Row) -> tuple[str, ...]:
    """One method's line, as the terminal and the page show it."""
    return (
        row.title,
        f"{row.trainable:,}",
        f"{row.weight_bytes / MIB:.1f}",
        f"{row.optimizer_bytes / MIB:.1f}",
        f"{row.step_ms:.{1 if row.step_ms < SHORT_MS else 0}f}",
        f"{row.before.code:.3f}",
        f"{row.after.code:.3f}",
        f"{row.before.prose:.3f}",
        f"{row.after.prose:.3f}",
    )


def agreement_lines(results: Results) -> list[str]:
    """What saving, reloading and merging did, in sentences."""
    found = results.agreement
    exact = found.reloaded_difference == 0
    change = "logits equal bit for bit" if exact else f"logits differ by up to {found.reloaded_difference:.1e}"
    return [
        f"Adapter saved and loaded into a fresh base: {change}.",
        f"Merged into the dequantised weights in float32: logits differ by up to {found.merged_difference:.1e}; "
        f"rms error against float64 is {found.merged_rounding:.1e} merged and {found.trained_rounding:.1e} unmerged.",
        "Merged back into NF4, the weights are rounded to 4 bits again, by up to "
        f"{100 * found.requantizing_error:.1f}% of a layer's norm: held-out code goes from {found.trained.code:.4f} to "
        f"{found.requantized.code:.4f} nats/byte.",
        "All three forms agree." if found.agrees else "THE THREE FORMS DO NOT AGREE.",
    ]


def print_results(results: Results, console: "Console") -> None:
    """Prints the table, the rates, the agreement and where the time went."""
    from lora_core.terminal import Column, print_table

    setting = results.setting
    title = f"Loss in nats per byte of held-out text; {setting['steps']} steps of {setting['tokens_per_step']:,} tokens"
    first, *others = COLUMNS
    columns = [Column(first, "prose"), *(Column(head, "number") for head in others)]
    print_table(console, columns, [cells(row) for row in results.rows], title)
    for row in results.rows:
        console.print(f"  {row.title}: {row.settings}", highlight=False, markup=False)
    for line in agreement_lines(results):
        console.print(line, highlight=False, markup=False)
    console.print(f"{results.seconds:.0f} s, {results.peak_memory}, {setting['device']}, seed {setting['seed']}")
