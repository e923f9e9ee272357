"""NF4 on the CPU, by compiled loops and by NumPy: the reference's bits."""

import importlib
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_core as lc
from lora_core.cpu import compiled
from lora_core.cpu.plain import nf4 as plain
from lora_core.ops.absmax_dequantize import absmax_dequantize
from lora_core.ops.nf4_dequantize import nf4_dequantize
from lora_core.ops.nf4_quantize import nf4_quantize, op
from lora_core.quant.codebook import codebook
from lora_core.quant.double import absmax_offset, dequantize_absmax, quantize_absmax
from lora_core.quant.packing import unpack
from lora_core.reference import nf4 as reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BLOCKS = [32, 64, 128, 4096]
SCALES = st.sampled_from([0.0, 1e-40, 1e-30, 1e-3, 1.0, 1e4, 3e38])
SAME_FOR_ALL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["compiled", "plain"])
def loops(request, monkeypatch):
    """Both ways to run, whatever the size."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    found = importlib.import_module("lora_core.cpu.compiled.nf4") if request.param == "compiled" else None
    calls = []
    monkeypatch.setattr(compiled, "load_for", lambda name, elements: calls.append(name) or found)
    yield found or plain
    assert set(calls) == {"nf4"}


@given(st.integers(0, 300), st.sampled_from(BLOCKS), st.sampled_from(DTYPES[:3]), SCALES, st.integers(0, 2**16))
@SAME_FOR_ALL
def test_cpu_quantises_to_the_bits_of_the_reference(loops, n, block_size, dtype, scale, seed):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * scale
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    for got, want in zip(nf4_quantize(weight, block_size), reference.nf4_quantize(weight, block_size), strict=True):
        assert torch.equal(got, want)


@given(st.integers(0, 300), st.sampled_from(BLOCKS), st.sampled_from(DTYPES), SCALES, st.booleans())
@SAME_FOR_ALL
def test_cpu_dequantises_to_the_bits_of_the_reference(loops, n, block_size, dtype, scale, nested):
    weight = (torch.randn(n, generator=torch.Generator().manual_seed(n)) * scale).clamp(-3e38, 3e38)
    q = lc.quantize_nf4(weight, block_size, nested)
    packed = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, q.shape, dtype, block_size)
    assert same_bits(nf4_dequantize(*packed), reference.nf4_dequantize(*packed))


@given(st.integers(1, 600), st.sampled_from([1, 7, 256]), SCALES)
@SAME_FOR_ALL
def test_cpu_decodes_scales_to_the_bits_of_the_reference(loops, count, block_size, scale):
    absmax = torch.rand(2 * count, generator=torch.Generator().manual_seed(count))[::2] * scale
    offset = absmax_offset(absmax)
    codes, absmax2 = quantize_absmax(absmax, offset, block_size)
    every_second = codes.repeat_interleave(2)[::2]
    want = dequantize_absmax(codes, absmax2, offset, block_size)
    assert same_bits(absmax_dequantize(every_second, absmax2, offset, block_size), want)


def test_cpu_decodes_no_scales_and_many(loops):
    for count in (0, 3 * 2**16 + 5):
        codes, offset = torch.arange(count).to(torch.uint8), torch.tensor([0.1])
        absmax2 = torch.linspace(1e-3, 1, -(-count // 256))
        assert torch.equal(absmax_dequantize(codes, absmax2, offset), dequantize_absmax(codes, absmax2, offset))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpu_gives_the_references_bits_on_many_chunks(loops, threads):
    # the last of 46 chunks is short, odd, and ends inside a block
    weight = torch.randn(3001, 4001).bfloat16()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        q = lc.quantize_nf4(weight, 64)
        plain = lc.quantize_nf4(weight, 64, double_quant=False)
        dense, single = q.dequantize(torch.bfloat16), plain.dequantize(torch.float16)
    finally:
        torch.set_num_threads(before)
    want, scales = reference.nf4_quantize(weight, 64)
    assert torch.equal(plain.codes.view(-1), want.view(-1)) and torch.equal(plain.absmax, scales)
    packed = (q.absmax, q.nested_absmax, q.nested_offset, weight.shape, torch.bfloat16, 64)
    assert same_bits(dense, reference.nf4_dequantize(want, *packed))
    assert same_bits(single, reference.nf4_dequantize(want, scales, None, None, weight.shape, torch.float16, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_decodes_every_byte_at_strange_scales(loops, dtype):
    """Infinity times the level 0, and NaN, are NaN; what is too large is infinite; a tie goes to the even neighbour."""
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    others = [float("inf"), 3.4e38, 1e-45, 70000.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]
    absmax = torch.cat([nans, torch.tensor(others)]).repeat_interleave(4)
    codes = torch.arange(256, dtype=torch.uint8).repeat(len(absmax) // 4, 1)
    packed = (codes.view(-1, 1), absmax, None, None, [len(codes), 512], dtype, 128)
    got, want = nf4_dequantize(*packed), reference.nf4_dequantize(*packed)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got[~got.isnan()], want[~want.isnan()])
    assert got[:3].isnan().all() and torch.equal(got[3, ::2].isnan(), torch.arange(256) // 16 == 7)


def test_cpu_quantises_ties_to_the_lower_code(loops):
    midpoints = codebook("nf4").midpoints
    weight = torch.cat([torch.ones(1), midpoints, torch.nextafter(midpoints, torch.ones(15)), torch.zeros(1)])
    codes, absmax = nf4_quantize(weight, 64)
    assert absmax == 1 and unpack(codes.view(-1), 32).tolist() == [15, *range(15), *range(1, 16), 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_works_in_inference_mode_on_many_threads(loops, dtype):
    """A tensor made in that mode may be written in no other, and each thread is in a mode of its own."""
    weight = torch.randn(1024, 1024)
    with torch.inference_mode():
        q = lc.quantize_nf4(weight)
        dense = q.dequantize(dtype)
    assert dense.is_inference()
    packed = (q.codes, q.absmax, q.nested_absmax, q.nested_offset, q.shape, dtype, 64)
    assert same_bits(dense.clone(), reference.nf4_dequantize(*packed))


def test_cpu_takes_any_strides(loops):
    weight = torch.randn(70, 90)
    q = lc.quantize_nf4(weight)
    parts = [t.repeat_interleave(2, 0)[::2] for t in (q.codes, q.absmax, q.nested_absmax)]
    assert not parts[0].is_contiguous()
    got = nf4_dequantize(*parts, q.nested_offset, q.shape, torch.bfloat16, 64)
    assert same_bits(got, reference.nf4_dequantize(*parts, q.nested_offset, q.shape, torch.bfloat16, 64))
    loose = weight.T.contiguous().T
    assert torch.equal(nf4_quantize(loose, 64)[0], nf4_quantize(weight, 64)[0])
    one_axis = weight.view(-1).repeat_interleave(2)[::2]
    assert torch.equal(nf4_quantize(one_axis, 64)[0], nf4_quantize(weight, 64)[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -0.0, 1e-45, 3.4e38])
def test_cpu_quantises_strange_values_as_the_reference_does(loops, value):
    """The operation itself, which is not asked whether the values are finite."""
    weight = torch.zeros(300) if value == 1e-45 else torch.linspace(-1, 1, 300)
    weight[70] = value
    (codes, absmax), (want, scales) = op(weight, 64), reference.nf4_quantize(weight, 64)
    assert torch.equal(codes, want) and torch.equal(absmax.isnan(), scales.isnan())
    assert torch.equal(absmax.nan_to_num(0), scales.nan_to_num(0))


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_cpu_paths_work_in_a_forked_worker():
    """As in a DataLoader's worker, which runs PyTorch on one thread; on more, PyTorch itself hangs after a fork."""
    code = (
        "import os, torch, lora_core as lc\n"
        "torch.set_num_threads(2)\n"
        "weight = torch.randn(700, 1500)\n"
        "q = lc.quantize_nf4(weight)\n"
        "dense = q.dequantize()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    torch.set_num_threads(1)\n"
        "    again = lc.quantize_nf4(weight)\n"
        "    os._exit(0 if torch.equal(again.codes, q.codes) and torch.equal(again.dequantize(), dense) else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_compiled_loop_refuses_bytes_with_gaps():
    numba = pytest.importorskip("numba")
    loops = importlib.import_module("lora_core.cpu.compiled.nf4")
    codes, absmax, values = np.zeros(32, np.uint8)[::2], np.ones(1, np.float32), np.empty(32, np.float32)
    with pytest.raises(numba.TypingError, match="want contiguous ones"):
        loops.decode(codes, absmax, values, 32, 0, 32, False)


LOADING = """
import sys
import torch
import lora_core as lc
from lora_core.cpu import compiled

small, large = torch.randn(64, 64), torch.randn(512, 512)
lc.quantize_nf4(small).dequantize()
assert "numba" not in sys.modules
{prepare}
want = lc.quantize_nf4(large)
assert (compiled.load_for("nf4", 0) is not None) is {loaded}
assert torch.isfinite(want.dequantize()).all()
"""


@pytest.mark.parametrize(
    ("prepare", "loaded"),
    [
        ("", True),
        # neither beside the sources nor in the home folder is there room for what was compiled
        ("import numba.core.caching as c; c.CacheImpl._locator_classes = []", True),
        # not installed
        (
            "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'numba' else find(n)",
            False,
        ),
        # installed, and not for this NumPy
        ("sys.modules['numba'] = None; import importlib.util as u; u.find_spec = lambda n: True", False),
        # installed, and switched off
        ("import os; os.environ['NUMBA_DISABLE_JIT'] = '1'", False),
    ],
)
def test_numba_is_loaded_for_large_weights_where_it_works(prepare, loaded):
    if loaded:
        pytest.importorskip("numba")
    run = subprocess.run(
        [sys.executable, "-c", LOADING.format(prepare=prepare, loaded=loaded)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_numpys_loops_encode_what_is_not_finite_without_a_warning():
    values, codes, absmax = np.full(64, np.inf, np.float32), np.zeros(32, np.uint8), np.zeros(1, np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.encode(values, codes, absmax, 64)
    assert absmax[0] == np.inf


TOGETHER = """
import sys
import torch
import lora_core as lc
from lora_core.cpu import compiled

w = lc.quantize_nf4(torch.randn(64, 64))
calls = 1
compiled.WORTHWHILE_TOGETHER = 10 * (64 * 64 + compiled.OF_A_CALL)
want = w.dequantize()
while "numba" not in sys.modules:
    calls += 1
    assert torch.equal(w.dequantize(), want)
assert calls == 9, calls
"""


def test_numba_is_loaded_for_many_small_weights_too():
    """The tenth small call has it: nine dequantise, after one that quantises."""
    pytest.importorskip("numba")
    run = subprocess.run([sys.executable, "-c", TOGETHER], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


IMPORTING = """
import sys
import threading
import time
import torch
import lora_core as lc

weight, failures = torch.randn(512, 512), []

def work(first):
    try:
        while not first and "lora_core.cpu.compiled.nf4" not in sys.modules:
            time.sleep(0.001)
        lc.quantize_nf4(weight).dequantize()
    except BaseException as failure:
        failures.append(failure)

threads = [threading.Thread(target=work, args=(first,)) for first in (True, False)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
"""


def test_a_thread_waits_for_loops_that_another_one_imports():
    pytest.importorskip("numba")
    run = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("nested", [False, True])
def test_cpu_takes_scales_of_any_shape(loops, nested):
    q = lc.quantize_nf4(torch.randn(100, 64), double_quant=nested)
    second = (q.nested_absmax[:, None], q.nested_offset.view(1, 1)) if nested else (None, None)
    assert torch.equal(nf4_dequantize(q.codes, q.absmax[:, None], *second, q.shape, q.dtype), q.dequantize())


@pytest.mark.parametrize("features", ["", "-f16c,+avx2"])
def test_cpu_decodes_for_the_processor_that_numba_compiles_for(features, tmp_path):
    """It may be told of another, as for a cache that several share: what rounds to float16 is an instruction."""
    pytest.importorskip("numba")
    program = """
import torch
import lora_core as lc
from lora_core.reference import nf4
q = lc.quantize_nf4(torch.randn(1024, 1024), double_quant=False)
want = nf4.nf4_dequantize(q.codes, q.absmax, None, None, q.shape, torch.float16, 64)
assert torch.equal(q.dequantize(torch.float16), want)
"""
    told = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=os.environ | told, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
