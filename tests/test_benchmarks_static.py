"""The suite without a GPU: occupancy, work and predictions from the compiled kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import codegen, device, machine_code, predict, run, static, work
from benchmarks.codegen_table import SAMPLE
from benchmarks.markers import begin, replaced

ROOT = Path(__file__).resolve().parent.parent
# without the setting by which the other tests have kernels interpreted
COMPILED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
N, K = 4096, 14336


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "share"),
    [
        # 32 registers a thread fill all 64 warps; 128 a quarter of them
        (32, 0, 4, 1.0),
        (128, 0, 4, 0.25),
        # 168 registers are 5,376 a warp: 3 warps in each partition
        (168, 0, 4, 12 / 64),
        # 40 are 1,280 a warp: 12 in each partition's 16,384, though 51 in all registers together
        (40, 1024, 2, 48 / 64),
        # 48 are 1,536: 10
        (48, 1024, 2, 40 / 64),
        # 113 KiB a program: two of them with what the system takes
        (32, 112 * 1024, 4, 8 / 64),
        # 22,316 bytes and the system's 1,024 are given as 23,424: nine of them, though ten of 23,340 were there
        (32, 22316, 4, 36 / 64),
        # programs of one warp: at most 32
        (16, 0, 1, 0.5),
    ],
)
def test_occupancy_is_what_the_registers_and_memory_allow(registers, shared, warps, share):
    assert device.occupancy(registers, shared, warps) == share


def listing(*instructions: str) -> str:
    """Instructions as nvdisasm writes them, from an address that is not 0."""
    return "\n".join(f"        /*{0x100 + 16 * i:04x}*/   {text} ;" for i, text in enumerate(instructions))


@pytest.mark.parametrize(
    ("instructions", "least"),
    [
        (("MOV R1, R2", "EXIT", "BRA 0x120"), 2),
        # a slow path that is branched around, and what it calls behind the last EXIT
        (("@!P0 BRA 0x130", "MOV R4, 0x120", "CALL.REL.NOINC 0x150", "BSYNC B0", "EXIT", "FADD R1, R1, R1"), 3),
        # the way that branches is the longer one
        (("@P0 BRA 0x130", "MOV R1, R2", "EXIT", "MOV R1, R2", "MOV R1, R2", "EXIT"), 3),
        # a loop, passed once; a branch without a guard; one whose predicate is an operand
        (("MOV R1, R2", "@P1 BRA 0x100", "EXIT"), 3),
        (("BRA 0x130", "NOP", "NOP", "EXIT"), 2),
        (("BRA.U UP0, 0x120", "EXIT", "NOP", "EXIT"), 2),
        # a warp that has nothing to store ends early
        (("MOV R1, R2", "@P0 EXIT", "STG.E.128 desc[UR6][R2.64], R4", "EXIT"), 2),
    ],
)
def test_fewest_instructions_are_those_of_the_shortest_way(instructions, least):
    assert machine_code.fewest(listing(*instructions)) == least


@pytest.mark.parametrize(
    ("instructions", "told"),
    [
        (("BRA 0x100",), "no way leads to an EXIT"),
        (("BRX R2 -0x50", "EXIT"), "BRX R2 -0x50 at 0x100"),
        (("BRA 0x900", "EXIT"), "0x900"),
        ((), "no instruction"),
    ],
)
def test_fewest_instructions_of_a_listing_without_an_end_are_refused(instructions, told):
    with pytest.raises(ValueError, match=told):
        machine_code.fewest(listing(*instructions))


def configuration(kernel: str, name: str):
    return next(variant for variant in codegen.variants_of(kernel) if variant.name == name)


def of(kernel: str, name: str, **sizes: int) -> work.Work:
    return work.WORK[kernel](configuration(kernel, name), {"N": N, "K": K, **sizes})


def test_work_of_codes_is_codes_scales_and_weights():
    assert of("nf4_dequantize", "bf16 64 nested words") == work.Work(
        N * K / 2 + N * K / 64 * (1 + 4 / 256) + 2 * N * K, elements=N * K
    )
    assert of("nf4_quantize", "fp32 4096 bytes").moved == 4 * N * K + N * K / 2 + N * K / 4096 * 4
    # words have scales of their own in blocks of 32
    assert of("nf4_columns", "fp16 nested words").moved == 2 * N * K + N * K / 2 + N * K / 32 * (1 + 4 / 256)
    assert of("nf4_columns", "fp32 plain elements").moved == 4 * N * K + N * K / 2 + N * K / 64 * 4
    scales = N * K // 64
    assert of("absmax_quantize", "blocks of 256") == work.Work(scales * (4 + 1 + 4 / 256), elements=scales)


def test_work_of_a_product_is_operands_result_and_multiply_adds():
    m, r = 4096, 16
    dense = of("low_rank_matmul", "bf16 bf16 128x128x64 rank 16", M=m, R=r)
    assert dense.moved == 2 * (m * K + N * K + m * N + m * r + N * r)
    assert dense.operations == 2 * m * N * (K + r) and dense.single == 0
    # float32 A and B beside a half-precision W are no work for tensor cores
    mixed = of("low_rank_matmul", "bf16 fp32 128x128x64 rank 16", M=m, R=r)
    assert mixed.moved == dense.moved + 2 * (m * r + N * r)
    assert mixed.operations == 2 * m * N * K and mixed.single == m * N * r
    # dL/dx = dL/dy W + dS A
    back = of("low_rank_matmul", "fp16 fp16 64x64x64 rank 32 transposed", M=64, R=32)
    assert back.moved == 2 * (64 * N + N * K + 64 * K + 64 * 32 + 32 * K) and back.operations == 128 * K * (N + 32)
    # y is read where it is added to
    added = of("low_rank_matmul", "fp32 fp32 16x64x32 rank 16 added", M=1, R=16)
    assert added.moved == 4 * (K + N * K + 2 * N + 16 + N * 16) and added.operations == 0
    decoded = of("nf4_matmul", "bf16 bf16 16 nested words forward", M=1, R=16)
    assert decoded.moved == N * K / 2 + N * K / 32 * (1 + 4 / 256) + 2 * (K + N + 16 + N * 16)


def test_work_of_the_way_down_is_x_and_its_matrix_once():
    m, r = 4096, 16
    down = of("shrink", "bf16 bf16 64x16 dropout", M=m, R=r)
    assert down == work.Work(2 * (m * K + r * K + m * r), (("bf16", m * K * r),))
    assert of("shrink", "fp32 fp32 64x16", M=m, R=r).single == m * K * r
    # dL/dS from dL/dy, a part of it in float32
    back = of("shrink", "bf16 bf16 64x16 transposed split", M=m, R=r)
    assert back.moved == 2 * (m * N + r * N) + 4 * m * r and back.operations == 2 * m * N * r


def test_work_of_a_sum_over_rows_is_one_read_of_them():
    m, r = 4096, 16
    assert of("row_sum", "bf16 fp32 rank 16 transposed dropout", M=m, R=r) == work.Work(
        2 * m * K + 4 * (m * r + K * r), (("fp32", m * K * r),)
    )
    # both gradients from one read of dL/dy: parts of dS, one for each 128 columns
    both = of("row_sum", "bf16 bf16 rank 16 bias hidden split", M=m, R=r)
    assert both.moved == 2 * (m * N + m * r + N * r) + 4 * N * r + 4 * m * r * N // 128
    assert both.operations == 2 * 2 * m * N * r


def test_work_of_many_adapters_reads_each():
    m, g, r = 64, 64, 16
    up = of("gather_expand", "bf16 bf16 scaled base transposed", M=m, R=r, G=g)
    assert up == work.Work(2 * (2 * m * N + m * r + g * r * N), (("bf16", m * N * r),))
    down = of("gather_shrink", "bf16 bf16 rank 16 scaled transposed", M=m, R=r, G=g)
    assert down.moved == 2 * (m * N + m * r + g * r * N)
    # the gradient of A from x, in half precision under float32
    gradient = of("gather_gradient", "fp16 fp32 rank 16 loose", M=m, R=r, G=g)
    assert gradient.moved == 2 * m * K + 4 * (m * r + g * r * K) and gradient.single == m * K * r


def test_work_of_norms_is_a_weight_and_its_adapter():
    dense = of("dora_norm", "bf16 bf16 rank 16 dense", R=16)
    assert dense.moved == 2 * (N * K + 16 * (N + K)) + 4 * N
    assert dense.operations == 2 * N * K * 16 and dense.single == N * K
    packed = of("dora_norm", "bf16 bf16 rank 64 words nested", R=64)
    assert packed.moved == N * K / 2 + N * K / 32 * (1 + 4 / 256) + 2 * 64 * (N + K) + 4 * N


def test_work_of_a_gate_is_its_operands_and_results_once():
    assert of("swiglu", "bf16", M=4096) == work.Work(2 * 3 * 4096 * K, elements=4096 * K)
    assert of("swiglu", "fp32 backward odd", M=4096) == work.Work(4 * 5 * 4096 * K, elements=4096 * K)


def test_work_of_a_rotation_is_heads_twice_and_angles_once():
    assert of("rotary", "bf16 64 backward", M=4096) == work.Work(2 * 4096 * (2 * N + 2 * 128))
    assert of("rotary", "fp32 32 loose", M=4096).moved == 4 * 4096 * (2 * N + 2 * 64)


def test_work_of_normalised_rows_is_each_once():
    assert of("rms_norm", "bf16 4096", M=4096) == work.Work(2 * (2 * 4096 * N + N) + 4 * 4096)
    back = of("rms_norm", "bf16 4096 backward weight", M=4096)
    assert back.moved == 2 * (3 * 4096 * N + N) + 4 * (4096 + N)


def test_work_has_sizes_of_every_sampled_configuration_but_of_split_sum():
    for kernel, names in SAMPLE.items():
        for name in names:
            variant = configuration(kernel, name)
            found = work.shapes_of(kernel, variant)
            assert len(found) == (0 if kernel == "split_sum" else 3), name
            for shape in found:
                assert work.WORK[kernel](variant, shape).moved > 0 and shape.get("R") == variant.constants.get(
                    "BLOCK_R"
                )
    # one token has tiles of 16 rows, and a dense weight of many those of 128
    tokens = {
        name: work.shapes_of(kernel, configuration(kernel, name))[0]["M"]
        for kernel in ("low_rank_matmul", "nf4_matmul", "shrink")
        for name in SAMPLE[kernel]
    }
    assert tokens["fp32 fp32 16x64x32 rank 16 added"] == tokens["bf16 bf16 16 nested words forward"] == 1
    assert tokens["fp16 fp16 64x64x64 rank 32 transposed"] == tokens["bf16 bf16 64 nested words transposed"] == 64
    assert tokens["bf16 bf16 128x128x64 rank 16"] == tokens["fp32 fp32 64x16"] == 4096


def predicted(kernel: str, name: str, per_element: float | None = None, **sizes: int) -> predict.Prediction:
    counts = SimpleNamespace(kernel=kernel, variant=name, registers=40, stack_bytes=0, spill_bytes=0, shared_bytes=1024)
    return predict.prediction(counts, configuration(kernel, name), per_element, {"N": N, "K": K, **sizes})


def test_least_time_is_the_largest_of_three():
    # 2 x 4096 x 4096 x 14352 operations at 790e12 in a second
    many = predicted("low_rank_matmul", "bf16 bf16 128x128x64 rank 16", M=4096, R=16)
    assert many.binds == "products" and many.least_us == many.products_us == pytest.approx(609.6, abs=0.05)
    # 4 x 4096 x 14336 bytes and some at 4.3e12
    one = predicted("low_rank_matmul", "fp32 fp32 16x64x32 rank 16 added", M=1, R=16)
    assert one.binds == "memory" and one.least_us == one.memory_us == pytest.approx(54.7, abs=0.05)
    # 36 instructions of 4096 x 14336 elements, by 132 x 128 lanes 1.98e9 times in a second
    counted = predicted("nf4_quantize", "bf16 64 words", per_element=36.0)
    assert counted.binds == "instructions" and counted.least_us == counted.issue_us == pytest.approx(63.2, abs=0.05)
    # 4096 x 14336 x 16 multiply-adds of float32, an instruction each
    single = predicted("row_sum", "bf16 fp32 rank 16 transposed dropout", M=4096, R=16)
    assert single.binds == "instructions" and single.least_us == pytest.approx(28.1, abs=0.05)


def test_prediction_without_known_work_has_no_time():
    counts = SimpleNamespace(
        kernel="split_sum", variant="bf16 added", registers=34, stack_bytes=0, spill_bytes=0, shared_bytes=0
    )
    p = predict.prediction(counts, configuration("split_sum", "bf16 added"), None, None)
    assert p.least_us is p.memory_us is p.binds is None
    assert static.table([p]).splitlines()[-1] == "| split_sum | bf16 added | 34 | 0 | 75% |  |  |  |  |  |"


def test_static_suite_writes_predictions_into_the_folder_asked_for_and_says_what_they_are(tmp_path):
    before = static.PERFORMANCE.read_bytes()
    command = [sys.executable, "-m", "benchmarks.static", "--results", str(tmp_path / "new")]
    for kernel in ("absmax_dequantize", "nf4_quantize"):
        command += ["--kernel", kernel]
    done = subprocess.run(command, cwd=ROOT, env=COMPILED, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing here was measured" in done.stdout and done.stdout.count("| absmax_dequantize |") == 1
    rows = [json.loads(line) for line in (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()]
    assert [row["kernel"] for row in rows] == ["absmax_dequantize"] * 3 + ["nf4_quantize"] * 6
    assert static.PERFORMANCE.read_bytes() == before
    # of 1,415 instructions by 128 threads for 4,096 elements, 32 slow paths of a quotient and what they call are no
    # part of the least
    per_element = next(row["per_element"] for row in rows if row["variant"] == "bf16 64 words")
    assert 30 < per_element < 1415 * 128 / 4096 - (32 * 4 + 100) * 128 / 4096


def predicting(monkeypatch, folder: Path) -> Path:
    """Have static.main predict one row of a kernel each, into a folder that stands for the committed one."""
    page = folder / "page.md"
    page.write_text(f"{begin(static.COMMAND)}\n<!-- end -->\n")
    counts = SimpleNamespace(variant="", registers=40, stack_bytes=0, spill_bytes=0, shared_bytes=0)
    variant = SimpleNamespace(options={"num_warps": 4})
    monkeypatch.setattr(static, "PERFORMANCE", page)
    monkeypatch.setattr(static, "RESULTS", folder)
    monkeypatch.setattr(static, "COMMITTED", folder / "static")
    monkeypatch.setattr(static, "interpreted", lambda variants: False)
    monkeypatch.setattr(
        static,
        "predict",
        lambda kernel: [predict.prediction(SimpleNamespace(**vars(counts) | {"kernel": kernel}), variant, None, None)],
    )
    return page


def test_static_suite_rewrites_the_documentation_for_the_committed_folder_alone(tmp_path, monkeypatch, capsys):
    page = predicting(monkeypatch, tmp_path)
    committed, other = tmp_path / "static", tmp_path / "other"
    before = page.read_text()
    assert static.main(["--results", str(other)], "it") == 0
    assert len((other / "predictions.jsonl").read_text().splitlines()) == len(static.kernel_names())
    # a part of the kernels would leave the rest out
    for folder in (committed, tmp_path):
        assert static.main(["--kernel", "shrink", "--results", str(folder)], "it") == 0
    assert static.main(["--kernel", "shrink"], "it") == 0
    assert capsys.readouterr().err.count("it: not all kernels") == 3
    assert page.read_text() == before and not committed.exists() and not (tmp_path / "predictions.jsonl").exists()
    for folder in (committed, tmp_path):
        assert static.main(["--results", str(folder)], "it") == 0
        assert page.read_text() != before and len((committed / "predictions.jsonl").read_text().splitlines()) == 17
        assert not (tmp_path / "predictions.jsonl").exists()
        page.write_text(before)


def test_static_suite_refuses_names_that_are_no_kernels(capsys):
    with pytest.raises(SystemExit) as stop:
        static.main(["--kernel", "shrink", "--kernel", "roof"], "it")
    told = capsys.readouterr().err
    assert stop.value.code == 2 and "it: error: roof: no kernel" in told and "nf4_matmul, nf4_quantize" in told


def test_static_suite_refuses_to_run_in_the_interpreter():
    command = [sys.executable, "-m", "benchmarks.static", "--kernel", "absmax_dequantize"]
    done = subprocess.run(command, cwd=ROOT, env=COMPILED | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "python -m benchmarks.static: unset TRITON_INTERPRET, which keeps kernels from being compiled\n"
    )


def test_static_suite_knows_the_kernels_of_every_operation_that_has_some(monkeypatch):
    asked = []
    monkeypatch.setattr(static, "main", lambda arguments, program: asked.append(arguments) or 0)
    without = {"causal_attention", "fuse", "generation_step", "inject", "roof", "training_step"}
    for op in set(run.case_names()) - without:
        assert run.main(["--suite", "static", "--op", op]) == 0
        files = asked[-1][1::2]
        assert asked[-1][::2] == ["--kernel"] * len(files) and set(files) <= set(static.kernel_names()), op
    assert run.main(["--suite", "static", "--op", "lora_linear", "--op", "lora_linears"]) == 0
    assert asked[-1].count("shrink") == 1 and "low_rank_matmul" in asked[-1]
    # every kernel belongs to an operation
    assert set(static.kernels_of(run.case_names())) - without >= set(static.kernel_names())


def test_predictions_in_the_documentation_are_those_on_record():
    lines = (ROOT / "benchmarks" / "results" / "static" / "predictions.jsonl").read_text().splitlines()
    found = [predict.Prediction(**json.loads(line)) for line in lines]
    assert {p.kind for p in found} == {"prediction"}
    text = static.PERFORMANCE.read_text(encoding="utf-8")
    assert replaced(text, static.COMMAND, static.table(found), "performance.md") == text
