"""The NF4 dequantisation kernel gives the reference's bits: on a GPU, or on the CPU in Triton's interpreter."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launches import recorded
from strategies import DTYPES, block_sizes, counts, dtypes, scales, seeds, values

import lora_core as lc
from lora_core.kernels.nf4_dequantize import launch_nf4_dequantize
from lora_core.reference import nf4 as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts(q):
    return q.codes, q.absmax, q.nested_absmax, q.nested_offset


def same_bits(got, want):
    return got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))


outputs = st.sampled_from([*DTYPES, torch.float64])


@given(counts(5000), block_sizes, dtypes, outputs, scales, st.booleans(), st.booleans(), seeds)
def test_nf4_dequantize_kernel_gives_the_references_bits(n, block_size, dtype, out, scale, mixed, nested, seed):
    weight = values(n, dtype, scale, seed, mixed).to(DEVICE)
    q = lc.quantize_nf4(weight, block_size=block_size, double_quant=nested)
    want = reference.nf4_dequantize(*parts(q), q.shape, out, block_size)
    assert same_bits(launch_nf4_dequantize(*parts(q), q.shape, out, block_size), want)


@given(st.integers(1, 40), seeds)
def test_nf4_dequantize_kernel_takes_words_and_bytes_alike(blocks, seed):
    """A buffer that begins between two words is read by the byte; the bits are the same."""
    q = lc.quantize_nf4(values(64 * blocks, torch.float32, 1.0, seed).to(DEVICE))
    moved = torch.cat([q.codes.new_zeros(1, 1), q.codes])[1:]
    assert moved.data_ptr() % 4
    want = launch_nf4_dequantize(*parts(q), q.shape, torch.bfloat16, 64)
    assert same_bits(launch_nf4_dequantize(moved, *parts(q)[1:], q.shape, torch.bfloat16, 64), want)


@pytest.mark.interpreted
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_nf4_dequantize_kernel_is_launched_once(block_size, nested):
    """Scales that are quantised themselves take no launch of their own."""
    q = lc.quantize_nf4(torch.randn(100, 130), block_size, nested)
    with recorded() as launches:
        launch_nf4_dequantize(*parts(q), q.shape, torch.bfloat16, block_size)
    assert [launch.kernel for launch in launches] == ["_nf4_dequantize_kernel"]


@given(counts(30_000), st.sampled_from([16, 100, 256, 300]), seeds)
def test_nf4_dequantize_kernel_takes_any_second_level_block(n, nested_block, seed):
    from lora_core.quant.double import absmax_offset, quantize_absmax

    codes, absmax = reference.nf4_quantize(values(n, torch.float32, 1.0, seed), 32)
    offset = absmax_offset(absmax)
    operands = [t.to(DEVICE) for t in (codes, *quantize_absmax(absmax, offset, nested_block), offset)]
    want = reference.nf4_dequantize(*operands, (n,), torch.float32, 32, nested_block)
    assert same_bits(launch_nf4_dequantize(*operands, (n,), torch.float32, 32, nested_block), want)


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16], ids=str)
def test_nf4_dequantize_kernel_rounds_ties_to_even(out):
    """Scales of the highest level, which is 1: numbers half-way between two of the output, and their neighbours."""
    below = torch.arange(1, 2, torch.finfo(out).eps, dtype=torch.float64)[:2000]
    half = (below + torch.finfo(out).eps / 2).float()
    absmax = torch.cat([half, *(torch.nextafter(half, torch.tensor(end)) for end in (0.0, 3.0)), half * 2.0**-14])
    codes = torch.full((16 * len(absmax), 1), 255, dtype=torch.uint8, device=DEVICE)
    got = launch_nf4_dequantize(codes, absmax.to(DEVICE), None, None, (len(absmax), 32), out, 32)
    assert torch.equal(got.cpu(), absmax.to(out)[:, None].expand(-1, 32))


def test_nf4_dequantize_kernel_takes_strided_operands_and_no_elements():
    # more than 256 blocks, so that no operand is too short to be strided
    q = lc.quantize_nf4(torch.randn(330, 70, device=DEVICE))
    spread = [t.repeat_interleave(2, 0)[::2] for t in parts(q)[:3]]
    assert not any(t.is_contiguous() for t in spread)
    want = launch_nf4_dequantize(*parts(q), q.shape, torch.float16, 64)
    assert same_bits(launch_nf4_dequantize(*spread, q.nested_offset, q.shape, torch.float16, 64), want)
    empty = lc.quantize_nf4(torch.empty(0, 7, device=DEVICE))
    assert launch_nf4_dequantize(*parts(empty), empty.shape, torch.float16, 64).shape == (0, 7)


def test_nf4_dequantize_kernel_changes_no_operand():
    q = lc.quantize_nf4(torch.randn(40, 64, device=DEVICE))
    before = [t.clone() for t in parts(q)]
    launch_nf4_dequantize(*parts(q), q.shape, torch.bfloat16, 64)
    assert all(torch.equal(a, b) for a, b in zip(parts(q), before, strict=True))


@pytest.mark.parametrize("byte", range(0, 256, 17))
def test_nf4_dequantize_kernel_reads_the_high_half_first(byte):
    from lora_core.quant.codebook import NF4_LEVELS

    codes = torch.full((16, 1), byte, dtype=torch.uint8, device=DEVICE)
    got = launch_nf4_dequantize(codes, torch.ones(1, device=DEVICE), None, None, (32,), torch.float32, 32)
    assert got.tolist() == pytest.approx([NF4_LEVELS[byte >> 4], NF4_LEVELS[byte & 15]] * 16, abs=0, rel=0)
