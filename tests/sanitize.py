"""Launches every kernel, for NVIDIA's compute-sanitizer to watch: reads and writes out of bounds, and races.

    compute-sanitizer --tool memcheck python3 tests/sanitize.py
    compute-sanitizer --tool racecheck python3 tests/sanitize.py

Sizes end inside a tile and inside a 16-byte load, or fill both; each allocation is CUDA's own, so that one element too
far is seen. Without a GPU the kernels run in Triton's interpreter, which shows that the file is sound, no more.
"""

import itertools
import os
import sys
from pathlib import Path

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import lora_core as lc
from lora_core.kernels import (
    absmax_dequantize,
    absmax_quantize,
    dora_norm,
    grouped_lora,
    lora_linear,
    lora_linears,
    nf4_dequantize,
    nf4_lora_linear,
    nf4_quantize,
    rms_norm,
    rotary,
    swiglu,
)
from lora_core.kernels.crossover import PATHS
from lora_core.ops.packed import Packed, flatten

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# M, N, K, R: nothing a multiple of anything, and everything
SIZES = ((3, 17, 19, 3), (70, 33, 35, 5), (16, 64, 128, 16), (80, 64, 128, 32))


def main() -> int:
    """Run everything once; return 0, so that what a sanitizer returns is its own."""
    for (m, n, k, r), dtype in itertools.product(SIZES, DTYPES):
        torch.manual_seed(0)
        low = torch.float32 if m == 70 else dtype
        x, weight, bias = (torch.randn(*size, device=DEVICE).to(dtype) for size in ((m, k), (n, k), (n,)))
        lora_a, lora_b = (torch.randn(*size, device=DEVICE).to(low) for size in ((r, k), (n, r)))
        d_y, seed = torch.randn(m, n, device=DEVICE).to(dtype), torch.tensor([7], device=DEVICE)
        w = quantisers(weight)
        adapter = (lora_a, lora_b, 0.5, 0.3, seed)
        for path in PATHS:
            dense_layers(x, weight, bias, adapter, d_y, path)
            packed_layers(x, w, bias, adapter, d_y, path)
            several_layers(x, weight, w, bias, adapter, path)
        dora_norm.launch_dora_norm(weight, lora_a, lora_b, 0.5)
        dora_norm.launch_nf4_dora_norm(*w, dtype, lora_a, lora_b, 0.5)
        groups(x, d_y, lora_a, lora_b)
        y, root = rms_norm.launch_rms_norm(x, weight[0], 1e-6)
        rms_norm.launch_rms_norm_backward(y, x, weight[0], root, True)
        gates(dtype, m, n)
        heads(dtype, m, k)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run")
    return 0


def quantisers(weight: torch.Tensor) -> Packed:
    """Quantise and dequantise, the scales too; return the weight with quantised scales."""
    codes, absmax = nf4_quantize.launch_nf4_quantize(weight, 32)
    nf4_dequantize.launch_nf4_dequantize(codes, absmax, None, None, weight.shape, weight.dtype, 32)
    offset = absmax.mean().reshape(1)
    scale_codes, nested = absmax_quantize.launch_absmax_quantize(absmax, offset, 256)
    absmax_dequantize.launch_absmax_dequantize(scale_codes, nested, offset, 256)
    nf4_dequantize.launch_nf4_dequantize(codes, scale_codes, nested, offset, weight.shape, weight.dtype, 32)
    return Packed.of(lc.quantize_nf4(weight))


def dense_layers(x, weight, bias, adapter, d_y, path) -> None:
    y, hidden = lora_linear.launch_lora_linear(x, weight, bias, *adapter, path)
    lora_a, lora_b, *rest = adapter
    needs = (True,) * 5
    lora_linear.launch_lora_linear_backward(d_y, x, weight, lora_a, lora_b, hidden, *rest, needs, path)


def packed_layers(x, w, bias, adapter, d_y, path) -> None:
    # panels as small as they can be
    y, hidden = nf4_lora_linear.launch_nf4_lora_linear(x, *w, bias, *adapter, path, panel_bytes=1)
    lora_a, lora_b, *rest = adapter
    needs = (True,) * 4
    nf4_lora_linear.launch_nf4_lora_linear_backward(d_y, x, *w, lora_a, lora_b, hidden, *rest, needs, path, 1)


def several_layers(x, weight, w, bias, adapter, path) -> None:
    tensors, formats = flatten([weight, w])
    lora_a, lora_b, scaling, dropout, seed = adapter
    pairs = ([lora_a] * 2, [lora_b] * 2)
    rest = ([scaling] * 2, [dropout, 0.0], [seed] * 2)
    *ys, hidden = lora_linears.launch_lora_linears(x, tensors, formats, [bias] * 2, *pairs, *rest, path)
    lora_linears.launch_lora_linears_backward(ys, x, tensors, formats, *pairs, hidden, *rest, True, True, path)


def groups(x, d_y, lora_a, lora_b) -> None:
    ranks = [1, len(lora_a) - 1]
    adapter = torch.arange(len(x), device=DEVICE) % 3 - 1
    scaling = torch.ones(2, device=DEVICE)
    y, hidden = grouped_lora.launch_grouped_lora(x, d_y, lora_a, lora_b, ranks, adapter, scaling)
    grouped_lora.launch_grouped_lora_backward(
        d_y, x, lora_a, lora_b, ranks, adapter, scaling, hidden, (True, True, True)
    )


def gates(dtype, m, n) -> None:
    # contiguous, and the halves of one product
    for columns in (n, 1024 + n):
        gate, up = torch.randn(m, 2 * columns, device=DEVICE).to(dtype).chunk(2, -1)
        swiglu.launch_swiglu_backward(swiglu.launch_swiglu(gate, up), gate, up)


def heads(dtype, m, k) -> None:
    # token by token, and head by head
    x = torch.randn(2, m, 3, 2 * k, device=DEVICE).to(dtype).transpose(1, 2)
    cos, sin = torch.randn(2, 1, m, 2 * k, device=DEVICE).to(dtype)
    y = rotary.launch_rotary(x, cos, sin)
    rotary.launch_rotary_backward(y.contiguous(), cos.expand(2, m, 2 * k), sin.expand(2, m, 2 * k))


if __name__ == "__main__":
    sys.exit(main())
