"""Mixtures of logistics as maps: the inverse by bisection, its derivatives, extreme parameters."""

import math
import re

import pytest
import torch
from torch import nn
from toys import images, linear, pair

from invertible import MADE, Coupling, Elementwise, LogisticMixture, MaskedAutoregressive
from invertible.testing import inversecheck


def drawn(mixture, count, std=1.0, dtype=torch.float64):
    parameters = std * torch.randn(mixture.parameters_per_value, count, dtype=torch.float64)
    return parameters.to(dtype).requires_grad_()


def apart(width, dtype=torch.float64):
    """Two components of the smallest scale at the ends of an interval, and nothing else."""
    raw = -1e3
    return torch.tensor([0.0, 0, -width, width, raw, raw, 0, 0], dtype=dtype)[:, None]


def test_it_is_the_formula():
    mixture = LogisticMixture(3)
    parameters = drawn(mixture, 50)
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    weights, means, raw, (shift, raw_scale) = parameters.split([3, 3, 3, 2])
    scales = (3 * (raw / 3).tanh()).exp()
    share = (weights.softmax(0) * ((x - means) / scales).sigmoid()).sum(0)
    expected = raw_scale.tanh().exp() * (0.99 * share.logit() + 0.01 * x) + shift
    y, _ = mixture.forward_and_log_det(x, parameters)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_derivatives_are_right_to_the_second(direction, components):
    mixture = LogisticMixture(components)
    x = 2 * torch.randn(6, dtype=torch.float64)
    inputs = x.requires_grad_(), drawn(mixture, 6)
    run = getattr(mixture, direction)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


# Torch scripts something when it differentiates forward, and warns of that itself.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_transforms_of_torch_func_see_the_derivative_of_the_inverse(transform):
    mixture = LogisticMixture(3)
    parameters = drawn(mixture, 5).detach()
    y = torch.randn(5, dtype=torch.float64)
    jacobian = transform(lambda y: mixture.inverse_and_log_det(y, parameters)[0])(y)
    _, log_slope = mixture.inverse_and_log_det(y, parameters)
    torch.testing.assert_close(jacobian, log_slope.exp().diag())


@pytest.mark.parametrize("std", [0, 1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_inverse_is_as_good_as_rounding_and_the_slope_allow(dtype, std):
    mixture = LogisticMixture()
    x = (6 * torch.rand(20_000, dtype=torch.float64) - 3).to(dtype)
    parameters = drawn(mixture, len(x), std, dtype).detach()
    y, log_slope = mixture.forward_and_log_det(x, parameters)
    back, opposite = mixture.inverse_and_log_det(y, parameters)
    # Rounding of what is summed, over the slope.
    size = 20 * (1 + parameters[-2].abs() + y.abs() + parameters.abs().amax(0))
    allowed = torch.finfo(dtype).eps * size * (1 + 1 / log_slope.exp())
    assert ((back - x).abs() <= allowed).all()
    torch.testing.assert_close(opposite, -log_slope, rtol=0, atol=1e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("width", [1, 5, 100, 1e6])
def test_values_between_components_that_lie_far_apart_come_back(width):
    mixture = LogisticMixture(2)
    x = width * torch.linspace(-0.9, 0.9, 31, dtype=torch.float64)
    y, log_slope = mixture.forward_and_log_det(x, apart(width))
    back, _ = mixture.inverse_and_log_det(y, apart(width))
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9 * width)
    assert (log_slope >= math.log(0.01) - 1e-9).all()
    assert (y.diff() > 0).all()


@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_weights_that_are_all_but_zero_are_no_harm(direction):
    mixture = LogisticMixture(2)
    parameters = torch.tensor([1e6, -1e6, 0, 1e6, 0, 0, 0, 0])[:, None].requires_grad_()
    x = torch.tensor([-1e6, -1.0, 0.0, 1.0, 1e6], requires_grad=True)
    y, log_slope = getattr(mixture, direction)(x, parameters)
    torch.testing.assert_close(y, x)
    gradients = torch.autograd.grad(y.sum() + log_slope.sum(), (x, parameters))
    assert all(found.isfinite().all() for found in gradients)


def autoregressive(mixture):
    f = MADE(2, mixture.parameters_per_value, (8,), activation=nn.Tanh)
    nn.init.normal_(f.layers[-1].weight)
    return MaskedAutoregressive(f, mixture)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda m: Coupling(linear(2, 2 * m.parameters_per_value), m), pair(3, 4)),
        (lambda m: Elementwise(m, channels=4), images()),
        (autoregressive, images(3, 2)),
    ],
    ids=["Coupling", "Elementwise", "MaskedAutoregressive"],
)
def test_it_serves_all_layers_that_take_a_map(make, x):
    inversecheck(make(LogisticMixture(3)).double(), x)


def test_no_values_at_all_are_no_error():
    mixture = LogisticMixture(2)
    for run in (mixture.forward_and_log_det, mixture.inverse_and_log_det):
        y, log_slope = run(torch.zeros(0, 2), torch.zeros(8, 0, 2))
        assert y.shape == log_slope.shape == (0, 2)


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match=re.escape("takes components of at least 1, got 0.")):
        LogisticMixture(0)
