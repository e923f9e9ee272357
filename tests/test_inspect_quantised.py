"""What an inspection says of quantised weights: bitsandbytes' are read, other formats named."""

import json
import math
import re

import pytest
import torch
from inspected import exit_status
from safetensors.torch import save_file
from torch import nn

import lora_core as lc
from lora_core.cli import main
from lora_core.inspect.path import inspect_path


def quantised_file(path, double_quant=True, **changes):
    weight = lc.quantize_nf4(torch.randn(48, 67), double_quant=double_quant)
    state = {f"layer.{k}": v for k, v in weight.to_bitsandbytes(prefix="weight").items()}
    state["norm.weight"] = torch.ones(67)
    state.update({f"layer.{k.replace('__', '.')}": v for k, v in changes.items()})
    save_file({k: v.contiguous() for k, v in state.items() if v is not None}, path)
    return weight


@pytest.mark.parametrize("double_quant", [True, False])
def test_inspect_reads_a_quantised_checkpoint(tmp_path, double_quant, capsys):
    path = tmp_path / "model.safetensors"
    weight = quantised_file(path, double_quant)
    report = inspect_path(path)
    assert (report.kind, report.problems) == ("checkpoint", [])
    (found,) = report.quantised
    assert (found.name, found.quant_type, found.shape, found.block_size) == ("layer.weight", "nf4", (48, 67), 64)
    assert found.double_quant is double_quant
    blocks = math.ceil(48 * 67 / 64)
    scales = blocks + 4 * math.ceil(blocks / 256) if double_quant else 4 * blocks
    assert found.bits_per_parameter == 8 * (48 * 67 / 2 + scales) / (48 * 67)
    assert found.bits_per_parameter == pytest.approx(weight.bits_per_parameter, rel=0.01)
    assert [t.name for t in report.plain] == ["norm.weight"]
    main(["inspect", str(path)])
    assert "no problems found" in capsys.readouterr().out


def test_inspect_reports_a_quantised_weight_that_does_not_add_up(tmp_path):
    path = tmp_path / "model.safetensors"
    quantised_file(path, weight__absmax=torch.zeros(3, dtype=torch.uint8))
    assert any(re.search(r"layer\.weight\.absmax .*has 3 elements", p) for p in inspect_path(path).problems)
    quantised_file(path, weight__absmax=None)
    assert any("layer.weight.absmax is missing" in p for p in inspect_path(path).problems)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inspect_reports_scales_that_are_no_numbers(tmp_path, double_quant, value):
    path, part = tmp_path / "model.safetensors", "nested_absmax" if double_quant else "absmax"
    scales = getattr(lc.quantize_nf4(torch.randn(48, 67), double_quant=double_quant), part).clone()
    scales[0] = value
    quantised_file(path, double_quant, **{f"weight__{part}": scales})
    assert any("layer.weight: a scale is NaN or infinite" in p for p in inspect_path(path).problems)
    assert exit_status("inspect", str(path)) == 1


def test_inspect_reports_packed_bytes_cast_to_floats(tmp_path):
    path = tmp_path / "model.safetensors"
    codes = torch.zeros((48 * 67 + 1) // 2, 1, dtype=torch.bfloat16)
    quantised_file(path, weight=codes)
    assert any("layer.weight" in p and "has 3216 elements, want 1608" in p for p in inspect_path(path).problems)


def test_inspect_reads_packed_bytes_kept_in_another_dtype(tmp_path):
    """bitsandbytes' quant_storage: the same bytes, named as bfloat16."""
    path = tmp_path / "model.safetensors"
    packed = lc.quantize_nf4(torch.randn(48, 67)).to_bitsandbytes(prefix="weight")["weight"]
    quantised_file(path, weight=packed.view(-1).view(torch.bfloat16)[:, None])
    report = inspect_path(path)
    assert report.problems == [] and report.quantised[0].shape == (48, 67)


def about(changes):
    """A quant_state as a file holds it, with some of its values changed, or the text itself."""
    value = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [48, 67]}
    value |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    text = changes if isinstance(changes, str) else json.dumps(value | changes)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = "weight__quant_state__bitsandbytes__nf4"


@pytest.mark.parametrize(
    "changes",
    [
        *({"blocksize": value} for value in (0, "64x", None, -64, 1e300)),
        *({"nested_blocksize": value} for value in (0, None, "x")),
        *({"shape": value} for value in ("ab", None, {"a": 1}, [math.inf, 2], [1e300, 1e300], [64.7, 128], [3, 3])),
        *({"quant_type": value} for value in ("int3", None, [])),
        *({"dtype": value} for value in ("wat", None, "Tensor")),
        {"nested_offset": "x"},
        "[" * 100_000,
        '{"quant_type": "nf4"',
        "null",
    ],
)
def test_inspect_reports_a_damaged_quantised_weight(tmp_path, changes):
    path = tmp_path / "model.safetensors"
    weight = lc.quantize_nf4(torch.randn(48, 67))
    state = {f"layer.{k}": v for k, v in weight.to_bitsandbytes(prefix="weight").items()}
    state["layer.weight.quant_state.bitsandbytes__nf4"] = about(changes)
    save_file(state, path)
    report = inspect_path(path)
    assert len(report.problems) == 1 and "layer.weight" in report.problems[0] and report.quantised == []
    assert exit_status("inspect", str(path)) == 1


@pytest.mark.parametrize("part", ["quant_map", "nested_quant_map", "quant_state.bitsandbytes__nf4", "absmax"])
def test_inspect_reports_a_part_of_a_quantised_weight_that_is_missing(tmp_path, part):
    path = tmp_path / "model.safetensors"
    state = lc.quantize_nf4(torch.randn(48, 67)).to_bitsandbytes(prefix="weight")
    del state[f"weight.{part}"]
    save_file(state, path)
    (problem,) = inspect_path(path).problems
    assert part in problem


def test_inspect_reads_the_weights_of_a_model_that_is_not_bitsandbytes(tmp_path):
    held = nn.ModuleDict({"a": lc.quant.quantize(torch.randn(8, 64), quant_type="int4")})
    save_file(held.state_dict(), tmp_path / "model.safetensors")
    report = inspect_path(tmp_path)
    assert (report.problems, report.plain) == ([], [])
    assert (report.quantised[0].name, report.quantised[0].quant_type) == ("a", "int4")


def packed_by(method, rows=64, columns=48):
    """A weight of four bits in groups of 32, as GPTQ's and AWQ's savers name and shape its tensors."""
    codes = (rows // 8, columns) if method == "GPTQ" else (rows, columns // 8)
    tensors = {
        "qweight": torch.zeros(codes, dtype=torch.int32),
        "qzeros": torch.zeros(rows // 32, columns // 8, dtype=torch.int32),
        "scales": torch.ones(rows // 32, columns, dtype=torch.float16),
    }
    return {f"layers.{i}.up.{name}": t.clone() for i in range(2) for name, t in tensors.items()}


@pytest.mark.parametrize("method", ["GPTQ", "AWQ"])
def test_inspect_names_weights_quantised_by_others(tmp_path, method):
    save_file(packed_by(method), tmp_path / "model.safetensors")
    report = inspect_path(tmp_path)
    (note,) = report.notes
    assert note.startswith(f"2 weights quantised by {method}, such as layers.0.up.qweight")
    assert "not loaded by this library" in note and (report.problems, len(report.plain)) == ([], 6)


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ("qweight", "GPTQ or AWQ"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "block-wise fp8"),
        ("SCB", "bitsandbytes' LLM.int8()"),
    ],
)
def test_inspect_names_the_format_by_what_stands_beside_a_weight(tmp_path, beside, told):
    save_file({"up.weight": torch.ones(4, 4), f"up.{beside}": torch.ones(4)}, tmp_path / "model.safetensors")
    (note,) = inspect_path(tmp_path).notes
    assert note.startswith(f"1 weight quantised by {told}, such as up.{beside}:")
