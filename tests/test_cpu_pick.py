"""Picks among sixteen words come out the same by either of the processors' instructions."""

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from llvmlite import binding, ir  # noqa: E402
from numba.extending import intrinsic  # noqa: E402

from lora_core.cpu.compiled.pick import AMONG, LANES, WORD, pick  # noqa: E402


def picker(among):
    """Return compiled code that writes entries[index], three arrays of sixteen words."""

    def declare(_, entries, index, picked):
        def generate(context, builder, signature, arguments):
            vector = ir.VectorType(WORD, LANES).as_pointer()
            arrays = (
                context.make_array(t)(context, builder, a) for t, a in zip(signature.args, arguments, strict=True)
            )
            entries, index, picked = (builder.bitcast(array.data, vector) for array in arrays)
            found = pick(builder, builder.load(entries, align=1), builder.load(index, align=1), among)
            builder.store(found, picked, align=1)
            return context.get_dummy_value()

        return numba.void(entries, index, picked), generate

    declared = intrinsic(declare)
    return numba.njit(lambda entries, index, picked: declared(entries, index, picked))


@pytest.mark.parametrize("among", [8, 16])
def test_pick_takes_the_entry_that_each_lane_names(among):
    run, rng = picker(among), np.random.default_rng(among)
    entries = rng.integers(0, 2**32, LANES, dtype=np.uint32)
    for index in (np.arange(LANES), np.arange(LANES)[::-1], *rng.integers(0, LANES, (50, LANES))):
        picked = np.zeros(LANES, np.uint32)
        run(entries, np.ascontiguousarray(index, np.uint32), picked)
        assert np.array_equal(picked, entries[index])


def test_pick_becomes_one_instruction_where_the_processor_has_it():
    features = binding.get_host_cpu_features()
    if not (features.get("avx2") or features.get("avx512f")):
        pytest.skip("the processor has no such instruction")
    run, words = picker(AMONG), np.zeros(LANES, np.uint32)
    run(words, words, words.copy())
    (code,) = run.inspect_asm().values()
    assert code.count("vpermd") + code.count("vpermps") >= 16 // AMONG
