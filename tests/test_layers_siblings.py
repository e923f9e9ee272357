"""What an output that was computed for a sibling is handed out for: nothing that it depends on may have changed."""

import contextlib

import peft
import pytest
import torch
from models import randomise
from torch import Tensor, nn

import lora_core as lc

pytestmark = [
    pytest.mark.peer("peft"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]

WIDTH = 16
# just enough to share
ROWS = 65
# layers cut in another way round apart by a few units of the largest result, in half precision by one of each rounding
APART = {torch.float32: 64 * torch.finfo(torch.float32).eps, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Teacher(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.a(x)
        return (self.b(x) - wanted).square().mean()


def adapted(model: nn.Module, library: str) -> tuple[nn.Module, nn.Module]:
    """Return the model, and the module in it whose children share their input."""
    whole = model
    if library == "own":
        lc.add_adapter(model, lc.LoraConfig(r=2, target_modules=["a", "b"]))
    else:
        whole = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["a", "b"]))
    randomise(whole)
    return whole, model


def inputs() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))


LIBRARIES = pytest.mark.parametrize("library", ["own", "peft"])


def disabled(whole: nn.Module):
    return whole.disable_adapter() if isinstance(whole, peft.PeftModel) else lc.disable_adapter(whole)


def scaled(whole: nn.Module):
    """Double every B in place, as an optimiser changes it."""
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "lora_b" in name.lower():
                parameter.mul_(2)
    return torch.enable_grad()


CHANGES = {
    "disabled": disabled,
    "no_grad": lambda whole: torch.no_grad(),
    "autocast": lambda whole: torch.autocast("cpu", torch.bfloat16),
    "stepped": scaled,
}


@LIBRARIES
@pytest.mark.parametrize("change", CHANGES)
def test_a_sibling_called_under_other_conditions_answers_for_them(library, change):
    whole, parent = adapted(Two(), library)
    lc.fuse(whole)
    x = inputs()
    parent.a(x)
    with CHANGES[change](whole):
        y = parent.b(x)
    lc.unfuse(whole)
    with contextlib.nullcontext() if change == "stepped" else CHANGES[change](whole):
        wanted = parent.b(x)
    assert y.dtype == wanted.dtype and y.requires_grad == wanted.requires_grad
    assert (y - wanted).abs().max() <= APART[y.dtype] * wanted.abs().max()


@LIBRARIES
@pytest.mark.parametrize("first, then", [(torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)])
def test_an_output_is_an_inference_tensor_where_its_own_layer_is_called_in_inference_mode(library, first, then):
    """Nobody may change such a tensor in place outside of that mode."""
    whole, parent = adapted(Two(), library)
    lc.fuse(whole)
    x = inputs()
    with first():
        parent.a(x)
    with then():
        y = parent.b(x)
        assert y.is_inference() is (then is torch.inference_mode)
        y.add_(1)


@LIBRARIES
def test_a_teacher_without_gradient_leaves_its_student_one(library):
    whole, parent = adapted(Teacher(), library)
    x = inputs()
    wanted = {}
    for fused in (False, True):
        if fused:
            lc.fuse(whole)
        whole.zero_grad()
        parent(x).backward()
        found = {name: p.grad.clone() for name, p in parent.named_parameters() if p.grad is not None}
        wanted = wanted or found
    assert wanted and found.keys() == wanted.keys()
    assert all((found[k] - wanted[k]).abs().max() <= 4 * APART[torch.float32] * wanted[k].abs().max() for k in wanted)


@LIBRARIES
def test_a_change_in_place_under_inference_mode_is_seen(library):
    """Tensors made there keep no count of changes: siblings compute alone."""
    whole, parent = adapted(Two(), library)
    whole.eval()
    lc.fuse(whole)
    with torch.inference_mode():
        x = inputs()
        parent.a(x)
        x.mul_(2)
        y = parent.b(x)
        lc.unfuse(whole)
        wanted = parent.b(x)
    assert (y - wanted).abs().max() <= APART[y.dtype] * wanted.abs().max()


@LIBRARIES
def test_a_gradient_wanted_of_x_in_between_is_given(library):
    whole, parent = adapted(Two(), library)
    lc.fuse(whole)
    x = inputs()
    parent.a(x)
    x.requires_grad_()
    (d_x,) = torch.autograd.grad(parent.b(x).sum(), x)
    assert d_x.abs().sum() > 0


@LIBRARIES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_a_traced_model_computes_what_it_did(library):
    whole, _ = adapted(Two(), library)
    x = inputs()
    wanted = whole(x)
    assert lc.fuse(whole).shared
    difference = torch.jit.trace(whole, (x,))(x) - wanted
    assert difference.abs().max() <= APART[torch.float32] * wanted.abs().max()


def test_an_input_without_dimensions_is_refused_as_by_one_layer():
    whole, parent = adapted(Two(), "own")
    assert lc.fuse(whole).shared
    with pytest.raises(lc.ShapeError, match="the last dimension of x"):
        parent.a(torch.tensor(1.0))


@LIBRARIES
def test_layers_made_in_inference_mode_compute_together(library):
    """Their tensors keep no count of changes in place."""
    with torch.inference_mode():
        whole, _ = adapted(Two(), library)
    x = inputs()
    with torch.no_grad():
        wanted = whole(x)
        assert lc.fuse(whole).shared
        assert (whole(x) - wanted).abs().max() <= APART[torch.float32] * wanted.abs().max()
