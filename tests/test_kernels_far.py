"""Operands whose elements lie more than 2^31 elements apart: every kernel gives the bits it gives where they lie close,
and what no kernel reaches is copied first or left to the reference.

A far operand is a view into memory of which only the elements read are ever touched, so that it takes address space and
next to no memory; on a GPU it takes both, a few GiB.
"""

import pytest
import torch
from launches import recorded
from strategies import spread
from torch import Tensor

import lora_core as lc
from lora_core.kernels import reach
from lora_core.kernels.dora_norm import launch_dora_norm, launch_nf4_dora_norm
from lora_core.kernels.grouped_lora import launch_grouped_lora, launch_grouped_lora_backward
from lora_core.kernels.lora_linear import launch_lora_linear, launch_lora_linear_backward
from lora_core.kernels.lora_linears import launch_lora_linears, launch_lora_linears_backward
from lora_core.kernels.nf4_dequantize import launch_nf4_dequantize
from lora_core.kernels.nf4_lora_linear import launch_nf4_lora_linear, launch_nf4_lora_linear_backward
from lora_core.kernels.reach import LARGEST, LARGEST_SIDE, left_to_reference, near, past_reach
from lora_core.kernels.rms_norm import launch_rms_norm, launch_rms_norm_backward
from lora_core.kernels.rotary import launch_rotary, launch_rotary_backward
from lora_core.kernels.swiglu import launch_swiglu, launch_swiglu_backward
from lora_core.ops.packed import Packed, flatten

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAST = 2**31
M, N, K, R = 20, 24, 130, 5
SHAPES = {
    "x": (M, K),
    "weight": (N, K),
    "lora_a": (R, K),
    "lora_b": (N, R),
    "d_y": (M, N),
    "hidden": (M, R),
    "base": (M, N),
    "d_norm": (M, K),
    # of M tokens, one head each
    "query": (M, 64),
    "cos": (M, 64),
    "sin": (M, 64),
    # rows long enough to be read where they lie
    "d_mlp": (5, 1040),
    "gate": (5, 1040),
    "up": (5, 1040),
}
RANKS = [3, 2]


def lora(o: dict[str, Tensor]) -> list[Tensor]:
    return [*launch_lora_linear(o["x"], o["weight"], None, o["lora_a"], o["lora_b"], 0.5, 0.3, o["seed"], "fused")]


def lora_backward(o: dict[str, Tensor]) -> list[Tensor]:
    rest = (o["x"], o["weight"], o["lora_a"], o["lora_b"], o["hidden"], 0.5, 0.3, o["seed"])
    grads = launch_lora_linear_backward(o["d_y"], *rest, (True, False, False, True, True), "fused")
    return [grads[i] for i in (0, 3, 4)]


def packed(o: dict[str, Tensor]) -> Packed:
    return Packed.of(lc.quantize_nf4(o["close weight"], 64, True))


def nf4(o: dict[str, Tensor]) -> list[Tensor]:
    return [*launch_nf4_lora_linear(o["x"], *packed(o), None, o["lora_a"], o["lora_b"], 0.5, 0.3, o["seed"], "fused")]


def nf4_backward(o: dict[str, Tensor]) -> list[Tensor]:
    rest = (o["lora_a"], o["lora_b"], o["hidden"], 0.5, 0.3, o["seed"], (True, False, True, True), "fused")
    grads = launch_nf4_lora_linear_backward(o["d_y"], o["x"], *packed(o), *rest)
    return [grads[i] for i in (0, 2, 3)]


def siblings(o: dict[str, Tensor]) -> list[Tensor]:
    tensors, formats = flatten([o["weight"], packed(o)])
    adapters = ([o["lora_a"]] * 2, [o["lora_b"]] * 2, [0.5, 1.0])
    rest = (*adapters, [0.0] * 2, [o["seed"]] * 2, "fused")
    return launch_lora_linears(o["x"], tensors, formats, [o["x"][:0, 0]] * 2, *rest)


def siblings_backward(o: dict[str, Tensor]) -> list[Tensor]:
    tensors, formats = flatten([o["weight"], packed(o)])
    hidden = torch.cat([o["close hidden"]] * 2, 1)
    adapters = ([o["lora_a"]] * 2, [o["lora_b"]] * 2, hidden, [0.5, 1.0])
    rest = (*adapters, [0.0] * 2, [o["seed"]] * 2, True, True, "fused")
    return launch_lora_linears_backward([o["d_y"]] * 2, o["x"], tensors, formats, *rest)


def packed_dora(o: dict[str, Tensor]) -> list[Tensor]:
    return [launch_nf4_dora_norm(*packed(o), torch.bfloat16, o["lora_a"], o["lora_b"], 0.5)]


def dora(o: dict[str, Tensor]) -> list[Tensor]:
    return [launch_dora_norm(o["weight"], o["lora_a"], o["lora_b"], 0.5)]


def grouped(o: dict[str, Tensor]) -> list[Tensor]:
    rest = (o["lora_a"], o["lora_b"], RANKS, o["adapter"], o["scaling"])
    return [*launch_grouped_lora(o["x"], o["base"], *rest)]


def grouped_backward(o: dict[str, Tensor]) -> list[Tensor]:
    rest = (o["lora_a"], o["lora_b"], RANKS, o["adapter"], o["scaling"], o["close hidden"].view(-1))
    return [*launch_grouped_lora_backward(o["d_y"], o["x"], *rest, (True, True, True))]


def gated(o: dict[str, Tensor]) -> list[Tensor]:
    return [launch_swiglu(o["gate"], o["up"])]


def gated_backward(o: dict[str, Tensor]) -> list[Tensor]:
    return [*launch_swiglu_backward(o["d_mlp"], o["gate"], o["up"])]


def normed(o: dict[str, Tensor]) -> list[Tensor]:
    return [*launch_rms_norm(o["x"], o["close x"][0], 1e-6)]


def normed_backward(o: dict[str, Tensor]) -> list[Tensor]:
    r = torch.ones(len(o["x"]), device=DEVICE)
    return [*launch_rms_norm_backward(o["d_norm"], o["x"], o["close x"][0], r, True)]


def tokens_of(o: dict[str, Tensor]) -> list[Tensor]:
    """One batch: x [1, 1, T, D], cos and sin [1, T, D]."""
    return [o["query"][None, None], o["cos"][None], o["sin"][None]]


def rotated(o: dict[str, Tensor]) -> list[Tensor]:
    return [launch_rotary(*tokens_of(o)), launch_rotary(*(t.transpose(0, -2) for t in tokens_of(o)))]


def rotated_backward(o: dict[str, Tensor]) -> list[Tensor]:
    return [
        launch_rotary_backward(*tokens_of(o)),
        launch_rotary_backward(o["query"][None, :, None], *(o[n][None, :1] for n in ("cos", "sin"))),
    ]


def operands_of(shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    operands = {own: torch.randn(*shape, device=DEVICE).to(torch.bfloat16) for own, shape in shapes.items()}
    operands |= {f"close {own}": value for own, value in operands.items()}
    operands["adapter"] = torch.randint(-1, 2, (len(operands["x"]),), device=DEVICE)
    operands["scaling"] = torch.tensor([0.5, -1.5], device=DEVICE)
    operands["seed"] = torch.tensor([7], device=DEVICE)
    return operands


# what runs, and the operands that a user's views may spread
CASES = {
    lora: ("x", "weight", "lora_a", "lora_b"),
    lora_backward: ("d_y", "x", "weight", "lora_a", "lora_b", "hidden"),
    nf4: ("x", "lora_a", "lora_b"),
    nf4_backward: ("d_y", "x", "lora_a", "lora_b", "hidden"),
    siblings: ("x", "weight", "lora_a", "lora_b"),
    siblings_backward: ("d_y", "x", "weight", "lora_a", "lora_b"),
    dora: ("weight", "lora_a", "lora_b"),
    packed_dora: ("lora_a", "lora_b"),
    grouped: ("x", "base", "lora_a", "lora_b"),
    grouped_backward: ("d_y", "x", "lora_a", "lora_b"),
    normed: ("x",),
    normed_backward: ("d_norm", "x"),
    rotated: ("query", "cos", "sin"),
    rotated_backward: ("query", "cos", "sin"),
    gated: ("gate", "up"),
    gated_backward: ("d_mlp", "gate", "up"),
}


@pytest.mark.parametrize("along", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize(
    ("run", "name"),
    [(run, name) for run, names in CASES.items() for name in names],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_kernels_reach_elements_two_to_the_31_apart(run, name, along):
    """The stride itself fits 32 bits; what it is multiplied by takes it past them."""
    operands = operands_of(SHAPES)
    length = SHAPES[name][along]
    # both divide by 16 or both do not: the same configuration runs
    small = SHAPES[name][1 - along] + 16
    large = small + 16 * -(-PAST // (16 * (length - 1)))
    assert large <= LARGEST and (length - 1) * large > PAST
    close, wide = (run(operands | {name: spread(operands[name], stride, along)}) for stride in (small, large))
    assert all(torch.equal(a, b) for a, b in zip(close, wide, strict=True))


@pytest.mark.parametrize("apart", [LARGEST + 1, PAST + 16])
@pytest.mark.parametrize(
    ("run", "name"),
    [(run, name) for run, names in CASES.items() for name in names],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_what_lies_farther_apart_is_copied_first(run, name, apart, monkeypatch):
    """Operands of two rows, 2^30 elements apart and more than 2^31: the launches and bits of the rows side by side.

    Where strides are counted in 64 bits nothing is copied.
    """
    monkeypatch.setitem(globals(), "RANKS", [1, 1])
    two = {
        "x": (2, K),
        "d_norm": (2, K),
        "weight": (2, K),
        "lora_a": (2, K),
        "lora_b": (2, 2),
        "d_y": (2, 2),
        "hidden": (2, 2),
    }
    operands = operands_of(
        two
        | {"base": (2, 2)}
        | dict.fromkeys(("d_mlp", "gate", "up"), (2, 1040))
        | dict.fromkeys(("query", "cos", "sin"), (2, 64))
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(operands), run(operands | {name: spread(operands[name], apart, 0)}), strict=True)
    )


def test_operands_of_more_dimensions_are_copied_only_where_they_span_what_is_far():
    given = []
    see = near(lambda *args: given.append(args))
    row = torch.randn(4)
    see(row.as_strided((1, 2, 2), (LARGEST + 1, 2, 1)), [row, None], "a", 2**40)
    assert given[-1][0].stride(0) == LARGEST + 1 and given[-1][1][0] is row
    far = torch.empty(2, 1, 2, device="meta").as_strided((2, 1, 2), (LARGEST + 1, 2, 1))
    see(far, [row, far], (2, far))
    assert given[-1][0].is_contiguous() and given[-1][1][0] is row and given[-1][1][1].is_contiguous()
    assert isinstance(given[-1][2], tuple) and given[-1][2][1].is_contiguous()


def test_a_matrix_of_one_row_is_copied_where_its_rows_would_lie_far_apart():
    """Its stride is given to a kernel all the same; a copy that keeps the layout would have it, too."""
    given = []
    near(given.append)(torch.randn(4).as_strided((1, 4), (LARGEST + 1, 1)))
    assert given[0].stride() == (4, 1)


def test_ranks_of_several_layers_beyond_reach_together_are_left_to_the_reference(monkeypatch, caplog):
    monkeypatch.setattr(reach, "LARGEST_SIDE", 64)
    x, weight, a, b = (torch.randn(*shape, device=DEVICE) for shape in ((3, 16), (8, 16), (40, 16), (8, 40)))
    none = [x.new_empty(0)] * 2
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        launch_lora_linears(x, *flatten([weight] * 2), none, [a] * 2, [b] * 2, [0.5] * 2, [0.0] * 2, none)
    assert "lora_linears: a side of more than 64, reference" in caplog.messages


@pytest.mark.parametrize(
    ("tokens", "side", "sides", "said"),
    [
        ((LARGEST + 1, 1), (1, 1), (), f"more than {LARGEST} tokens, reference"),
        ((1, 1), (LARGEST_SIDE + 1, 1), (), f"a side of more than {LARGEST_SIDE}, reference"),
        ((1, 1), (1, LARGEST_SIDE + 1), (), f"a side of more than {LARGEST_SIDE}, reference"),
        ((1, 1), (1, 1), (LARGEST_SIDE + 1,), f"a side of more than {LARGEST_SIDE}, reference"),
        ((LARGEST, 1), (LARGEST_SIDE, LARGEST_SIDE), (LARGEST_SIDE,), None),
    ],
)
def test_sizes_beyond_reach_are_left_to_the_reference(tokens, side, sides, said, caplog):
    x, w = torch.empty(tokens, device="meta"), torch.empty(side, device="meta")
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        assert left_to_reference("lora_linear", x, w, sides=sides) == (said is not None)
    assert caplog.messages == ([] if said is None else [f"lora_linear: {said}"])


def test_counts_beyond_reach_are_left_to_the_reference_where_nothing_is_multiplied(caplog):
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        assert not past_reach("rotary", torch.empty(1, dtype=torch.float16), LARGEST, 1)
        assert past_reach("rotary", torch.empty(1), 1, LARGEST + 1)
    assert caplog.messages == [f"rotary: a count of more than {LARGEST}, reference"]


@pytest.mark.parametrize(
    ("capability", "dtypes", "left"),
    [
        ((7, 5), (torch.float16, torch.float16), True),
        ((7, 0), (torch.float32, torch.bfloat16), True),
        ((7, 5), (torch.float32, torch.float32), False),
        ((8, 0), (torch.float16, torch.float32), False),
        ((12, 0), (torch.bfloat16, torch.bfloat16), False),
    ],
)
def test_half_precision_is_left_to_the_reference_where_triton_has_no_tensor_cores(
    monkeypatch, caplog, capability, dtypes, left
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    has = reach._multiplies_halves.__wrapped__
    monkeypatch.setattr(reach, "_multiplies_halves", lambda device: has(torch.device("cuda", 0)))
    x, w = (torch.empty(2, 3, dtype=dtype) for dtype in dtypes)
    with caplog.at_level("DEBUG", "lora_core.kernels"):
        assert left_to_reference("lora_linear", x, w) == left
    assert ["compute capability 8.0" in message for message in caplog.messages] == [True] * left


@pytest.mark.interpreted
@pytest.mark.parametrize("wide", ["x", "weight", "dtype"])
def test_float64_is_left_to_the_reference(wide):
    """float32 A and B over a weight in float64 are, too."""
    x, weight, a, b = (torch.randn(*shape) for shape in ((2, 64), (3, 64), (2, 64), (3, 2)))
    with recorded() as launches:
        if wide == "x":
            launch_lora_linear(x.double(), weight.double(), None, a.double(), b.double(), 0.5, 0.0, None)
        elif wide == "weight":
            launch_dora_norm(weight.double(), a, b, 0.5)
        else:
            launch_nf4_dora_norm(*Packed.of(lc.quantize_nf4(weight, 64, True)), torch.float64, a, b, 0.5)
    # W is dequantised by its kernel
    assert {launch.kernel for launch in launches} <= {"_nf4_dequantize_kernel"}


def test_codes_and_scales_may_lie_two_to_the_31_apart():
    w = torch.randn(64, 64, device=DEVICE)
    q = lc.quantize_nf4(w, 64, True)
    apart = spread(q.codes.view(-1, 1), PAST // 1024, 0)
    assert torch.equal(
        launch_nf4_dequantize(apart, q.absmax, q.nested_absmax, q.nested_offset, q.shape, torch.float32, 64),
        q.dequantize(torch.float32),
    )
