"""Which layers a forward calls with one input, read from its source."""

import pytest
import torch
from torch import nn

from lora_core.adapt.called_together import called_together


def reading(forward):
    return type("Reading", (nn.Module,), {"forward": forward})()


def attention(self, x):
    mixed = torch.tanh(self.q_proj(x)) * self.k_proj(x)
    return self.o_proj(mixed + self.v_proj(x))


def separate_names(self, x, y):
    return self.a(x) + self.b(y)


def reassigned(self, x):
    q = self.a(x)
    x = self.b(x)
    return q + self.c(x) + self.d(x)


def branches(self, x):
    if self.training:
        y = self.a(x)
        y = y + 1
    else:
        y = self.b(x)
    return y


def one_branch(self, x, flag):
    if flag:
        y = self.a(x) + self.b(x)
        y = y + 1
    else:
        y = self.c(x)
    return y + self.d(x)


def in_a_loop(self, x, n):
    for _ in range(n):
        x = self.a(x) + self.b(x)
    return self.c(x)


def twice(self, x):
    return self.a(x) + self.b(x) + self.a(x) + self.b(x)


def conditional(self, x):
    return self.a(x) if self.training else self.b(x)


def with_arguments(self, x):
    return self.a(x, 1) + self.b(x) + self.c(x=x)


def nested(self, x):
    return self.outer(self.a(x)) + self.inner.b(x) + self.c(x)


def later(self, x):
    run = lambda: self.a(x)  # noqa: E731
    return self.b(x), run


def swallowed(self, x):
    y = self.a(x)
    try:
        x = y
    finally:
        pass
    return self.b(x)


def other_modes(self, x):
    with torch.no_grad():
        y = self.a(x) + self.b(x)
        y = y + 1
    return self.c(x) + self.d(x) - y


def unpacked(self, x):
    y = self.a(x)
    x, z = y, y
    return self.b(x) + z


def added_to(self, x):
    y = self.a(x)
    x += self.b(x)
    return self.c(x) + self.d(x) + y


def annotated(self, x):
    y = self.a(x)
    x: torch.Tensor = self.b(x)
    return self.c(x) + self.d(x) + y


def matched(self, x, kind):
    match kind:
        case "a":
            y = self.a(x)
        case _:
            y = self.b(x)
    return y


@pytest.mark.parametrize(
    ("forward", "groups"),
    [
        (attention, (("q_proj", "k_proj", "v_proj"),)),
        (separate_names, ()),
        (reassigned, (("a", "b"), ("c", "d"))),
        (branches, ()),
        (one_branch, (("a", "b"),)),
        (in_a_loop, (("a", "b"),)),
        (twice, (("a", "b"), ("a", "b"))),
        (conditional, ()),
        (with_arguments, ()),
        (nested, (("a", "c"),)),
        (later, ()),
        (swallowed, ()),
        (other_modes, (("a", "b"), ("c", "d"))),
        (unpacked, ()),
        (added_to, (("a", "b"), ("c", "d"))),
        (annotated, (("a", "b"), ("c", "d"))),
        (matched, ()),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_is_called_together_is_read_from_the_source(forward, groups):
    assert called_together(reading(forward)) == groups


def test_a_forward_without_a_source_or_with_a_patch_has_no_groups():
    namespace = {}
    exec("def forward(self, x):\n    return self.a(x) + self.b(x)", namespace)
    assert called_together(reading(namespace["forward"])) == ()
    assert called_together(reading(torch.tanh)) == ()
    patched = reading(attention)
    assert called_together(patched) != ()
    patched.forward = patched.forward
    assert called_together(patched) != ()
    patched.forward = lambda x: x
    assert called_together(patched) == ()
