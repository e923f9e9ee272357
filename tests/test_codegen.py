"""What the compiler makes of every kernel, without a GPU: in a process of its own, as the interpreter is on here."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import codegen

ROOT = Path(__file__).resolve().parent.parent

# kernels bound by memory: instructions for one element on sm_90 at most
LEANEST = {"nf4_dequantize": 6.5}
# results that must not depend on what the compiler fuses
UNFUSED = ("nf4_dequantize", "absmax_dequantize", "nf4_matmul")
# a quotient decides the code
EXACT_QUOTIENTS = ("nf4_quantize", "absmax_quantize")
# a configuration of each kernel for the ordinary run; the marker codegen runs them all
SAMPLE = {
    "absmax_dequantize": ("blocks of 256",),
    "absmax_quantize": ("blocks of 256",),
    "dora_norm": ("bf16 bf16 rank 16 dense", "bf16 bf16 rank 64 words nested"),
    "grouped_lora": (
        "shrink bf16 bf16 rank 16 of 8 scaled added",
        "expand bf16 bf16 rank 16 of 64 scaled base",
        "gradient bf16 bf16 rank 64 of 8 scaled",
    ),
    "low_rank_matmul": (
        "bf16 bf16 128x128x64 rank 16 bias",
        "fp16 fp16 64x64x64 rank 64 transposed dropout",
        "bf16 fp32 128x128x64 rank 16 plain",
        "fp32 fp32 16x64x32 rank 16 added",
    ),
    "nf4_dequantize": ("bf16 64 nested words", "fp16 64 plain bytes", "fp32 4096 nested words"),
    "nf4_matmul": (
        "bf16 bf16 16 nested words forward",
        "bf16 bf16 64 nested words transposed dropout",
        "fp32 fp32 16 nested elements forward",
    ),
    "nf4_quantize": ("bf16 64 words", "fp32 4096 bytes"),
    "row_sum": ("bf16 bf16 rank 16 bias hidden split", "bf16 fp32 rank 16 transposed dropout"),
    "shrink": ("bf16 bf16 64x16 dropout", "fp16 fp16 16x64 split", "fp32 fp32 64x16"),
    "split_sum": ("bf16 added",),
}


@functools.cache
def compiled(kernel: str, arch: int, variants: tuple[str, ...] = ()) -> list[dict]:
    chosen = [part for name in variants for part in ("--variant", name)]
    command = [sys.executable, "-m", "benchmarks.codegen", "--kernel", kernel, "--arch", str(arch), *chosen]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        said = f"{row['kernel']} {row['variant']} on sm_{row['arch']}: {row}"
        assert row["spill_bytes"] == row["stack_bytes"] == 0, said
        assert row["shared_bytes"] <= {80: 163, 90: 227, 100: 227}[row["arch"]] * 1024, said
        # a product in float32 is made of multiply-adds
        if row["kernel"] in UNFUSED and not (row["kernel"] == "nf4_matmul" and row["tile_m"] == 0):
            assert row["ptx"]["fma.rn.f32"] == row["instructions"].get("FFMA", 0) == 0, said
        if row["tile_m"] and row["arch"] == 80:
            # large tiles are fed by asynchronous copies
            assert row["instructions"]["HMMA"] and (row["tile_m"] < 64 or row["instructions"]["LDGSTS"]), said
        if row["tile_m"] and row["arch"] == 90:
            # HGMMA is wgmma, which takes 64 rows at least
            assert row["instructions"]["HGMMA" if row["tile_m"] >= 64 else "HMMA"], said
        if row["kernel"] in EXACT_QUOTIENTS:
            assert row["ptx"]["div.rn.f32"] and not row["ptx"]["div.full.f32"] + row["ptx"]["div.approx.f32"], said


def test_codegen_sample_names_every_kernel():
    assert set(SAMPLE) == set(codegen.kernel_names())


@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize("kernel", SAMPLE)
def test_codegen_of_a_sample_is_sound(kernel, arch):
    # every architecture compiles the first of the sample; sm_90 all of it
    variants = SAMPLE[kernel] if arch == 90 else SAMPLE[kernel][:1]
    rows = compiled(kernel, arch, variants)
    assert len(rows) == len(variants)
    check(rows)


@pytest.mark.codegen
@pytest.mark.parametrize("arch", codegen.ARCHITECTURES)
@pytest.mark.parametrize("kernel", SAMPLE)
def test_codegen_of_every_configuration_is_sound(kernel, arch):
    rows = compiled(kernel, arch)
    assert len(rows) == len(codegen.variants_of(kernel))
    check(rows)


@pytest.mark.parametrize("kernel", LEANEST)
def test_codegen_of_streaming_kernels_is_lean_and_wide(kernel):
    row = next(r for r in compiled(kernel, 90, SAMPLE[kernel]) if r["variant"] == SAMPLE[kernel][0])
    assert row["per_element"] <= LEANEST[kernel]
    # 64 elements a thread in bfloat16 are 8 stores of 16 bytes, and nothing narrower is stored
    assert {k: v for k, v in row["accesses"].items() if k.startswith("ST")} == {"STG.128": 8}


def test_codegen_refuses_to_run_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--kernel", "absmax_dequantize"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "unset TRITON_INTERPRET" in run.stderr
