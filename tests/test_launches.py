"""What a kernel's file lists is what is launched: that is what the compiler's output is looked through for."""

import inspect
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import compiled_as, listed, recorded

from benchmarks.codegen import kernel_names, variants_of
from lora_core.kernels import nf4_levels, shrink
from lora_core.kernels.absmax_dequantize import launch_absmax_dequantize
from lora_core.kernels.absmax_quantize import launch_absmax_quantize
from lora_core.kernels.dora_norm import launch_dora_norm, launch_nf4_dora_norm
from lora_core.kernels.grouped_lora import launch_grouped_lora, launch_grouped_lora_backward
from lora_core.kernels.lora_linear import launch_lora_linear, launch_lora_linear_backward
from lora_core.kernels.lora_linears import launch_lora_linears, launch_lora_linears_backward
from lora_core.kernels.nf4_columns import launch_nf4_columns
from lora_core.kernels.nf4_dequantize import launch_nf4_dequantize
from lora_core.kernels.nf4_lora_linear import launch_nf4_lora_linear, launch_nf4_lora_linear_backward
from lora_core.kernels.nf4_matmul import launch_nf4_matmul
from lora_core.kernels.nf4_quantize import launch_nf4_quantize
from lora_core.kernels.rms_norm import launch_rms_norm, launch_rms_norm_backward
from lora_core.kernels.rotary import launch_rotary, launch_rotary_backward
from lora_core.kernels.swiglu import launch_swiglu, launch_swiglu_backward
from lora_core.kernels.variant import DTYPE_PAIRS
from lora_core.ops.packed import Packed, flatten
from lora_core.quant.blockwise import BLOCK_SIZES

pytestmark = pytest.mark.interpreted


SIZES = (1, 2, 3, 8, 15, 16, 17, 24, 32, 33, 48, 64, 65, 80, 128, 130)
RANKS = (1, 2, 8, 16, 24, 64, 100)
LAYOUTS = ("whole", "whole", "columns", "every other", "begun", "wider", "expanded", "rows apart")


class Operands:
    """Operands of any layout, drawn at random; what they hold does not matter, as nothing is run."""

    def __init__(self, seed):
        self.draw = random.Random(seed)

    def begun(self, t, by=(0, 1, 4, 16)):
        """A view into a larger buffer."""
        skipped = self.draw.choice(by)
        return t.new_zeros(t.numel() + skipped)[skipped:].view(t.shape)

    def matrix(self, rows, columns, dtype):
        t = torch.zeros(rows, columns, dtype=dtype)
        layout = self.draw.choice(LAYOUTS)
        if layout == "columns":
            return t.T.contiguous().T
        if layout == "every other":
            return t.repeat_interleave(2, -1)[:, ::2]
        if layout == "begun":
            return self.begun(t)
        if layout == "wider":
            return t.new_zeros(rows, columns + self.draw.choice((1, 8, 16)))[:, :columns]
        if layout == "expanded":
            return t[:1].expand(rows, columns)
        return t.repeat_interleave(2, 0)[::2] if layout == "rows apart" else t

    def weight(self, n, k):
        """The parts of an NF4 weight."""
        block_size, nested_block = self.draw.choice(BLOCK_SIZES), self.draw.choice((256, 256, 100))
        blocks = -(-n * k // block_size)
        codes = self.begun(torch.zeros((n * k + 1) // 2, 1, dtype=torch.uint8))
        if self.draw.random() < 0.5:
            return codes, torch.ones(blocks), None, None, (n, k), block_size, nested_block
        scales = self.begun(torch.zeros(blocks, dtype=torch.uint8))
        nested = torch.ones(-(-blocks // nested_block)), torch.zeros(3)[1]
        return codes, scales, *nested, (n, k), block_size, nested_block


@settings(max_examples=100)
@given(st.integers(0, 2**32))
def test_operands_of_any_layout_are_launched_as_listed(seed):
    """Nothing is run: what matters is how it would be compiled."""
    o = Operands(seed)
    (dtype, low), choose = o.draw.choice(DTYPE_PAIRS), o.draw.choice
    (m, n, k), r, p = (choose(SIZES) for _ in range(3)), choose(RANKS), choose((0.0, 0.4))
    x, weight, d_y = o.matrix(m, k, dtype), o.matrix(n, k, dtype), o.matrix(m, n, dtype)
    a, b, hidden = o.matrix(r, k, low), o.matrix(n, r, low), o.matrix(m, r, low)
    bias = choose((None, torch.zeros(2 * n, dtype=dtype)[1::2]))
    packed, path, panels = o.weight(n, k), choose(("fused", "library")), choose((1, 2**20))
    ranks = [choose((0, 1, 8, 17)) for _ in range(choose((1, 3, 70)))]
    adapter, scaling = torch.zeros(m, dtype=torch.int64), torch.ones(2 * len(ranks))[::2]
    grouped = (o.matrix(sum(ranks), k, low), o.matrix(n, sum(ranks), low), ranks, adapter, scaling)
    drop, needs = (0.5, p, torch.tensor([1, 2])[1:]), tuple(o.draw.random() < 0.7 for _ in range(5))
    with recorded(run=False) as found:
        launch_lora_linear(x, weight, bias, a, b, *drop, path=path)
        launch_lora_linear_backward(d_y, x, weight, a, b, hidden, *drop, needs, path=path)
        launch_nf4_lora_linear(x, *packed, bias, a, b, *drop, path=path, panel_bytes=panels)
        rest = (a, b, hidden, *drop, needs[:4])
        launch_nf4_lora_linear_backward(d_y, x, *packed, *rest, path=path, panel_bytes=panels)
        tensors, formats = flatten([weight, Packed(*packed)])
        pairs, drops = ([a, a], [b, b]), ([0.5] * 2, [p] * 2, [drop[2]] * 2)
        launch_lora_linears(x, tensors, formats, [x[0, :0]] * 2, *pairs, *drops, path)
        launch_lora_linears_backward(
            [d_y] * 2, x, tensors, formats, *pairs, torch.cat([hidden] * 2, 1), *drops, needs[0], needs[1], path
        )
        launch_dora_norm(choose((weight, weight.double())), a, b, 0.5)
        launch_nf4_dora_norm(*packed, choose((dtype, torch.float64)), a, b, 0.5)
        launch_nf4_dequantize(*packed[:5], dtype, *packed[5:])
        launch_absmax_quantize(packed[1].float(), torch.zeros(3)[2], packed[6])
        if packed[2] is not None:
            launch_absmax_dequantize(packed[1], *packed[2:4], packed[6])
        launch_nf4_quantize(weight, packed[5])
        sums = launch_grouped_lora(x, choose((None, d_y)), *grouped)[1]
        launch_grouped_lora_backward(d_y, x, *grouped, sums, needs[:3])
        norm = o.begun(torch.zeros(k, dtype=dtype))
        launch_rms_norm(x, norm, 1e-6)
        launch_rms_norm_backward(o.matrix(m, k, dtype), x, norm, torch.ones(m), needs[0])
        heads = o.matrix(m, 2 * k * 3, dtype).unflatten(1, (3, 2 * k)).transpose(0, 1)[None]
        angles = [o.matrix(m, 2 * k, dtype)[None] for _ in range(2)]
        launch_rotary(heads, *angles)
        launch_rotary_backward(heads, *angles)
        # as they are, and long enough to be read where they lie
        columns = choose((n, 1024 + n))
        d_mlp, gate, up = (o.matrix(m, columns, dtype) for _ in range(3))
        launch_swiglu(gate, up)
        launch_swiglu_backward(d_mlp, gate, up)
    assert found <= listed(), sorted(map(str, found - listed()))[:1]


def test_levels_are_shuffled_wherever_nothing_is_interpreted():
    """What is listed; a launch may only be asked for the table."""
    assert nf4_levels.SHUFFLED is not nf4_levels.INTERPRETED.value
    for launch in (launch_nf4_dequantize, launch_nf4_matmul, launch_nf4_columns):
        assert inspect.signature(launch).parameters["shuffled"].default is nf4_levels.SHUFFLED
    assert {v.constants.get("SHUFFLED", True) for name in kernel_names() for v in variants_of(name)} == {True}


def launched():
    x, lora_a = torch.zeros(3, 32), torch.zeros(4, 32)
    with recorded() as found:
        shrink.launch_shrink(x, lora_a)
    return found


def test_a_launch_that_is_listed_is_found():
    (found,) = launched()
    assert found in listed()


def test_a_launch_with_other_options_is_not_listed(monkeypatch):
    listed()
    monkeypatch.setitem(shrink.WARPS, 16, 2)
    (found,) = launched()
    assert found not in listed()


@pytest.mark.parametrize(
    "change", [{"K": 33}, {"stride_xm": 40}, {"stride_xk": 2}, {"x_ptr": torch.zeros(99)[1:]}], ids=lambda c: [*c][0]
)
def test_a_form_that_does_not_fit_is_not_listed(change):
    """The arguments of a launch, one changed to what its form does not take for granted."""
    x, lora_a, s = torch.zeros(3, 32), torch.zeros(4, 32), torch.zeros(3, 4)
    seed = torch.zeros(1, dtype=torch.int64)
    arguments = {
        "x_ptr": x, "a_ptr": lora_a, "seed_ptr": seed, "s_ptr": s, "M": 3, "K": 32, "R": 4, "stride_xm": 32,
        "stride_xk": 1, "stride_ar": 32, "stride_ak": 1, "k_per_split": 32, "factor": 1.0, "threshold": 0,
    }  # fmt: skip
    rest = {
        "DROPOUT": False,
        "BLOCK_M": 16,
        "BLOCK_K": 32,
        "BLOCK_R": 16,
        **shrink._options(shrink._WIDE, torch.float32, 16),
    }
    kernel = shrink._WIDE.kernel
    assert compiled_as(kernel, tuple(arguments.values()), rest) in listed()
    assert compiled_as(kernel, tuple((arguments | change).values()), rest) not in listed()
