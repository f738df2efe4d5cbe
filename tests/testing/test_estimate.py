"""The log-determinant of a large Jacobian is estimated, within what the estimate says of itself."""

import pytest
import torch
from torch import nn
from toys import Affine, AffineCoupling, Logistic, images

from invertible import (
    AdditiveCoupling,
    HaarWavelet,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Permute,
    Split,
    Swap,
)
from invertible.direction import Direction
from invertible.testing import inversecheck
from invertible.testing.estimate import estimate_log_det
from invertible.testing.subject import Subject


def convolutions(channels, out):
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1), nn.Tanh())


def normalized():
    return nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))


class Mixed(InvertibleModule):
    """A linear map of the channels, with singular values of all sizes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 1.0], [-0.5, 0.1]]))

    def forward(self, x):
        return torch.einsum("dc,nchw->ndhw", self.weight, x)

    def inverse(self, y):
        return torch.einsum("dc,nchw->ndhw", self.weight.inverse(), y)

    def forward_and_log_det(self, x):
        return self(x), self.log_det(x)

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self.log_det(y)

    def log_det(self, x):
        return (self.weight.slogdet().logabsdet * x[0, 0].numel()).expand(len(x))


LAYERS = {
    "a scale": (Affine, 3),
    "a map of each number": (Logistic, 3),
    "a permutation": (lambda: Permute([2, 0, 1]), 3),
    "a wavelet": (HaarWavelet, 3),
    "a linear map": (Mixed, 2),
    "affine couplings": (
        lambda: InvertibleSequential(
            *(Split(), AffineCoupling(convolutions(2, 4)), Swap()),
            *(AffineCoupling(convolutions(2, 4)), Merge()),
        ),
        4,
    ),
    "batch statistics": (
        lambda: InvertibleSequential(
            Split(), AdditiveCoupling(normalized()), Swap(), AdditiveCoupling(normalized()), Merge()
        ),
        4,
    ),
}


def made(name):
    make, channels = LAYERS[name]
    torch.manual_seed(0)
    return make().double(), images(2, channels, 24, 24)


@pytest.mark.parametrize("name", LAYERS)
def test_the_true_value_is_as_close_as_the_estimate_says(name):
    layer, x = made(name)
    with torch.no_grad():
        expected = layer.forward_and_log_det(x)[1].sum().item()
    subject = Subject(layer, x, None, None, None)
    found = estimate_log_det(subject, Direction(log_det=True), x)
    assert abs(found.value - expected) <= found.uncertainty + 1e-6 * x.numel()
    assert found.uncertainty < 0.2 * x.numel()


@pytest.mark.parametrize("name", LAYERS)
def test_right_layers_pass_at_a_size_at_which_no_jacobian_is_computed(name):
    layer, x = made(name)
    assert inversecheck(layer, x, laws="log-determinant")


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_step_follows_the_size_of_the_state(scale):
    subject = Subject(Affine().double(), scale * images(2, 3, 24, 24), None, None, None)
    found = estimate_log_det(subject, Direction(log_det=True), subject.x)
    assert abs(found.value - 0.5 * 2 * 3 * 24 * 24) < 1e-3


def test_a_pair_is_taken_as_one_vector():
    layer = AdditiveCoupling(convolutions(2, 2)).double()
    x = images(2, 2, 24, 24), images(2, 2, 24, 24)
    assert inversecheck(layer, x, laws="log-determinant")
