"""The last exercise: right to the bit, and under a budget of machine instructions a weight, counted without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lora_core.errors import ConfigError
from lora_core.puzzles.compare import WrongAnswer, compare
from lora_core.puzzles.walls import DEVICE, blank, refuse_reads, walled
from lora_core.quant.codebook import codebook
from lora_core.quant.packing import pack

# SASS instructions a weight on sm_90; byte loads take 8 to 10, this library's own kernel 5 to 6
BUDGET = 7.0
ARCH = 90
BLOCK_SIZE = 64


def check_gate(kernel: Any, module: ModuleType) -> None:
    """Right, and within the budget."""
    words_a_program = getattr(module, "WORDS", None)
    if not isinstance(words_a_program, int) or not isinstance(getattr(module, "WARPS", None), int):
        raise WrongAnswer("the file has to say WORDS, words of a program, and WARPS, its warps: whole numbers")
    levels = codebook("nf4").levels.to(DEVICE)
    for words in (words_a_program, words_a_program + 24, 8):
        n = 8 * words
        codes = torch.randint(16, (n,), dtype=torch.uint8)
        packed = pack(codes, 0).view(-1).to(DEVICE).view(torch.int32)
        absmax, given = torch.rand(-(-n // BLOCK_SIZE), device=DEVICE) + 0.5, f"{words} words"
        w, untouched = blank(n, dtype=torch.bfloat16)
        grid = (-(-words // words_a_program),)
        kernel[grid](
            walled(packed), walled(absmax), walled(levels), w, words, BLOCK_SIZE=BLOCK_SIZE, WORDS=words_a_program
        )
        untouched(given)
        exact = levels[codes.to(DEVICE).long()] * absmax.repeat_interleave(BLOCK_SIZE)[:n]
        want = exact.bfloat16()
        turned = want.view(-1, 8).flip(1).flatten()
        cut_off = (exact.view(torch.int32) & -65536).view(torch.float32).bfloat16()
        in_pairs = want.view(-1, 2).flip(1).flatten()
        compare(w, want, 0, given, (
            (turned, "the eight weights of a word come out backwards: its lowest byte comes first"),
            (in_pairs, "your nibbles are swapped: in a byte, the first code is in the high half"),
            (cut_off, "you cut float32 off to bfloat16, as .to() does in the interpreter: round_to rounds"),
        ))  # fmt: skip
        refuse_reads(given)
    found = count(Path(str(module.__file__)))
    if found["loops"]:
        raise WrongAnswer(
            "right, but there is a loop in the compiled code, whose instructions would be counted once: let a program "
            "do all its WORDS in one tile"
        )
    if found["spilled"]:
        raise WrongAnswer(
            f"right, but {found['spilled']} bytes of registers spill to memory: fewer WORDS, or more WARPS"
        )
    if found["per_element"] > BUDGET:
        raise WrongAnswer(
            f"right, but {found['per_element']:.2f} instructions a weight on sm_{ARCH}; the budget is {BUDGET:g}. Your "
            f"global accesses: {found['accesses']}. A print or an assertion counts too"
        )


def count(file: Path) -> dict[str, Any]:
    """Return instructions a weight, accesses, loops and spilled bytes of the kernel in a file, compiled for sm_90.

    Raises:
        ConfigError: outside a checkout, whose benchmarks count the instructions.
        WrongAnswer: if it does not compile.
    """
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / "benchmarks" / "codegen.py").is_file():
        raise ConfigError("exercise 13 counts instructions with benchmarks/codegen.py: run it in a checkout")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "lora_core.puzzles.count", str(file), str(ARCH)],
        env=environment,
        capture_output=True,
        text=True,
        errors="backslashreplace",
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["no message"]
        raise WrongAnswer(f"right in the interpreter, but it does not compile for sm_{ARCH}: {last[0]}")
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found
