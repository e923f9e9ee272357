"""Bytes and operations of a comparison are the least that the work takes, counted here by hand."""

import pytest

from benchmarks.cases import dora_norm, grouped_lora, lora_linear, nf4_lora_linear
from benchmarks.run import cases_of

SHAPE = {"M": 8, "N": 16, "K": 64, "R": 2}
X, Y, W, BIAS, PAIR = 8 * 64, 8 * 16, 16 * 64, 16, 2 * (16 + 64)
# read and written: x, W, bias, A and B, y; dL/dy, x, W, A and B, the gradients of x, A and B; W, x, A and B read once
FORWARD = X + W + BIAS + PAIR + Y
BACKWARD = Y + X + W + PAIR + X + PAIR
BOTH = X + W + BIAS + PAIR + Y + Y + X + PAIR
MOVED = {"fwd": FORWARD, "bwd": BACKWARD, "fwdbwd": BOTH}


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    """What a case counts does not depend on whether torch.compile works."""
    monkeypatch.setattr("benchmarks.modes.why_uncompiled", lambda device: "takes seconds")


@pytest.mark.parametrize("mode", MOVED)
def test_bytes_of_a_layer_count_every_tensor_once(mode):
    dense, four_bit = (
        next(c for c in cases_of(op, SHAPE, "cpu") if c.mode == mode) for op in ("lora_linear", "nf4_lora_linear")
    )
    assert dense.bytes_moved == 4 * MOVED[mode]
    # 1024 codes of 4 bits, 16 scales' codes, one second-level scale
    assert four_bit.bytes_moved == 4 * (MOVED[mode] - W) + 512 + 16 + 4


@pytest.mark.parametrize("mode", MOVED)
def test_bytes_of_three_layers_count_their_x_once(mode):
    case = next(c for c in cases_of("lora_linears", SHAPE, "cpu") if c.mode == mode)
    layers = {
        "fwd": X + 3 * (W + PAIR + Y),
        "bwd": X + X + 3 * (Y + W + PAIR + PAIR),
        "fwdbwd": X + X + 3 * (W + PAIR + Y + Y + PAIR),
    }
    assert case.bytes_moved == 4 * layers[mode]


def test_operations_of_a_layer_are_those_of_the_cheapest_way():
    # few tokens: x W^T, x A^T, S B^T; dL/dy W and dL/dy B, dS A, dS^T x, dL/dy^T S
    assert lora_linear.flops(SHAPE, "fwd") == 2 * 8 * (16 * 64 + 64 * 2 + 16 * 2)
    assert lora_linear.flops(SHAPE, "bwd") == 2 * 8 * (16 * 64 + 16 * 2 + 64 * 2 + 64 * 2 + 16 * 2)
    assert lora_linear.flops(SHAPE, "fwdbwd") == lora_linear.flops(SHAPE, "fwd") + lora_linear.flops(SHAPE, "bwd")
    # 100 tokens of a square layer: W + s B A is made first, and both directions multiply with it
    many = {"M": 100, "N": 10, "K": 10, "R": 2}
    merged, product, half = 10 * 10 * 2, 100 * 10 * 10, 100 * 2 * 10
    assert lora_linear.flops(many, "fwd") == 2 * (merged + product)
    assert lora_linear.flops(many, "bwd") == 2 * (merged + product + 3 * half)
    assert lora_linear.flops(many, "fwdbwd") == 2 * (merged + 2 * product + 4 * half)
    # rank 10: dL/dW is one product more, and dA and dB are products with it
    full = {**many, "R": 10}
    assert lora_linear.flops(full, "bwd") == 2 * (1000 + 2 * product + 2 * 1000)
    assert lora_linear.flops(full, "fwdbwd") == 2 * (1000 + 3 * product + 2 * 1000)


def test_a_mixed_batch_counts_rows_with_an_adapter_and_adapters_with_rows():
    shape = {"M": 8, "N": 16, "K": 64, "R": 4, "G": 9}
    # rows 3 and 7 have none; the others adapters 0 to 5 of ranks 4, 2, 1, 4, 2, 1, of 9 of ranks 21 in all
    own, present, all_ranks = 6, 14, 21
    products = 2 * (16 + 64) * present
    found = {c.mode: c for c in cases_of("grouped_lora", shape, "cpu")}
    assert {mode: c.flops for mode, c in found.items()} == {
        "fwd": products,
        "bwd": 2 * products,
        "fwdbwd": 3 * products,
    }
    x, d_y, y, d_x = own * 64, own * 16, 8 * 16, 8 * 64
    read, written = 80 * present, 80 * all_ranks
    assert found["fwd"].bytes_moved == 4 * (read + x + y + y)
    assert found["bwd"].bytes_moved == 4 * (read + x + d_y + d_x + written)
    assert found["fwdbwd"].bytes_moved == 4 * (read + x + y + y + d_y + d_x + written)


def test_rows_that_share_an_adapter_share_its_bytes_and_not_its_operations():
    moved, flops = grouped_lora.least({"M": 4, "N": 5, "K": 7}, [3], [0, 0, -1, 0], "fwd")
    assert moved == 3 * (5 + 7) + 3 * 7 + 2 * 4 * 5 and flops == 3 * 2 * 3 * (5 + 7)


def test_bytes_of_a_norm_count_the_adapter_and_the_norms():
    dense, four_bit = cases_of("dora_norm", {"N": 64, "K": 512, "R": 4}, "cpu")
    rest = 4 * 4 * (64 + 512) + 4 * 64
    assert dense.bytes_moved == 4 * 64 * 512 + rest
    # 512 scales, two second-level ones
    assert four_bit.bytes_moved == 64 * 512 // 2 + 512 + 2 * 4 + rest
    assert dora_norm.BLOCK_SIZE == nf4_lora_linear.BLOCK_SIZE


@pytest.mark.parametrize("adapters", [1, 4, 15, 16, 64])
def test_every_adapter_of_a_mixed_batch_has_rows(adapters, monkeypatch):
    """A sweep over adapters counts those that it names."""
    seen = []
    monkeypatch.setattr(grouped_lora, "least", lambda shape, ranks, adapter, mode: seen.append(adapter) or (0, 0))
    next(grouped_lora.cases({"M": 256, "N": 8, "K": 8, "R": 2, "G": adapters}, "cpu"))
    assert set(seen[0]) == set(range(-1, adapters)) and seen[0].count(-1) == 64
