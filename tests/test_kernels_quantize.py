"""The quantising kernels give the reference's codes and scales: on a GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import block_sizes, counts, dtypes, scales, seeds, values

from lora_core.kernels import absmax_dequantize
from lora_core.kernels.absmax_dequantize import launch_absmax_dequantize
from lora_core.kernels.absmax_quantize import launch_absmax_quantize
from lora_core.kernels.nf4_quantize import launch_nf4_quantize
from lora_core.kernels.tables import thresholds
from lora_core.quant import double
from lora_core.quant.codebook import codebook
from lora_core.reference import nf4 as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
nested_blocks = st.sampled_from([1, 7, 100, 256, 300])


@given(counts(9000), block_sizes, dtypes, scales, st.booleans(), seeds)
def test_nf4_quantize_kernel_gives_the_references_codes(n, block_size, dtype, scale, mixed, seed):
    weight = values(n, dtype, scale, seed, mixed).to(DEVICE)
    codes, absmax = launch_nf4_quantize(weight, block_size)
    want_codes, want_absmax = reference.nf4_quantize(weight, block_size)
    assert torch.equal(absmax, want_absmax) and torch.equal(codes, want_codes)


@given(st.sampled_from([-2, -1, 0, 1, 2]), st.sampled_from([8, 15]), st.floats(2.0**-10, 1000, width=32))
def test_nf4_quantize_kernel_decides_at_the_thresholds_as_the_reference_does(ulps, n, absmax):
    """Values on and one or two steps beside every midpoint, where a quotient off by one bit gives another code."""
    middle = codebook("nf4").midpoints * absmax
    for _ in range(abs(ulps)):
        middle = torch.nextafter(middle, torch.tensor(float("inf") if ulps > 0 else float("-inf")))
    weight = torch.cat([torch.tensor([absmax]), middle[: n - 1]]).to(DEVICE)
    codes, _ = launch_nf4_quantize(weight, 32)
    assert torch.equal(codes, reference.nf4_quantize(weight, 32)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_nf4_quantize_kernel_keeps_subnormal_weights(dtype):
    """Blocks whose largest weight is a subnormal of the dtype, down to the smallest."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = (torch.tensor([[1.0], [3.0], [50.0]]) * smallest * torch.linspace(-1, 1, 32)).to(dtype).to(DEVICE)
    codes, absmax = launch_nf4_quantize(weight, 32)
    assert absmax.tolist() == [smallest, 3 * smallest, 50 * smallest]
    assert torch.equal(codes, reference.nf4_quantize(weight, 32)[0])


def test_nf4_quantize_kernel_takes_strided_and_empty_weights_and_changes_nothing():
    weight = torch.randn(70, 66, device=DEVICE)[:, ::2]
    before = weight.clone()
    codes, absmax = launch_nf4_quantize(weight, 64)
    want = reference.nf4_quantize(weight, 64)
    assert torch.equal(codes, want[0]) and torch.equal(absmax, want[1]) and torch.equal(weight, before)
    codes, absmax = launch_nf4_quantize(weight[:0], 64)
    assert codes.shape == (0, 1) and absmax.shape == (0,)


@given(st.integers(1, 1500), nested_blocks, st.sampled_from([0.0, 1e-39, 1e-3, 1.0, 1e30]), seeds)
def test_absmax_kernels_give_the_references_codes_and_scales(count, block_size, scale, seed):
    absmax = values(count, torch.float32, scale, seed).abs().to(DEVICE)
    offset = double.absmax_offset(absmax)
    codes, absmax2 = launch_absmax_quantize(absmax, offset, 256)
    want = double.quantize_absmax(absmax, offset, 256)
    assert torch.equal(codes, want[0]) and torch.equal(absmax2, want[1])
    codes, absmax2 = double.quantize_absmax(absmax, offset, block_size)
    back = launch_absmax_dequantize(codes, absmax2, offset, block_size)
    assert torch.equal(back, double.dequantize_absmax(codes, absmax2, offset, block_size))


def test_absmax_quantize_kernel_takes_scales_that_lie_apart():
    absmax = torch.rand(600, device=DEVICE)[::2]
    offset = absmax.mean().view(1)
    found, want = launch_absmax_quantize(absmax, offset, 256), double.quantize_absmax(absmax, offset, 256)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("moved", ["codes", "absmax2"])
def test_absmax_dequantize_kernel_loads_by_the_element_what_begins_between_two_vectors(moved, monkeypatch):
    monkeypatch.setattr(absmax_dequantize, "_WIDE", None)
    codes, absmax2 = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(2), torch.rand(2, device=DEVICE)
    offset = torch.rand(1, device=DEVICE)
    want = double.dequantize_absmax(codes, absmax2, offset, 256)
    if moved == "codes":
        codes = torch.cat([codes[:1], codes])[1:]
    else:
        absmax2 = torch.cat([absmax2[:1], absmax2])[1:]
    assert torch.equal(launch_absmax_dequantize(codes, absmax2, offset, 256), want)


def test_absmax_quantize_kernel_breaks_ties_towards_even_codes():
    """Every midpoint that float32 holds exactly, and its neighbours."""
    middle = codebook("dynamic").midpoints
    exact = middle[middle.float().double() == middle].float()
    assert 50 < len(exact) < 256
    for tie in (exact, *(torch.nextafter(exact, torch.tensor(end)) for end in (2.0, -2.0))):
        # the offset is 0 and the largest magnitude 1, so that the quotient is the value itself
        scales_ = torch.cat([torch.ones(1), tie]).to(DEVICE)
        zero = torch.zeros((), device=DEVICE)
        got = launch_absmax_quantize(scales_, zero, 256)[0]
        assert torch.equal(got, double.quantize_absmax(scales_, zero, 256)[0])


@pytest.mark.parametrize("block_size", [100, 512, 2**40])
def test_absmax_quantize_leaves_blocks_of_other_than_256_to_the_reference(block_size, caplog):
    scales_, zero = torch.rand(700, device=DEVICE), torch.zeros((), device=DEVICE)
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        got = launch_absmax_quantize(scales_, zero, block_size)
    assert "absmax_quantize: blocks of other than 256, reference" in caplog.text
    want = double.quantize_absmax(scales_, zero, block_size)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_absmax_kernels_take_no_scales():
    none, zero = torch.empty(0, device=DEVICE), torch.zeros((), device=DEVICE)
    codes, absmax2 = launch_absmax_quantize(none, zero, 256)
    assert codes.shape == absmax2.shape == (0,)
    assert launch_absmax_dequantize(codes, absmax2, zero, 256).shape == (0,)


def test_threshold_trees_hold_every_threshold_once_in_search_order():
    for name in ("nf4", "dynamic"):
        tree, count = thresholds(name, torch.device("cpu")), len(codebook(name).levels)

        def in_order(node, tree=tree, count=count):
            return [*in_order(2 * node), tree[node].item(), *in_order(2 * node + 1)] if node < count else []

        found = in_order(1)
        assert found == sorted(set(found)) and len(found) == count - 1
