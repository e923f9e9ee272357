"""What a kernel's file lists is what is launched: that is what the compiler's output is looked through for."""

import pytest
import torch
from launches import compiled_as, listed, recorded

from lora_core.kernels import shrink

pytestmark = pytest.mark.interpreted


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
    monkeypatch.undo()


@pytest.mark.parametrize(
    "change", [{"K": 33}, {"stride_xm": 40}, {"stride_xk": 2}, {"x_ptr": torch.zeros(99)[1:]}], ids=lambda c: [*c][0]
)
def test_a_form_that_does_not_fit_is_not_listed(change):
    """The arguments of a launch, one changed to what its form does not take for granted."""
    x, lora_a, s = torch.zeros(3, 32), torch.zeros(4, 32), torch.zeros(3, 4)
    arguments = {
        "x_ptr": x, "a_ptr": lora_a, "seed_ptr": x, "s_ptr": s, "M": 3, "K": 32, "R": 4, "stride_xm": 32,
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
