"""What the compiler makes of every kernel, without a GPU: in a process of its own, as the interpreter is on here."""

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import codegen
from benchmarks.codegen_table import README, SAMPLE

ROOT = Path(__file__).resolve().parent.parent

# kernels bound by memory: instructions for one element on sm_90 at most, where n is a multiple of 32
LEANEST = {"nf4_dequantize": 6.5, "nf4_columns": 6.5}
# streaming kernels, 16 bytes an access: nf4_dequantize makes 64 elements a thread in bfloat16 from 32 bytes of codes,
# nf4_columns 128 from 64, nf4_quantize 32 elements' codes, absmax_dequantize 16 scales (looking levels up one by one);
# absmax_quantize has 4 scales a thread, whose codes are 4 bytes; swiglu makes 8 elements from 8 of each operand,
# rms_norm 16 from 16 of each, rotary 8 pairs, whose cosines and sines come one by one for a thread and are handed on
WIDE = {
    "nf4_dequantize": {"LDG.128": 2, "STG.128": 8},
    "nf4_columns": {"LDG.128": 4, "STG.128": 16},
    "nf4_quantize": {"LDG.128": 4, "STG.128": 1},
    "absmax_dequantize": {"LDG.128": 1, "STG.128": 4},
    "absmax_quantize": {"LDG.128": 5, "STG.128": 1},
    "rms_norm": {"LDG.128": 4, "STG.128": 2},
    "rotary": {"LDG.128": 2, "STG.128": 2},
    "split_sum": {"LDG.128": 17, "STG.128": 1},
    "swiglu": {"LDG.128": 2, "STG.128": 1},
}
# results that must not depend on what the compiler fuses
UNFUSED = ("nf4_dequantize", "nf4_columns", "absmax_dequantize", "nf4_matmul")
# what other versions may keep in memory: Triton 3.6.0 keeps 2 registers of some configurations, 4 of four
OTHER_COMPILERS_STACK = 16
# of a program at most; what runs on compute capability 8.0, which has 163, has to run on 8.6 and 8.9
SHARED_KIB = {80: 99, 90: 227, 100: 227}
# a quotient decides the code
EXACT_QUOTIENTS = ("nf4_quantize", "absmax_quantize")


def compiled(arch: int, kernels: Iterable[str], variants: Iterable[str] = ()) -> list[dict]:
    """What python -m benchmarks.codegen prints of these kernels; of these configurations only, if any are named."""
    named = [("--kernel", kernel) for kernel in kernels] + [("--variant", variant) for variant in variants]
    command = [sys.executable, "-m", "benchmarks.codegen", "--arch", str(arch), *itertools.chain(*named)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@functools.cache
def sample(arch: int) -> dict[str, list[dict]]:
    """By kernel, what an architecture makes of the sample's first configuration; sm_90 of all of it."""
    asked = {kernel: names if arch == 90 else names[:1] for kernel, names in SAMPLE.items()}
    rows = {(row["kernel"], row["variant"]): row for row in compiled(arch, asked, itertools.chain(*asked.values()))}
    return {kernel: [rows[kernel, name] for name in names] for kernel, names in asked.items()}


@functools.cache
def most_stack() -> int:
    """Bytes of a thread's registers that may lie in memory: none by the compiler that the tables were made with."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = next(line for line in pins.splitlines() if line.startswith("triton==")).removeprefix("triton==")
    return 0 if version("triton") == pinned.split()[0] else OTHER_COMPILERS_STACK


def check(rows: list[dict]) -> None:
    for row in rows:
        said = f"{row['kernel']} {row['variant']} on sm_{row['arch']}: {row}"
        assert row["spill_bytes"] == 0 and row["stack_bytes"] <= most_stack(), said
        assert row["shared_bytes"] <= SHARED_KIB[row["arch"]] * 1024, said
        # a product with an operand in float32, x or A and B beside a half-precision x, is made of multiply-adds
        if row["kernel"] in UNFUSED and not (row["kernel"] == "nf4_matmul" and "fp32" in row["variant"].split()):
            assert row["ptx"]["fma.rn.f32"] == row["instructions"].get("FFMA", 0) == 0, said
        if row["tile_m"] and row["arch"] == 80:
            # large tiles are fed by asynchronous copies: what is loaded another way is the smaller part
            assert row["instructions"]["HMMA"], said
            assert row["tile_m"] < 64 or _loaded(row, "LDGSTS") > _loaded(row, "LDG"), said
        if row["tile_m"] and row["arch"] == 90:
            # HGMMA is wgmma, which takes 64 rows at least
            assert row["instructions"]["HGMMA" if row["tile_m"] >= 64 else "HMMA"], said
        if row["tile_m"] and row["arch"] == 100:
            # UTCHMMA is tcgen05, of 64 rows at least, too
            assert row["instructions"].get("UTCHMMA" if row["tile_m"] >= 64 else "HMMA"), said
        if row["kernel"] in LEANEST and row["arch"] == 90 and _is_lean(row["kernel"], row["variant"].split()):
            assert row["per_element"] <= LEANEST[row["kernel"]], said
        if row["kernel"] in EXACT_QUOTIENTS:
            assert row["ptx"]["div.rn.f32"] and not row["ptx"]["div.full.f32"] + row["ptx"]["div.approx.f32"], said


def _loaded(row: dict, instruction: str) -> int:
    """Return the bytes that the loads of this name load in a thread, but for indices, of 8 bytes each."""
    widths = ((name.split("."), count) for name, count in row["accesses"].items())
    return sum(int(bits.lstrip("US")) // 8 * n for (name, bits), n in widths if name == instruction and bits != "64")


def _is_lean(kernel: str, words: list[str]) -> bool:
    """Say whether a configuration reads by the word; of columns, whole blocks of 16 rows, and 2 bytes to write."""
    return "words" in words if kernel == "nf4_dequantize" else "blocks" in words and not {"fp32", "any"} & {*words}


def test_codegen_sample_names_every_kernel():
    assert set(SAMPLE) == set(codegen.kernel_names())


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize("kernel", SAMPLE)
def test_codegen_of_a_sample_is_sound(kernel, arch):
    check(sample(arch)[kernel])


@pytest.mark.codegen
@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize("kernel", SAMPLE)
def test_codegen_of_every_configuration_is_sound(kernel, arch):
    rows = compiled(arch, [kernel])
    assert len(rows) == len(codegen.variants_of(kernel))
    check(rows)


@pytest.mark.parametrize("kernel", WIDE)
def test_codegen_of_streaming_kernels_is_wide(kernel):
    row = sample(90)[kernel][0]
    for width, count in WIDE[kernel].items():
        assert row["accesses"].get(width) == count, row["accesses"]


def test_codegen_refuses_to_run_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--kernel", "absmax_dequantize"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "unset TRITON_INTERPRET" in run.stderr


def test_codegen_listing_holds_the_instructions_that_are_counted():
    kernel, variant = "nf4_dequantize", SAMPLE["nf4_dequantize"][0]
    row = sample(90)[kernel][0]
    command = [sys.executable, "-m", "benchmarks.codegen", "--listing", "--kernel", kernel, "--arch", "90"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [*command, "--variant", variant], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.count(" STG.E.128 ") == row["accesses"]["STG.128"]
    assert run.stdout.count(" LDG.E.128") == row["accesses"]["LDG.128"]


@pytest.mark.codegen
def test_codegen_table_in_the_readme_is_what_the_compiler_makes(tmp_path):
    """Written anew by the pinned compiler, the table is the committed one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.codegen_table", "--readme", str(copy)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert copy.read_text(encoding="utf-8") == README.read_text(encoding="utf-8")


def test_kernels_readme_names_every_kernel_file_operation_and_test():
    text = README.read_text(encoding="utf-8")
    for path in codegen.KERNELS.glob("*.py"):
        assert path.name in text
    for name in ("lora_linear", "nf4_lora_linear", "grouped_lora"):
        assert f"`{name}_backward`" in text
    for word in set(text.replace("|", " ").replace(",", " ").split()):
        if word.startswith("test_kernels"):
            assert (ROOT / "tests" / word).exists()
