"""What only a GPU can show of the kernels: capture in a CUDA graph, streams, compilation, sizes past 2^31."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tolerance import UNIT_FP32, assert_within_bound

import lora_core as lc
from lora_core.kernels.lora_linear import launch_lora_linear, launch_lora_linear_backward
from lora_core.kernels.nf4_dequantize import launch_nf4_dequantize
from lora_core.kernels.nf4_lora_linear import launch_nf4_lora_linear
from lora_core.kernels.nf4_matmul import launch_nf4_matmul
from lora_core.kernels.nf4_quantize import launch_nf4_quantize
from lora_core.kernels.shrink import variants
from lora_core.ops.grouped_lora import grouped_lora
from lora_core.ops.packed import Packed
from lora_core.reference import nf4 as reference

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent


def layer(m, n=256, k=512, r=16):
    x, weight, lora_a, lora_b = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k), (r, k), (n, r))
    )
    return x, weight, None, lora_a, lora_b


@pytest.mark.parametrize("name", ["dense fused", "dense library", "nf4 few", "nf4 many", "backward", "grouped"])
def test_kernels_can_be_captured_in_a_cuda_graph(name):
    """No launch waits for the host; replayed on new values, the graph gives what a direct call gives."""
    x, weight, _, lora_a, lora_b = layer(8 if name == "nf4 few" else 200)
    q = lc.quantize_nf4(weight)
    seed = torch.tensor([5], device="cuda")
    adapter = torch.randint(-1, 2, (len(x),), device="cuda")
    scaling = torch.ones(2, device="cuda")

    def run():
        if name.startswith("dense"):
            return launch_lora_linear(x, weight, None, lora_a, lora_b, 0.5, 0.3, seed, name.split()[1])[0]
        if name.startswith("nf4"):
            return launch_nf4_lora_linear(x, *Packed.of(q), None, lora_a, lora_b, 0.5, 0.3, seed)[0]
        if name == "grouped":
            return grouped_lora(x, lora_a, lora_b, [10, 6], adapter, scaling)
        y, hidden = launch_lora_linear(x, weight, None, lora_a, lora_b, 0.5, 0.3, seed)
        return launch_lora_linear_backward(
            y, x, weight, lora_a, lora_b, hidden, 0.5, 0.3, seed, (True, False, False, True, True)
        )[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.copy_(torch.randn_like(x))
    seed.fill_(9)
    adapter.copy_(adapter.flip(0))
    graph.replay()
    assert torch.equal(y, run())


def test_the_first_call_may_be_the_one_that_prepares_a_cuda_graph():
    """torch.compile refuses memory of its graphs that outlives the call, as the kernels' tables do."""
    program = """
import torch
import lora_core as lc
from lora_core.ops.grouped_lora import grouped_lora

x, w, a, b = (torch.randn(*shape, device="cuda") for shape in ((3, 64), (32, 64), (5, 64), (32, 5)))
q = lc.quantize_nf4(w)
adapter, scaling = torch.tensor([0, 1, -1], device="cuda"), torch.ones(2, device="cuda")


def run(x):
    return lc.nf4_lora_linear(x, q, None, a, b, 0.5), grouped_lora(x, a, b, [2, 3], adapter, scaling)


compiled = torch.compile(run, mode="reduce-overhead")
with torch.no_grad():
    runs = [[y.clone() for y in compiled(x)] for _ in range(4)]
    want = run(x)
assert all(torch.equal(y, z) for ys in runs for y, z in zip(ys, want))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_kernels_run_on_the_current_stream():
    """Work queued behind a long task on a side stream sees what that task wrote."""
    x, weight, _, lora_a, lora_b = layer(300)
    want, _ = launch_lora_linear(x, weight, None, lora_a, lora_b, 0.5, 0.0, None)
    slow = torch.zeros_like(x)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        slow.copy_(x)
        y, _ = launch_lora_linear(slow, weight, None, lora_a, lora_b, 0.5, 0.0, None)
    torch.cuda.synchronize()
    assert torch.equal(y, want)


def test_the_number_of_tokens_compiles_nothing_anew():
    kernels = list({id(v.form): v.form.kernel for v in variants()}.values())

    def compiled():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    for m in (17, 64):
        launch_lora_linear(*layer(m), 0.5, 0.0, None, "fused")
    before = compiled()
    assert before
    for m in (18, 33, 65, 100, 128, 129, 1000):
        launch_lora_linear(*layer(m), 0.5, 0.0, None, "fused")
    assert compiled() == before


def test_weights_of_more_than_2_to_the_31_elements_dequantise_to_the_bit():
    rows, columns = 2**16 + 8, 2**15
    codes = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * columns // 64, device="cuda")
    w = launch_nf4_dequantize(codes, absmax, None, None, (rows, columns), torch.bfloat16, 64)
    tail = 64 * 4096
    want = reference.nf4_dequantize(codes[-tail // 2 :], absmax[-tail // 64 :], None, None, (tail,), torch.bfloat16, 64)
    assert torch.equal(w.view(-1)[-tail:], want)


def test_products_with_weights_of_more_than_2_to_the_31_elements_take_every_row():
    rows, columns, tail = 2**16 + 64, 2**15, 64
    codes = torch.randint(256, (rows * columns // 2, 1), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(rows * columns // 64, device="cuda")
    parts = (codes, absmax, None, None, (rows, columns), 64, 256)
    behind = (codes[-tail * columns // 2 :], absmax[-tail * columns // 64 :], None, None, (tail, columns))
    w = reference.nf4_dequantize(*behind, torch.bfloat16, 64).double()
    x, d_y = (torch.randn(3, n, device="cuda").bfloat16() for n in (columns, tail))
    none = x.new_empty(3, 0)
    y = launch_nf4_matmul(x, *parts, None, none, x.new_empty(rows, 0), 1.0)[:, -tail:]
    # of the sum over rows, only those behind take part
    padded = torch.cat([d_y.new_zeros(3, rows - tail), d_y], 1)
    d_x = launch_nf4_matmul(padded, *parts, None, none, x.new_empty(columns, 0), 1.0, transposed=True)
    for got, left, right in ((y, x.double(), w.T), (d_x, d_y.double(), w)):
        truth = left @ right
        sums = 2 * UNIT_FP32 * left.shape[1] ** 0.5 * (left.abs() @ right.abs())
        assert_within_bound(got, truth, torch.finfo(torch.bfloat16).eps / 2 * truth.abs() + sums)


def test_weights_of_more_than_2_to_the_31_elements_quantise_to_the_bit():
    rows, columns, tail = 2**16 + 8, 2**15, 8 * 2**15
    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    codes, absmax = launch_nf4_quantize(weight, 64)
    want_codes, want_absmax = reference.nf4_quantize(weight.view(-1)[-tail:], 64)
    assert torch.equal(codes[-tail // 2 :], want_codes) and torch.equal(absmax[-tail // 64 :], want_absmax)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_levels_by_shuffles_are_the_bits_of_the_table(dtype, nested):
    """Inline assembly, which the interpreter cannot run, beside the plain way: alone and inside a product."""
    q = lc.quantize_nf4(torch.randn(72, 256, device="cuda"), 64, nested)
    parts = Packed.of(q)
    given = (*parts[:5], dtype, *parts[5:])
    assert torch.equal(launch_nf4_dequantize(*given, True), launch_nf4_dequantize(*given, False))
    x, hidden, lora_b = (torch.randn(*size, device="cuda", dtype=dtype) for size in ((5, 256), (5, 3), (72, 3)))
    ways = [launch_nf4_matmul(x, *parts, None, hidden, lora_b, 0.5, shuffled=way) for way in (True, False)]
    assert torch.equal(*ways)


def test_the_first_call_of_an_operation_loads_its_kernel():
    """Importing the library does not import Triton; the operation's first call on the GPU does, and runs the kernel."""
    program = """
import sys
import torch
import lora_core as lc
from lora_core import backends
assert backends.implementation("lora_linear", "cuda") == "lora_core.kernels.lora_linear"
assert "lora_core.kernels.lora_linear" not in sys.modules
x, w, a, b = (torch.randn(*s, device="cuda", requires_grad=True) for s in ((3, 8), (5, 8), (2, 8), (5, 2)))
y = lc.lora_linear(x, w.detach(), None, a, b, 0.5)
assert "lora_core.kernels.lora_linear" in sys.modules
y.sum().backward()
assert x.grad is not None and a.grad is not None
assert torch.equal(y, lc.lora_linear(x, w.detach(), None, a, b, 0.5))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
