"""Stores past the caches: the same bits, and only to whole lines."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.cpu import compiled
from lora_core.cpu import nf4_dequantize as dequantize
from lora_core.ops.nf4_dequantize import nf4_dequantize
from lora_core.reference import nf4 as reference

numba = pytest.importorskip("numba")

from lora_core.cpu.compiled import nf4, stream  # noqa: E402

# of x86, and of Arm
STREAMING = re.compile(r"\bv?movnt|\bstnp\b")
UNTOUCHED = 0x5A


@given(
    st.integers(1, 400),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([np.float32, np.uint16, np.uint32, np.int16]),
    st.integers(0, stream.LINE - 1),
    st.integers(0, 2**16),
)
def test_streamed_values_have_the_bits_of_others_wherever_they_lie(n, block_size, kind, offset, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, -(-n // 2), np.uint8)
    absmax = rng.standard_normal(-(-n // block_size)).astype(np.float32)
    want = np.empty(n, kind)
    nf4.decode(codes, absmax, want, block_size, 0, n, False)
    size = np.dtype(kind).itemsize
    room = np.full(n * size + 3 * stream.LINE, UNTOUCHED, np.uint8)
    # at offset 0 a line begins there; at others none, or NumPy's numbers are not even aligned
    start = -room.ctypes.data % stream.LINE + offset
    got = room[start : start + n * size].view(kind)
    assert stream.starts_a_line(got) is (offset == 0)
    nf4.decode(codes, absmax, got, block_size, 0, n, True)
    assert got.tobytes() == want.tobytes()
    assert (room[:start] == UNTOUCHED).all() and (room[start + n * size :] == UNTOUCHED).all()


def test_streaming_is_what_the_processor_is_told():
    # anew, as code that was kept cannot be looked at
    decode = numba.njit(nf4.decode.py_func)
    decode(np.zeros(32, np.uint8), np.ones(1, np.float32), np.empty(64, np.float32), 64, 0, 64, True)
    (assembly,) = decode.inspect_asm().values()
    assert STREAMING.search(assembly)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_results_in_memory_that_is_there_are_streamed(dtype, monkeypatch):
    flags = []

    class Loops:
        ROUNDS_TO_FLOAT16 = nf4.ROUNDS_TO_FLOAT16

        @staticmethod
        def dequantize(*arguments):
            flags.append(arguments[-1])
            nf4.dequantize(*arguments)

    monkeypatch.setattr(compiled, "load_for", lambda name, elements: Loops)
    monkeypatch.setattr(dequantize, "STREAMED_BYTES", 2**22)
    for rows, there, streamed in ((1, True, False), (8, True, True), (8, False, False)):
        monkeypatch.setattr(dequantize, "is_resident", lambda t, there=there: there)
        shape = (rows, 2**19 + 3)
        codes = torch.randint(0, 256, (-(-shape[0] * shape[1] // 2), 1), dtype=torch.uint8)
        absmax = torch.rand(-(-shape[0] * shape[1] // 64))
        flags.clear()
        got = nf4_dequantize(codes, absmax, None, None, shape, dtype, 64)
        assert set(flags) == {streamed}
        assert torch.equal(got, reference.nf4_dequantize(codes, absmax, None, None, shape, dtype, 64))
