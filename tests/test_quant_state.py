"""States of a 4-bit weight, its own and bitsandbytes': damaged, foreign, and loaded into memory that others hold."""

import json

import pytest
import torch
from torch import nn

import lora_core as lc
from lora_core.quant import QuantizedWeight
from lora_core.quant.quantize import quantize


def state(weight=None, **about):
    """bitsandbytes' state dict of a weight, by default 40 x 128, whose JSON says other things."""
    written = lc.quantize_nf4(torch.randn(40, 128) if weight is None else weight).to_bitsandbytes()
    key = next(k for k in written if "quant_state" in k)
    values = json.loads(bytes(written[key].tolist())) | about
    written[key] = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
    return written


@pytest.mark.parametrize("state", [None, [], "weight"])
def test_state_that_is_no_mapping_is_refused(state):
    with pytest.raises(lc.ConfigError, match="want a mapping of names to tensors"):
        QuantizedWeight.from_bitsandbytes(state)


@pytest.mark.parametrize("prefix", [None, 5])
def test_prefix_that_is_no_string_is_refused(prefix):
    q = lc.quantize_nf4(torch.eye(64))
    with pytest.raises(lc.ConfigError, match="prefix is .*; want a string"):
        q.to_bitsandbytes(prefix)
    with pytest.raises(lc.ConfigError, match="prefix is .*; want a string"):
        QuantizedWeight.from_bitsandbytes(q.to_bitsandbytes(), prefix)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"blocksize": 0}, "blocksize 0; want one of"),
        ({"blocksize": 64.0}, "blocksize 64.0; want one of"),
        ({"blocksize": "64"}, "blocksize '64'"),
        ({"blocksize": None}, "blocksize None"),
        ({"nested_blocksize": 0}, "nested_blocksize 0; want a whole number of at least 1"),
        ({"nested_blocksize": "256"}, "nested_blocksize '256'"),
        ({"nested_blocksize": 256.0}, "nested_blocksize 256.0"),
        ({"nested_offset": "x"}, "nested_offset 'x'; want a finite number"),
        ({"nested_offset": None}, "nested_offset None"),
        ({"nested_offset": float("nan")}, "nested_offset nan"),
        ({"nested_offset": 1e300}, "nested_offset 1e"),
        ({"shape": None}, "shape None; want a list of whole numbers"),
        ({"shape": "ab"}, "shape 'ab'"),
        ({"shape": 5120}, "shape 5120"),
        ({"shape": [40.0, 128]}, r"shape \[40.0, 128\]"),
        ({"shape": [-40, -128]}, r"shape \[-40, -128\]"),
        ({"shape": [True, 5120]}, r"shape \[True, 5120\]"),
        ({"shape": [2**40, 2**40]}, r"shape \[1099511627776, 1099511627776\]; want a list of whole numbers"),
        ({"shape": "x" * 1000}, r"shape 'xxx.*xxx\.\.\.; want"),
        ({"dtype": "int8"}, "dtype 'int8'; want float32, float16, bfloat16, float64"),
        ({"dtype": "complex64"}, "dtype 'complex64'"),
        ({"dtype": 5}, "dtype 5"),
        ({"quant_type": "int3"}, "quant_type 'int3'; want nf4 or fp4"),
        ({"quant_type": ["nf4"]}, "quant_type"),
    ],
)
def test_damaged_state_is_refused_saying_what_it_holds(about, message):
    given = state(**about)
    with pytest.raises(lc.CheckpointError, match=message):
        QuantizedWeight.from_bitsandbytes(given)


def test_state_whose_sides_multiply_to_more_than_is_counted_is_refused_though_its_parts_are_as_many():
    """In 64 bits their product is 0, as many elements as an empty weight has."""
    given = state(torch.zeros(0, 5), shape=[2**32, 2**32])
    with pytest.raises(lc.CheckpointError, match=r"shape \[4294967296, 4294967296\]; want a list of whole numbers"):
        QuantizedWeight.from_bitsandbytes(given)


@pytest.mark.parametrize(
    "key", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"]
)
def test_sparse_part_of_a_state_is_refused_naming_it(key):
    given = state()
    given[f"weight{key}"] = given[f"weight{key}"].to_sparse()
    with pytest.raises(lc.CheckpointError, match=f"weight{key} is of layout torch.sparse_coo; want a dense tensor"):
        QuantizedWeight.from_bitsandbytes(given)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", "\x00"])
def test_state_that_is_no_object_is_refused(text):
    given = state()
    key = next(k for k in given if "quant_state" in k)
    given[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    with pytest.raises(lc.CheckpointError, match="no JSON text|does not say"):
        QuantizedWeight.from_bitsandbytes(given)


@pytest.mark.parametrize("key", ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"])
def test_state_without_values_is_refused_and_nothing_is_loaded(key):
    given = state()
    given[key] = given[key].to("meta")
    with pytest.raises(lc.CheckpointError, match=f"{key} is on the meta device and has no values"):
        QuantizedWeight.from_bitsandbytes(given)
    q = lc.quantize_nf4(torch.randn(40, 128))
    before = {k: v.clone() for k, v in q.state_dict().items()}
    own = q.state_dict()
    own["absmax"] = own["absmax"].to("meta")
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="has no values"):
            q.load_state_dict(own, assign=assign)
        assert all(torch.equal(v, before[k]) for k, v in q.state_dict().items())


def test_state_of_another_type_is_refused_by_the_layer_it_is_for():
    model = lc.quantize_model(nn.Sequential(nn.Linear(64, 8)), skip_modules=[])
    other = quantize(torch.randn(8, 64), "fp4").to_bitsandbytes(prefix="0.weight")
    with pytest.raises(RuntimeError, match="the checkpoint's weight is fp4, this one nf4"):
        model.load_state_dict(other | {"0.bias": torch.zeros(8)})
    model(torch.randn(2, 64))


def test_loading_a_state_keeps_nothing_of_the_callers_memory():
    q, other = lc.quantize_nf4(torch.randn(40, 128)), lc.quantize_nf4(torch.randn(40, 128))
    given = {k: v.clone() for k, v in other.state_dict().items()}
    q.load_state_dict(given)
    before = q.dequantize()
    for tensor in given.values():
        tensor.zero_()
    assert torch.equal(q.dequantize(), before)
    empty = lc.quantize_nf4(torch.randn(40, 128)).to("meta")
    given = other.state_dict()
    empty.load_state_dict(given)
    assert empty.codes.data_ptr() not in {tensor.data_ptr() for tensor in given.values()}
    assert torch.equal(empty.dequantize(), other.dequantize())


def test_loading_a_state_writes_into_the_memory_held():
    """Who shares it, another process or a captured graph, sees the new weight."""
    q, other = lc.quantize_nf4(torch.randn(40, 128)).share_memory(), lc.quantize_nf4(torch.randn(40, 128))
    held = {name: buffer.data_ptr() for name, buffer in q.named_buffers()}
    q.load_state_dict(other.state_dict())
    assert torch.equal(q.dequantize(), other.dequantize())
    assert {name: buffer.data_ptr() for name, buffer in q.named_buffers()} == held and q.codes.is_shared()
    # of another layout there is no such memory
    q.load_state_dict(lc.quantize_nf4(other.dequantize(), double_quant=False).state_dict())
    assert not q.double_quant


def test_a_second_level_block_is_no_larger_than_the_weight_whatever_a_file_says():
    given = state(nested_blocksize=2**40)
    for levels in (given["weight.nested_quant_map"], given["weight.nested_quant_map"] * 0.5):
        read = QuantizedWeight.from_bitsandbytes(given | {"weight.nested_quant_map": levels})
        assert read.dequantize().isfinite().all()


def test_scales_in_a_map_of_another_making_are_decoded_in_blocks_of_the_files_size_and_kept_plain():
    q = quantize(torch.randn(40, 128), nested_block_size=32)
    given = q.to_bitsandbytes()
    levels = given["weight.nested_quant_map"] * 0.5
    read = QuantizedWeight.from_bitsandbytes(given | {"weight.nested_quant_map": levels})
    wanted = levels[q.absmax.int()] * q.nested_absmax.repeat_interleave(32)[:80] + q.nested_offset
    assert len(q.nested_absmax) == 3 and torch.equal(read.absmax, wanted)
    assert not read.double_quant


def test_loading_scales_in_a_map_of_another_making_leaves_no_key_over():
    """Those of quantised scales belong to such a state, though the weight holds none from then on."""
    q, other = lc.quantize_nf4(torch.randn(40, 128)), lc.quantize_nf4(torch.randn(40, 128))
    given = other.state_dict()
    given["nested_quant_map"] = given["nested_quant_map"] * 0.5
    q.load_state_dict(given)
    assert not q.double_quant and torch.equal(q.codes, other.codes)
    given.pop("nested_absmax")
    with pytest.raises(RuntimeError, match="nested_absmax is missing"):
        q.load_state_dict(given)


@pytest.mark.peer("bitsandbytes")
@pytest.mark.parametrize("nested", [False, True])
def test_weight_repacked_by_bitsandbytes_itself_is_refused(nested):
    """Its state dict says nothing of it; scales by block and row, and rows of codes, do."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as functional

    packed, about = functional.quantize_4bit(
        torch.randn(64, 128), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    packed, about = functional._convert_weight_packed_for_cpu(packed, about)
    given = {"weight": packed} | {f"weight.{k}": v for k, v in about.as_dict(packed=True).items()}
    with pytest.raises(lc.CheckpointError, match="repacked for CPU inference"):
        QuantizedWeight.from_bitsandbytes(given)
    assert bnb.__version__


def test_zero_blocks_as_bitsandbytes_writes_them_on_a_gpu_decode_as_they_say():
    """Its codes are 0x00, the level -1: beside quantised scales that is minus the scale as recovered."""
    weight = torch.randn(4, 64)
    weight[1] = 0
    q = lc.quantize_nf4(weight)
    assert torch.equal(q.codes[32:64], torch.full((32, 1), 0x77, dtype=torch.uint8))
    q.codes[32:64] = 0
    assert torch.equal(q.dequantize()[1], -q.dense_absmax()[1].expand(64))
    assert not q.dequantize()[1].eq(0).any()


@pytest.mark.parametrize(("nested", "dtype"), [(True, torch.float32), (False, torch.uint8), (False, torch.float64)])
def test_scales_of_another_dtype_than_the_state_says_are_refused(nested, dtype):
    given = lc.quantize_nf4(torch.randn(40, 128), 64, nested).to_bitsandbytes()
    given["weight.absmax"] = given["weight.absmax"].to(dtype)
    with pytest.raises(lc.CheckpointError, match=f"weight.absmax is {dtype}; want torch.(float32|uint8) where it is"):
        QuantizedWeight.from_bitsandbytes(given)


def test_weight_in_the_uniform_code_is_not_written_for_bitsandbytes():
    with pytest.raises(lc.ConfigError, match="bitsandbytes has no 'int4': want nf4 or fp4"):
        quantize(torch.randn(4, 64), "int4").to_bitsandbytes()


def test_state_of_a_weight_has_the_attributes_that_are_its_keys_and_no_others():
    q = lc.quantize_nf4(torch.randn(4, 64))
    (key,) = (k for k in q.state_dict() if k.startswith("quant_state."))
    assert torch.equal(getattr(q.quant_state, key.partition(".")[2]), q.state_dict()[key])
    assert not hasattr(q.quant_state, "bitsandbytes__fp4") and not hasattr(q.quant_state, "_private")


def test_mean_of_no_scales_at_all_is_not_read():
    """bitsandbytes' is NaN, which JSON has not, and other writers have null in its place."""
    given = state(torch.zeros(0, 5), nested_offset=None)
    assert QuantizedWeight.from_bitsandbytes(given).nested_offset == 0
