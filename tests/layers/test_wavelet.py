"""HaarWavelet's averages and differences, in either scale, and where they stand."""

import itertools
import re
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import images

from invertible import HaarWavelet
from invertible.testing.strategies import image_shapes, tensors

ORDERS = ["channel-major", "offset-major"]
QUANTUM = 2**-10


def any_rank():
    return st.integers(1, 3).flatmap(lambda rank: tensors(image_shapes(rank=rank, max_batch=1)))


def matrix(layer, shape):
    """The transform as a matrix, from what it makes of every unit vector."""
    size = images(*shape).numel()
    units = torch.eye(size, dtype=torch.float64).view(size, *shape[1:])
    return layer(units).flatten(1).T


def by_loops(x, order):
    """The definition: along some dimensions the difference of neighbours, else their average."""
    n, c, *sides = x.shape
    bands = list(itertools.product((0, 1), repeat=len(sides)))
    y = x.new_empty(n, c * len(bands), *(side // 2 for side in sides))
    for (i, band), channel in itertools.product(enumerate(bands), range(c)):
        found = x[:, channel]
        for dim, difference in enumerate(band, start=1):
            a, b = found.unflatten(dim, (-1, 2)).unbind(dim + 1)
            found = b - a if difference else (a + b) / 2
        y[:, channel * len(bands) + i if order == "channel-major" else i * c + channel] = found
    return y


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bands_are_averages_and_differences_along_each_dimension(order, rank):
    x = images(2, 3, *[4, 2, 6][:rank])
    layer = HaarWavelet(order=order)
    torch.testing.assert_close(layer(x), by_loops(x, order))
    torch.testing.assert_close(layer.inverse(by_loops(x, order)), x)


@pytest.mark.parametrize(("orthonormal", "factor"), [(False, (0.5, 1)), (True, (1 / sqrt(2),) * 2)])
def test_neighbours_become_average_and_difference(orthonormal, factor):
    x = torch.tensor([[[3.0, 7.0, 1.0, -1.0]]], dtype=torch.float64)
    averages, differences = HaarWavelet(orthonormal=orthonormal)(x)[0]
    torch.testing.assert_close(averages, factor[0] * torch.tensor([10.0, 0.0]).double())
    torch.testing.assert_close(differences, factor[1] * torch.tensor([4.0, -2.0]).double())


@pytest.mark.parametrize("order", ORDERS)
def test_the_bands_of_an_image_stand_in_the_order_of_their_offsets(order):
    right, down = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    right[:, :, :, 1], down[:, :, 1] = 1.0, 1.0
    layer = HaarWavelet(orthonormal=True, order=order)

    def bands(x):
        return layer(x).view((2, 4) if order == "channel-major" else (4, 2))

    for x, expected in ((right, [1.0, 1.0, 0.0, 0.0]), (down, [1.0, 0.0, 1.0, 0.0])):
        found = bands(x) if order == "channel-major" else bands(x).T
        torch.testing.assert_close(found, torch.tensor([expected] * 2))


@pytest.mark.parametrize("order", ORDERS)
@given(x=any_rank())
def test_an_orthonormal_transform_keeps_the_norm_and_its_inverse_is_the_adjoint(order, x):
    layer = HaarWavelet(orthonormal=True, order=order)
    y = layer(x)
    w = torch.randn_like(y)
    torch.testing.assert_close(y.norm(), x.norm())
    torch.testing.assert_close(
        (w * y).sum(), (layer.inverse(w) * x).sum(), rtol=0, atol=1e-12 * x.norm() * w.norm()
    )


@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 1, 2, 4), (1, 1, 2, 2, 2)])
def test_the_determinant_is_one_or_minus_one(orthonormal, shape):
    determinant = torch.linalg.det(matrix(HaarWavelet(orthonormal=orthonormal), shape))
    torch.testing.assert_close(determinant.abs(), torch.ones_like(determinant))


@pytest.mark.parametrize("shape", [(1, 2, 4), (1, 1, 2, 4), (1, 1, 2, 2, 2)])
def test_the_matrix_is_orthonormal(shape):
    w = matrix(HaarWavelet(orthonormal=True), shape)
    torch.testing.assert_close(w @ w.T, torch.eye(len(w), dtype=torch.float64))


@given(x=any_rank())
def test_with_a_quantum_the_orthonormal_transform_is_off_by_rounding_alone(x):
    x = (x / QUANTUM).round() * QUANTUM
    layer = HaarWavelet(orthonormal=True, quantum=QUANTUM)
    y = layer(x)
    assert torch.equal(y, (y / QUANTUM).round() * QUANTUM)
    assert torch.equal(layer.inverse(y), x)
    assert (y - HaarWavelet(orthonormal=True)(x)).abs().max() < 5 * QUANTUM  # three dimensions


def test_a_constant_image_has_no_details():
    y = HaarWavelet(orthonormal=True)(torch.full((1, 1, 4, 4), 0.3))
    torch.testing.assert_close(y[:, 0], torch.full((1, 2, 2), 0.6))
    assert not y[:, 1:].any()


def test_gradients_are_those_of_the_transform():
    x = images(1, 1, 2, 2).requires_grad_()
    for layer in (HaarWavelet(orthonormal=True), HaarWavelet()):
        assert torch.autograd.gradcheck(layer, x)
        assert torch.autograd.gradcheck(layer.inverse, layer(x).detach().requires_grad_())


def test_with_a_quantum_gradients_go_straight_through_the_rounding():
    x = images(1, 1, 4, 4).requires_grad_()
    weights = images(1, 4, 2, 2)
    gradients = [
        torch.autograd.grad((weights * HaarWavelet(orthonormal=True, quantum=q)(x)).sum(), x)[0]
        for q in (QUANTUM, None)
    ]
    torch.testing.assert_close(*gradients)


def test_an_odd_side_is_told():
    message = (
        "HaarWavelet takes sides that are multiples of its factor 2, got a tensor of shape "
        "(2, 4, 3, 2). Crop or pad the sides first."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        HaarWavelet()(images(2, 4, 3, 2))


def test_the_options_are_shown():
    shown = repr(HaarWavelet(orthonormal=True, quantum=2**-8))
    assert shown.startswith("HaarWavelet(\n  orthonormal=True, quantum=0.00390625\n")
