"""Elementwise maps as layers, with parameters of their own or from the context."""

import re

import pytest
import torch
from torch import nn
from toys import Counting, Function, assert_same_gradients, both, evaluations, images

from invertible import (
    Affine,
    AffineCoupling,
    Elementwise,
    InvertibleSequential,
    Merge,
    RationalQuadraticSpline,
    Shift,
    Split,
)
from invertible.testing import inversecheck

WAYS = ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]


def test_parameters_of_its_own_are_one_set_a_channel():
    layer = Elementwise(Affine(), channels=4).double()
    assert torch.equal(layer(images()), images())
    nn.init.normal_(layer.weight)
    shift, raw = layer.weight[:, :, None, None]
    y, log_det = layer.forward_and_log_det(images())
    torch.testing.assert_close(y, images() * raw.tanh().exp() + shift)
    torch.testing.assert_close(log_det, (4 * raw.tanh().sum()).expand(2))


@pytest.mark.parametrize("shape", [(2, 8, 2, 2), (2, 8)], ids=["at each place", "at all places"])
@pytest.mark.parametrize("bijection", [Affine(), Shift(), RationalQuadraticSpline()], ids=str)
def test_parameters_may_come_from_the_context_alone(bijection, shape):
    count = bijection.parameters_per_value
    context = torch.randn(shape[0], 3, *shape[2:], dtype=torch.float64)
    f = nn.Linear(3, 4 * count) if len(shape) == 2 else nn.Conv2d(3, 4 * count, 1)
    layer = Elementwise(bijection, f).double()
    assert layer.conditional
    assert layer.requires_context
    inversecheck(layer, images(), context)


def test_the_same_parameters_at_all_places_are_those_of_the_context():
    context = torch.randn(2, 8, dtype=torch.float64)
    y = Elementwise(Affine(), nn.Identity())(images(), context)
    shift, raw = context[:, :, None, None].chunk(2, dim=1)
    torch.testing.assert_close(y, images() * raw.tanh().exp() + shift)


@pytest.mark.parametrize("way", WAYS)
def test_f_is_evaluated_once_more_where_activations_are_rebuilt(way):
    def make():
        f = Counting(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 8), nn.Dropout(0.3)))
        coupling = AffineCoupling(nn.Conv2d(2, 4, 1))
        return InvertibleSequential(
            Elementwise(Affine(), f), Split(), coupling, Merge(), Elementwise(Affine(), channels=4)
        ).double()

    x = images().requires_grad_()
    context = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def loss(network):
        results = getattr(network, way)(x, context)
        y, log_det = results if "log_det" in way else (results, torch.zeros(()))
        return (y.sin() * y).sum() + log_det.sum()

    networks = both(make)
    assert_same_gradients(networks, loss)
    assert evaluations(networks[0]) == [1]
    assert evaluations(networks[1]) == [2]


@pytest.mark.parametrize("dim", [2, -1])
def test_tokens_have_their_channels_last(dim):
    x = images(2, 5, 3)
    layer = Elementwise(Affine(), channels=3, dim=dim).double()
    nn.init.normal_(layer.weight)
    torch.testing.assert_close(layer(x), x * layer.weight[1].tanh().exp() + layer.weight[0])
    context = images(2, 6)
    y = Elementwise(Affine(), nn.Identity(), dim=dim)(x, context)
    shift, raw = context[:, None].chunk(2, dim=2)
    torch.testing.assert_close(y, x * raw.tanh().exp() + shift)


# nflows takes a context of batch 1 in silence.
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (2, 8, 1, 1), (1, 8, 2, 2), (3, 8)])
def test_what_f_returns_is_checked(shape):
    message = (
        "Elementwise's f (Identity) must return 2 x 4 = 8 channels along dimension 1, as Affine "
        "takes 2 for each of the stream's 4: a tensor of shape (2, 8, 2, 2) or (2, 8), got a "
        f"tensor of shape {shape}."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Elementwise(Affine(), nn.Identity())(images(), torch.zeros(shape, dtype=torch.float64))


def test_an_error_in_f_says_what_it_was_given():
    with pytest.raises(RuntimeError) as caught:
        Elementwise(Affine(), nn.Linear(3, 8))(images(), torch.zeros(2, 4))
    assert caught.value.__notes__ == [
        "In Elementwise's f (Linear), given the context (a tensor of shape (2, 4))."
    ]


def test_a_context_may_be_anything_and_must_be_there_if_it_is_used():
    layer = Elementwise(Shift(), Function(lambda context: context["shift"]))
    y = layer(torch.zeros(2, 3), {"shift": torch.ones(2, 3)})
    assert y.tolist() == [[1] * 3] * 2
    with pytest.raises(TypeError, match="Elementwise is conditional and got no context"):
        layer(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="that nothing in it would use"):
        Elementwise(Shift(), channels=3)(torch.zeros(2, 3), torch.ones(2))


def test_channels_or_f_must_be_given_and_not_both():
    for options in ({}, {"f": nn.Identity(), "channels": 3}):
        with pytest.raises(
            ValueError, match="takes either channels, for parameters of its own, or"
        ):
            Elementwise(Affine(), **options)
    with pytest.raises(ValueError, match="Elementwise takes 3 channels along dimension 1, got 4"):
        Elementwise(Affine(), channels=3)(images())
