"""PairScaling and PairRotation multiply each pair of channels by the matrix of their formula."""

import math

import pytest
import torch
from toys import images

from invertible import PairRotation, PairScaling

VALUES = [0.5, -2.0]  # of the first pair and of the second


def rotation(angle):
    return [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]


def scaling(log_scale):
    return [[math.exp(log_scale), 0], [0, math.exp(-log_scale)]]


@pytest.mark.parametrize(
    ("make", "parameter", "matrix"),
    [(PairRotation, "angle", rotation), (PairScaling, "log_scale", scaling)],
)
def test_channel_c_is_paired_with_that_half_of_all_further_on(make, parameter, matrix):
    layer = make(4).double()
    with torch.no_grad():
        getattr(layer, parameter).copy_(torch.tensor(VALUES))
    x, y = images(), layer(images())
    for c, value in enumerate(VALUES):
        expected = torch.einsum("ij,njhw->nihw", x.new_tensor(matrix(value)), x[:, [c, c + 2]])
        torch.testing.assert_close(y[:, [c, c + 2]], expected)


@pytest.mark.parametrize("make", [PairRotation, PairScaling])
def test_nothing_is_changed_at_the_beginning(make):
    assert torch.equal(make(4)(images()), images())


def test_the_options_are_shown():
    assert repr(PairScaling(4, quantum=2**-2)) == "PairScaling(channels=4, quantum=0.25)"
