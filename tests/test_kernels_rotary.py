"""rotary: the kernel on a GPU or in the interpreter, forward and backward, within a bound of its roundings."""

import elementwise_bounds as bounds
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, dtypes, seeds, values

from lora_core.kernels.rotary import launch_rotary, launch_rotary_backward
from lora_core.reference import rotary as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = {False: (launch_rotary, reference.rotary), True: (launch_rotary_backward, reference.backward)}
# up to a block of heads, and past one; halves of a block's elements, of fewer, of more, and of no multiple of 16
heads = st.sampled_from([1, 3, 8, 9, 17])
widths = st.sampled_from([2, 6, 32, 64, 70, 96, 128, 256, 320])
scales = st.sampled_from([0.0, 1e-40, 1e-3, 1.0, 1e4])
layouts = st.sampled_from(["tokens", "tokens", "heads", "a third", "reversed", "spread", "one head", "begun"])


def laid_out(t, layout):
    """Return [B, H, T, D] that lies so; of one head for all, the first is repeated with a stride of 0."""
    if layout == "tokens":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "a third":
        return torch.cat((t, t + 1, t), 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : t.shape[1]]
    if layout == "reversed":
        return t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "spread":
        return t.repeat_interleave(2, -1)[..., ::2]
    if layout == "one head":
        return t[:, :1].expand(t.shape)
    if layout == "begun":
        return torch.cat((t.flatten()[:3], t.flatten()))[3:].view(t.shape)
    return t


CHECKS = {False: bounds.check_rotary, True: bounds.check_rotary_backward}


def angles(b, t, d, dtype, seed, scale=1.0):
    """Cosines and sines whose halves differ."""
    return (values(b * t * d, dtype, scale, seed + i).view(b, t, d).to(DEVICE) for i in (1, 2))


@given(
    st.sampled_from([1, 2, 3]), heads, st.sampled_from([1, 2, 5]), widths, dtypes, layouts, scales, st.booleans(), seeds
)
def test_rotary_kernel_matches_the_reference(b, h, t, d, dtype, layout, scale, one_for_all, seed):
    x = laid_out(values(b * h * t * d, dtype, scale, seed).view(b, h, t, d).to(DEVICE), layout)
    cos, sin = angles(1 if one_for_all else b, t, d, dtype, seed)
    for backward, (launch, _) in BOTH.items():
        y = launch(x, cos, sin)
        assert y.dtype == dtype and y.shape == x.shape
        CHECKS[backward](y, x, cos, sin)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_kernel_bound_rejects_a_result_1_percent_off(dtype, backward):
    x = torch.randn(2, 4, 3, 32, device=DEVICE).to(dtype)
    cos, sin = angles(2, 3, 32, dtype, 0)
    for more in ((1.01, 1), (1, 1.01)):
        with pytest.raises(AssertionError, match="rounding bound|rms"):
            CHECKS[backward](BOTH[backward][0](x, cos * more[0], sin * more[1]), x, cos, sin)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_rotary_kernel_takes_cosines_and_sines_of_any_strides_and_changes_nothing(backward, caplog):
    launch = BOTH[backward][0]
    x = torch.randn(2, 3, 5, 64, device=DEVICE)
    cos, sin = angles(2, 5, 64, torch.float32, 0)
    given = x, cos.transpose(0, 2).contiguous().transpose(0, 2), torch.cat((sin, sin), -1)[..., :64]
    before = [t.clone() for t in given]
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        first, second = launch(*given), launch(*given)
        plain = launch(x, cos, sin)
    assert [message.split(": ")[1] for message in caplog.messages] == ["loose", "loose", "wide"]
    assert torch.equal(first, second) and torch.equal(first, plain)
    assert all(map(torch.equal, given, before))


def test_rotary_kernel_reads_a_third_of_one_product_in_wide_loads(caplog):
    """As a layer leaves query, key and value beside one another; of one token, a stride over tokens says nothing."""
    product = torch.randn(2, 4, 3, 8, 64, device=DEVICE).bfloat16()
    x = product[:, :, 1].transpose(1, 2)
    cos, sin = angles(1, 4, 64, torch.bfloat16, 0)
    one = x[:1, :, :1].as_strided((1, 8, 1, 64), (7, 64, 3, 1), x.storage_offset())
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        bounds.check_rotary(launch_rotary(x, cos, sin), x, cos, sin)
        bounds.check_rotary(launch_rotary(one, cos[:, :1], sin[:, :1]), one, cos[:, :1], sin[:, :1])
    assert caplog.messages == ["rotary: wide"] * 2


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_rotary_kernel_takes_empty_operands(shape, backward):
    b, _, t, d = shape
    y = BOTH[backward][0](torch.randn(shape, device=DEVICE), *(torch.randn(b, t, d, device=DEVICE) for _ in "cs"))
    assert y.shape == shape and (y.transpose(1, 2) if backward else y).is_contiguous()


def test_rotary_kernel_reads_nothing_beside_a_head():
    """Half a head is no multiple of a step, and what follows is no number."""
    behind = torch.full((2, 3, 1, 128), float("nan"), device=DEVICE)
    behind[..., :66] = torch.randn(66, device=DEVICE)
    cos, sin = (torch.randn(2, 1, 66, device=DEVICE) for _ in range(2))
    for launch, _ in BOTH.values():
        assert launch(behind[..., :66], cos, sin).isfinite().all()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_rotary_runs_float64_on_the_reference(backward, caplog):
    operands = [
        torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in ((2, 3, 5, 8), (2, 5, 8), (2, 5, 8))
    ]
    launch, plain = BOTH[backward]
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        assert torch.equal(launch(*operands), plain(*operands))
    assert caplog.messages == [f"rotary{'_backward' * backward}: float64, reference"]
