"""The roofline of a linear layer with an adapter."""

import pytest

from lora_core.errors import ConfigError
from lora_core.plan.roofline import BYTES, GPUS, PATHS, Gpu, roofline

# copy and matmul rates of an H200 as published floors take them: 4.3 TB/s and 790 TFLOP/s
FLOORS = Gpu("floors", 4300, 790, 67, "")
TOKENS = (1, 16, 512, 4096, 8192)
# least times in us, r = 16, by tokens
EXPECTED = {
    ("dense", 4096, 4096): (7.9, 7.9, 21.9, 175, 351),
    ("nf4 fused", 4096, 4096): (2.1, 2.1, 21.9, 175, 351),
    ("nf4 dequantised", 4096, 4096): (17.7, 17.7, 31.7, 185, 361),
    ("dense", 14336, 4096): (27.5, 27.6, 76.5, 612, 1224),
    ("nf4 fused", 14336, 4096): (7.2, 7.3, 76.5, 612, 1224),
    ("nf4 dequantised", 14336, 4096): (61.8, 61.9, 111, 646, 1258),
    ("dense", 28672, 8192): (110, 110, 305, 2442, 4884),
    ("nf4 fused", 28672, 8192): (28.5, 28.7, 305, 2442, 4884),
}


@pytest.mark.parametrize(("path", "n", "k"), EXPECTED)
def test_roofline_gives_the_floors(path, n, k):
    for m, said in zip(TOKENS, EXPECTED[path, n, k], strict=True):
        us = 1e6 * roofline(m, n, k, 16, FLOORS, path, 1.0, 1.0).total_s
        digits = 1 if said < 100 else 0
        # the published ones are sums of two rounded parts: a unit of the last digit
        assert abs(us - said) <= 10.0**-digits


def test_roofline_turns_from_memory_to_compute_once():
    def binds(path):
        return [roofline(2**i, 4096, 4096, 16, FLOORS, path, 1.0, 1.0).binds for i in range(15)]

    for path, at in (("dense", 8), ("nf4 fused", 6)):
        assert binds(path) == ["memory"] * at + ["compute"] * (15 - at)


def test_roofline_terms_are_those_of_the_formulas():
    found = roofline(3, 5, 7, 2, FLOORS, "dense")
    assert (found.weight_bytes, found.activation_bytes, found.adapter_bytes) == (70, 72, 48)
    assert (found.base_operations, found.adapter_operations) == (210, 144)
    assert found.intensity == 354 / 190 and found.before_s == 0
    assert roofline(3, 5, 7, 0, FLOORS).adapter_bytes == 0
    half = roofline(3, 5, 7, 2, FLOORS, memory_share=0.45, matmul_share=0.4)
    assert half.memory_s == 2 * found.memory_s and half.compute_s == 2 * found.compute_s


def test_roofline_of_float32_moves_twice_the_bytes_and_multiplies_without_tensor_cores():
    half, single = (roofline(300, 512, 256, 16, FLOORS, dtype=dtype) for dtype in ("float16", "float32"))
    for name in ("weight_bytes", "activation_bytes", "adapter_bytes", "memory_s"):
        assert getattr(single, name) == 2 * getattr(half, name)
    assert single.compute_s == pytest.approx(half.compute_s * 790 / 67)
    fused = [roofline(1, 512, 256, 0, FLOORS, "nf4 fused", dtype=dtype).weight_bytes for dtype in BYTES]
    assert len({*fused}) == 1


def test_gpus_name_their_source():
    assert len({gpu.name for gpu in GPUS}) == len(GPUS) and all(gpu.source for gpu in GPUS) and len(PATHS) == 3


def test_roofline_refuses_what_cannot_be():
    with pytest.raises(ConfigError, match="m is 0; want a whole number of at least 1"):
        roofline(0, 1, 1, 1, FLOORS)
    with pytest.raises(ConfigError, match=r"matmul_share is 1.5; want a share in \(0, 1\]"):
        roofline(1, 1, 1, 1, FLOORS, matmul_share=1.5)
    with pytest.raises(ConfigError, match="path is 'fp8'; want one of dense"):
        roofline(1, 1, 1, 1, FLOORS, "fp8")
    with pytest.raises(ConfigError, match="dtype is 'float64'; want one of bfloat16"):
        roofline(1, 1, 1, 1, FLOORS, dtype="float64")
