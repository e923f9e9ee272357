"""Low rank: the nearest matrix, the picture, and random subspaces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_core.errors import ConfigError, ShapeError
from lora_core.reference.low_rank import energy, nearest_of_rank, rank_for_energy, stored_numbers, truncation_error
from lora_core.reference.picture import picture
from lora_core.reference.subspace import Subspace

# of the singular value decomposition of a small float64 matrix, relative to its largest singular value
ROUNDING = 2.0**-53 * 256
SIZES, SEEDS = st.integers(1, 12), st.integers(0, 2**16)


def drawn(rows, columns, seed):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(SIZES, SIZES, st.integers(0, 14), SEEDS)
def test_nearest_of_rank_misses_what_the_discarded_values_hold(rows, columns, rank, seed):
    matrix = drawn(rows, columns, seed)
    s = torch.linalg.svdvals(matrix)
    missed = matrix - nearest_of_rank(matrix, rank)
    room = ROUNDING * float(s[0])
    assert abs(float(missed.norm()) - truncation_error(s, rank)) <= room
    largest = float(s[rank]) if rank < len(s) else 0.0
    assert abs(float(torch.linalg.matrix_norm(missed, 2)) - largest) <= room
    assert int((torch.linalg.svdvals(matrix - missed) > room).sum()) <= rank


@given(SIZES, SIZES, st.integers(1, 12), SEEDS)
def test_no_other_matrix_of_that_rank_comes_nearer(rows, columns, rank, seed):
    matrix = drawn(rows, columns, seed)
    left = drawn(rows, rank, seed + 1)
    # the best right factor for this left one: the hardest rival of its column space
    rival = left @ torch.linalg.lstsq(left, matrix, driver="gelsd").solution
    nearest = nearest_of_rank(matrix, rank)
    room = ROUNDING * float(matrix.norm())
    assert float((matrix - nearest).norm()) <= float((matrix - rival).norm()) + room


def test_nearest_of_rank_of_a_diagonal_drops_its_smallest():
    matrix = torch.diag(torch.tensor([3.0, 2.0, 0.01], dtype=torch.float64))
    assert torch.equal(nearest_of_rank(matrix, 2), torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)))
    assert truncation_error(torch.tensor([3.0, 2.0, 0.01], dtype=torch.float64), 2) == 0.01
    assert not nearest_of_rank(matrix, 0).any()


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=9))
def test_rank_for_energy_is_the_first_that_holds_the_share(values):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    held = energy(s)
    assert held.shape == (len(s) + 1,) and (held.diff() >= 0).all() and abs(float(held[-1]) - 1) <= ROUNDING
    for share in (0.0, 0.5, 0.9, 1.0):
        rank = rank_for_energy(s, share)
        assert held[rank] >= min(share, float(held[-1]))
        assert rank == 0 or held[rank - 1] < share


def test_stored_numbers_of_rank_16_in_4096():
    assert stored_numbers(4096, 4096, 16) == 131_088
    assert 4096 * 4096 == 16_777_216


def test_low_rank_refuses_what_is_no_matrix_rank_or_share():
    with pytest.raises(ShapeError, match=r"want a matrix \[M, N\]; got shape \(3,\)"):
        nearest_of_rank(torch.zeros(3), 1)
    with pytest.raises(ConfigError, match="rank is -1; want 0 or more"):
        nearest_of_rank(torch.zeros(3, 3), -1)
    with pytest.raises(ConfigError, match=r"share is 1.5; want a number in \[0, 1\]"):
        rank_for_energy(torch.ones(2), 1.5)
    with pytest.raises(ConfigError, match="size is 0; want 1 pixel"):
        picture(0)


def test_picture_has_its_cross_ring_and_gradients():
    grey = picture(64)
    assert grey.shape == (64, 64) and grey.dtype == torch.float32
    assert (grey[31] == 1).all() and (grey[:, 32] == 1).all() and (grey[29, :11] != 1).all()
    # the ring's top, half-way between the arms
    angle = torch.tensor(torch.pi / 4, dtype=torch.float64)
    i, j = (int((0.5 + sign * 0.33 * float(angle.sin())) * 64) for sign in (-1, 1))
    assert grey[i, j] == torch.tensor(0.9)
    # a corner, by the formula, rounded once
    assert grey[0, 0] == torch.tensor(0.1 + 0.4 * (0.5 / 64) + 0.2 * (0.5 / 64), dtype=torch.float64).float()
    assert (grey[0, :25].diff() > 0).all() and (grey[:25, 0].diff() > 0).all()


def test_picture_is_symmetric_but_for_its_gradients():
    grey = picture(33)
    assert torch.equal(grey == 1, (grey == 1).flip(0)) and torch.equal(grey == 1, (grey == 1).T)


@given(st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_subspace_has_orthonormal_directions(count, dimension, seed):
    dimension = min(dimension, count)
    space = Subspace([torch.zeros(count)], dimension, seed)
    columns = torch.stack([space.point(e)[0] for e in torch.eye(dimension)], dim=1).double()
    # each entry is rounded to float32 once; a column of n entries has squares that sum to 1
    assert ((columns.T @ columns - torch.eye(dimension)).abs() <= 2.0**-22).all()
    assert ((columns != 0).sum(1) == 1).all()


def test_subspace_gradient_is_that_of_autograd():
    torch.manual_seed(0)
    parameters = [torch.randn(5, 3), torch.randn(7)]
    space = Subspace(parameters, 4, seed=1)
    z = torch.randn(4, requires_grad=True)
    gradients = [torch.randn(5, 3), torch.randn(7)]
    sum((p * g).sum() for p, g in zip(space.point(z), gradients, strict=True)).backward()
    # either way at most 22 products, of entries of at most 1, are rounded and summed in float32
    bound = 22 * 2.0**-23 * sum(float(g.abs().sum()) for g in gradients)
    assert ((space.gradient(gradients) - z.grad).abs() <= bound).all()


def test_subspace_keeps_float32_whatever_the_default():
    space, gradient = Subspace([torch.zeros(5)], 2), [torch.ones(5)]
    wanted = space.gradient(gradient)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(space.gradient(gradient), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_subspace_starts_at_its_parameters_and_leaves_them():
    parameter = torch.randn(6)
    before = parameter.clone()
    space = Subspace([parameter], 3)
    space.point(torch.ones(3))
    assert torch.equal(space.point(torch.zeros(3))[0], before) and torch.equal(parameter, before)
    assert not torch.equal(Subspace([parameter], 3, seed=1).point(torch.ones(3))[0], space.point(torch.ones(3))[0])


@pytest.mark.parametrize("dimension", [0, 7])
def test_subspace_refuses_a_dimension_beyond_its_parameters(dimension):
    with pytest.raises(ConfigError, match=f"dimension is {dimension}; want 1 to 6"):
        Subspace([torch.zeros(6)], dimension)
