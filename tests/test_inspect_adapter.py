"""`lora-core inspect` on adapters whose configuration or tensors fit no layer."""

import json
import math

import pytest
import torch
from inspected import exit_status
from safetensors.torch import save_file

from lora_core.adapt.files import CONFIG, METADATA_KEY, WEIGHTS
from lora_core.errors import CheckpointError
from lora_core.inspect.path import inspect_path

CONFIGURATION = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["conv"]}


def write(folder, a, b, config=CONFIGURATION, metadata=None):
    """Write an adapter of one module with A and B, tensors or the shapes of such."""
    pair = {"A": a, "B": b}
    tensors = {
        f"base_model.model.conv.lora_{h}.weight": torch.ones(t) if isinstance(t, list) else t for h, t in pair.items()
    }
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def problems(folder):
    """What is wrong with an adapter, by the program too: it ends with status 1, not with a traceback."""
    found = inspect_path(folder).problems
    assert exit_status("inspect", str(folder)) == (1 if found else 0)
    return found


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([2, 8], [6, 2]),
        ([2, 8, 5], [6, 2, 1]),
        ([2, 8, 3, 3], [6, 2, 1, 1]),
        # two groups
        ([2, 8, 3, 3], [6, 1, 1, 1]),
        ([2, 8, 1, 1], [6, 2, 1, 1]),
    ],
    ids=str,
)
def test_inspect_finds_nothing_wrong_with_the_shapes_of_a_layer(tmp_path, a, b):
    write(tmp_path, a, b)
    assert problems(tmp_path) == []
    (pair,) = inspect_path(tmp_path).pairs
    assert (list(pair.shape_a), list(pair.shape_b)) == (a, b)
    # the product of a grouped convolution's pair is not one matrix
    assert math.isnan(pair.update_norm) is (b[1] != a[0])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([2, 8, 1, 1], [8, 2, 3, 1]),
        ([2, 8, 1, 1], [8, 3, 1, 1]),
        ([2, 8, 1, 1], [8, 4, 1, 1]),
        # in two groups, which do not divide the channels
        ([2, 7, 1, 1], [8, 1, 1, 1]),
        ([2, 8, 1, 1], [7, 1, 1, 1]),
        ([2, 8], [8, 1]),
        ([2, 8], [8, 2, 1]),
        ([2, 8, 3], [8, 2]),
        ([2, 8, 3], [8, 2, 3]),
        ([2, 8, 3], [8, 2, 1, 1]),
        ([2], [8, 2]),
        ([0, 8], [8, 0]),
        ([2, 8, 1], [8, 0, 1]),
    ],
    ids=str,
)
def test_inspect_reports_shapes_that_are_of_no_layer(tmp_path, a, b):
    (problem,) = problems(write(tmp_path, a, b))
    assert f"conv: A is {a} and B {b}; want [R, K] and [N, R]" in problem


def test_inspect_reads_a_configuration_with_a_byte_order_mark(tmp_path):
    write(tmp_path, [2, 8], [6, 2])
    (tmp_path / CONFIG).write_text(json.dumps(CONFIGURATION), encoding="utf-8-sig")
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"(?i)conv": 2}},
        {"alpha_pattern": {"(?i)conv": 2}},
        {"r": 10**9},
        {"init_lora_weights": "pissa_niter_999999999"},
        {"modules_to_save": [""]},
    ],
    ids=str,
)
def test_inspect_reports_a_configuration_that_is_refused_on_loading(tmp_path, changes):
    write(tmp_path, [2, 8], [6, 2], {**CONFIGURATION, **changes})
    assert any(p.startswith("cannot be loaded here: LoraConfig: ") for p in problems(tmp_path))


def test_inspect_ignores_a_copy_of_the_configuration_that_is_nested_too_deeply(tmp_path):
    write(tmp_path, [2, 8], [6, 2], metadata={METADATA_KEY: "[" * 50_000})
    assert problems(tmp_path) == []


def test_inspect_reports_floats_that_cannot_be_computed_with(tmp_path):
    narrow = torch.zeros(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    (problem,) = problems(write(tmp_path, narrow, [6, 2]))
    assert "A is float4_e2m1fn_x2" in problem


def test_inspect_refuses_a_dtype_that_pytorch_does_not_have(tmp_path):
    whole = (write(tmp_path, torch.zeros(2, 6, dtype=torch.uint8), [6, 2]) / WEIGHTS).read_bytes()
    header = whole.replace(b'"dtype":"U8","shape":[2,6]', b'"dtype":"F6_E2M3","shape":[2,8]')
    size = int.from_bytes(whole[:8], "little") + len(header) - len(whole)
    (tmp_path / WEIGHTS).write_bytes(size.to_bytes(8, "little") + header[8:])
    with pytest.raises(CheckpointError, match="conv.lora_A.weight cannot be read.*F6_E2M3"):
        inspect_path(tmp_path)
