"""Parts of a 4-bit weight that do not belong together, and what a test of values cannot see."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import lora_core as lc
from lora_core.cpu import compiled
from lora_core.cpu.plain import nf4 as plain
from lora_core.ops.absmax_dequantize import absmax_dequantize
from lora_core.ops.absmax_quantize import absmax_quantize
from lora_core.ops.dora_norm import dora_norm
from lora_core.ops.nf4_quantize import nf4_quantize
from lora_core.ops.packed import Packed
from lora_core.quant import QuantizedWeight
from lora_core.quant.codebook import codebook
from lora_core.quant.quantize import quantize


def parts(**changes):
    q = lc.quantize_nf4(torch.randn(512, 512))
    given = {k: getattr(q, k) for k in ("codes", "absmax", "nested_absmax", "nested_offset", "shape", "dtype")}
    return given | {"block_size": 64, "nested_block_size": 256} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"codes": torch.zeros(10, 1, dtype=torch.uint8)}, lc.ShapeError, "codes has 10 elements.*wants 131072"),
        ({"absmax": torch.zeros(10, dtype=torch.uint8)}, lc.ShapeError, "absmax has 10 elements.*wants 4096"),
        ({"nested_absmax": torch.zeros(15)}, lc.ShapeError, "nested_absmax has 15 elements.*wants 16"),
        (
            {"codes": torch.zeros(131073, 1, dtype=torch.uint8)},
            lc.ShapeError,
            "codes has 131073 elements.*wants 131072",
        ),
        ({"absmax": torch.zeros(4097, dtype=torch.uint8)}, lc.ShapeError, "absmax has 4097 elements.*wants 4096"),
        ({"shape": (256, 512)}, lc.ShapeError, r"codes has 131072 elements; a weight of shape \(256, 512\)"),
        ({"nested_offset": None}, lc.ShapeError, "go together; got only one"),
        ({"nested_absmax": None, "nested_offset": None}, lc.DtypeError, "absmax is torch.uint8; want torch.float32"),
        ({"nested_absmax": torch.zeros(16, dtype=torch.float64)}, lc.DtypeError, "nested_absmax is torch.float64"),
        ({"nested_offset": torch.zeros((), dtype=torch.int64)}, lc.DtypeError, "nested_offset is torch.int64"),
        ({"nested_offset": 0.5}, lc.DtypeError, "nested_offset is a float; want a torch.Tensor"),
        ({"shape": (2048, 2048)}, lc.ShapeError, r"codes has 131072 elements; a weight of shape \(2048, 2048\)"),
        ({"shape": (-512, -512)}, lc.ShapeError, "has a negative side"),
        ({"block_size": 32}, lc.ShapeError, "in blocks of 32 wants 8192"),
        ({"block_size": 48}, lc.ConfigError, "block_size is 48; want one of 32, 64"),
        ({"nested_block_size": 0}, lc.ConfigError, "nested_block_size is 0"),
        ({"absmax": torch.zeros(4096, dtype=torch.uint8, device="meta")}, lc.DeviceError, "absmax is on meta"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(changes, error, message):
    """Not read past their end: by the class, the operation, and the CPU's loops below it."""
    given = parts(**changes)
    with pytest.raises(error, match=message):
        QuantizedWeight(**given)
    order = ("codes", "absmax", "nested_absmax", "nested_offset", "shape", "dtype", "block_size", "nested_block_size")
    # PyTorch itself answers for parts on several devices, and for what is no tensor
    if error is not lc.DeviceError and all(not isinstance(given[k], float) for k in order[:4]):
        with pytest.raises(lc.LoraCoreError, match=message):
            torch.ops.lora_core.nf4_dequantize(*(given[k] for k in order))


@pytest.mark.parametrize("quant_type", ["dynamic", "dynamic_unsigned", ["nf4"], None, "nf5"])
def test_what_is_no_four_bit_type_is_refused(quant_type):
    with pytest.raises(lc.ConfigError, match="want one of nf4, fp4, int4"):
        quantize(torch.randn(4, 64), quant_type)
    with pytest.raises(lc.ConfigError, match="want one of nf4, fp4, int4"):
        QuantizedWeight(**parts(), quant_type=quant_type)


def test_operations_on_nf4_take_no_other_codes():
    with pytest.raises(lc.ConfigError, match="quantised as 'fp4'; want 'nf4'"):
        Packed.of(quantize(torch.randn(4, 64), "fp4"))


def test_block_sizes_are_whole_numbers(tmp_path):
    q = lc.quantize_nf4(torch.randn(4, 64), np.int64(64))
    assert type(q.block_size) is int
    torch.save(q.state_dict(), tmp_path / "state")
    assert type(lc.NF4Config(block_size=np.int64(128)).block_size) is int
    given = parts(block_size=np.int64(64), nested_block_size=np.int64(256))
    assert QuantizedWeight.from_bitsandbytes(QuantizedWeight(**given).to_bitsandbytes()).nested_block_size == 256
    scale, nested = absmax_quantize(torch.rand(300), torch.zeros(()), np.int64(256))
    assert absmax_dequantize(scale, nested, torch.zeros(()), np.int64(256)).shape == (300,)
    for wrong in (256.0, "256", None, 2**63):
        with pytest.raises(lc.ConfigError, match="nested_block_size is .*want a whole number of at least 1"):
            QuantizedWeight(**parts(nested_block_size=wrong))
    for given in (64.0, "64", None, True):
        with pytest.raises(lc.ConfigError, match=f"block_size is {given!r}"):
            lc.quantize_nf4(torch.randn(4, 64), given)


@pytest.mark.parametrize("double_quant", ["no", 1, None])
def test_double_quant_that_is_neither_true_nor_false_is_refused(double_quant):
    with pytest.raises(lc.ConfigError, match="double_quant is .*; want True or False"):
        lc.quantize_nf4(torch.eye(64), 64, double_quant)


@pytest.mark.parametrize("nested_block_size", [2, 3, 8, 256])
def test_scales_near_the_largest_number_stay_finite_in_any_second_level_blocks(nested_block_size):
    """The nearest code may stand for more than its scale; one code less is taken where that is infinite."""
    largest = torch.finfo(torch.float32).max
    for seed in range(100):
        weight = torch.rand(24, 32, generator=torch.Generator().manual_seed(seed)) * largest
        weight[seed % 24, 0] = largest
        q = quantize(weight, block_size=32, nested_block_size=nested_block_size)
        assert q.dequantize().isfinite().all() and q.nested_block_size == nested_block_size


@pytest.mark.parametrize("nested_block_size", [0, 2.0, "256", None])
def test_second_level_blocks_of_no_size_are_refused(nested_block_size):
    with pytest.raises(lc.ConfigError, match="nested_block_size is .*; want a whole number of at least 1"):
        quantize(torch.eye(64), nested_block_size=nested_block_size)


def test_sparse_weight_is_refused():
    with pytest.raises(lc.DtypeError, match="layout torch.sparse_coo: want a dense one"):
        lc.quantize_nf4(torch.eye(64).to_sparse())


def test_quantised_weight_takes_no_gradient():
    q = lc.quantize_nf4(nn.Parameter(torch.randn(4, 64)))
    q.requires_grad = False
    with pytest.raises(lc.ConfigError, match="takes no gradient"):
        q.requires_grad = True
    weight = nn.Parameter(torch.randn(4, 64))
    codes, absmax = nf4_quantize(weight)
    scale, nested = absmax_quantize(absmax, absmax.mean())
    assert not any(t.requires_grad for t in (codes, absmax, scale, nested))
    copy.deepcopy(QuantizedWeight(codes, absmax, None, None, shape=weight.shape, dtype=weight.dtype)).dequantize()


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_codebooks_stay_real_whatever_they_were_first_used_in(mode):
    with mode():
        books = [codebook(name) for name in ("nf4", "fp4", "int4", "dynamic", "dynamic_unsigned")]
        if mode is FakeTensorMode:
            lc.quantize_nf4(torch.randn(4, 64)).dequantize()
    for book in books:
        assert not any(isinstance(t, FakeTensor) or t.is_meta for t in (book.levels, book.midpoints))
    assert not isinstance(quantize(torch.randn(4, 64), "fp4").dequantize(), FakeTensor)


@pytest.mark.peer("bitsandbytes")
@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_maps_are_those_of_bitsandbytes(signed):
    import bitsandbytes.functional as functional

    assert torch.equal(
        codebook("dynamic" if signed else "dynamic_unsigned").levels, functional.create_dynamic_map(signed=signed)
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_negative_zero_beside_other_weights_becomes_zero(kind, dtype):
    weight = torch.linspace(-1, 1, 64, dtype=dtype)
    weight[5] = -0.0
    q = quantize(weight, kind, double_quant=False)
    assert q.dequantize()[5] == 0
    if kind == "nf4":
        assert q.codes[2].item() & 15 == 7


LOOPS = [plain, *([loaded] if (loaded := compiled.load("nf4")) else [])]


@pytest.mark.parametrize("loops", LOOPS, ids=lambda module: module.__name__.split(".")[-2])
@pytest.mark.parametrize("start", [2**31 - 64, 2**31, 2**32 + 128])
def test_weights_beyond_two_to_the_31st_are_decoded_where_they_lie(loops, start):
    """Of arrays that long only the touched pages are ever there."""
    q = lc.quantize_nf4(torch.randn(192), double_quant=False)
    codes = np.zeros((start + 192) // 2, np.uint8)
    codes[start // 2 :] = q.codes.flatten().numpy()
    scales = np.zeros((start + 192) // 64, np.float32)
    scales[start // 64 :] = q.absmax.numpy()
    got = np.full(192, np.nan, np.float32)
    loops.decode(codes, scales, got, 64, start, start + 192, False)
    assert torch.equal(torch.from_numpy(got), q.dequantize())


CODES_300 = torch.zeros(300, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nf4_quantize([1.0]), lc.DtypeError, "weight is a list"),
        (lambda: absmax_quantize([1.0], torch.zeros(())), lc.DtypeError, "absmax is a list"),
        (lambda: absmax_quantize(torch.ones(3), torch.zeros(()), "256"), lc.ConfigError, "block_size is '256'"),
        (lambda: absmax_quantize(torch.ones(3), torch.zeros((), device="meta")), lc.DeviceError, "offset on meta"),
        (
            lambda: absmax_quantize(torch.ones(3) / 0, torch.zeros(())),
            lc.NonFiniteError,
            "scales to quantise holds inf",
        ),
        (lambda: absmax_quantize(torch.ones(3), torch.zeros(()) / 0), lc.NonFiniteError, "offset .* holds nan"),
        (
            lambda: absmax_dequantize(torch.zeros(3, dtype=torch.uint8), torch.ones(1, device="meta"), torch.zeros(())),
            lc.DeviceError,
            "absmax2 on meta",
        ),
        (
            lambda: absmax_dequantize(torch.zeros(3, dtype=torch.uint8), torch.ones(1).double(), torch.zeros(())),
            lc.DtypeError,
            "absmax2 is torch.float64",
        ),
        (
            lambda: dora_norm(lc.quantize_nf4(torch.ones(2, 64)), torch.ones(1, 64), torch.ones(2, 1), 1.0, "bf16"),
            lc.DtypeError,
            "dtype is 'bf16'; want one of torch.float32",
        ),
        (
            # the operation itself, too: its loops would read what lies behind the scales
            lambda: torch.ops.lora_core.absmax_dequantize(CODES_300, torch.ones(1), torch.zeros(()), 256),
            lc.ShapeError,
            "300 codes in blocks of 256 want 2",
        ),
    ],
)
def test_operations_on_scales_refuse_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["nf5", "", None, ["nf4"]], ids=repr)
def test_codebook_that_does_not_exist_is_refused(name):
    with pytest.raises(lc.ConfigError, match="no codebook .*: want one of nf4, fp4, int4, dynamic, dynamic_unsigned"):
        codebook(name)


def test_weight_whose_parts_are_held_elsewhere_is_decoded():
    """As parameters, by a tool that shards those alone, or computed at each use."""
    q = lc.quantize_nf4(torch.randn(8, 64))
    wanted = q.dequantize()
    for name in ("codes", "absmax"):
        part = q._buffers.pop(name)
        setattr(q, name, torch.nn.Parameter(part, requires_grad=False))
    assert torch.equal(q.dequantize(), wanted)
