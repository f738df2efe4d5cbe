"""Elementwise maps: inverses, slopes, and what they do with extreme parameters."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invertible import Affine, LogisticMixture, RationalQuadraticSpline, ScaledShift, Shift

MAPS = {
    "Shift": Shift(),
    "ScaledShift": ScaledShift(0.5),
    "ScaledShift learned": ScaledShift(-2.0, learned=True),
    "Affine": Affine(),
    "Affine, shift first": Affine(shift_first=True),
    "Affine of Glow": Affine("glow", shift_first=True),
    "Affine of Jet": Affine("jet"),
    "Affine of IRN": Affine("irn"),
    "spline": RationalQuadraticSpline(),
    "spline of two bins": RationalQuadraticSpline(2, 1.0, min_bin=0.1, slopes=(0.5, 2.0)),
    "spline of the paper": RationalQuadraticSpline(min_bin=1e-3, slopes=(1e-3, math.inf)),
    "mixture": LogisticMixture(),
    "mixture of one": LogisticMixture(1),
    "spline on a circle": RationalQuadraticSpline(5, math.pi, circular=True),
}
IDENTITIES = [name for name in MAPS if "ScaledShift" not in name and "Glow" not in name]
DIRECTIONS = ["forward_and_log_det", "inverse_and_log_det"]
every_map = pytest.mark.parametrize("name", MAPS)
in_both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


def parameters_for(bijection, *shape, std=1.0, dtype=torch.float64):
    return (std * torch.randn(bijection.parameters_per_value, *shape, dtype=torch.float64)).to(
        dtype
    )


def ends(dtype=torch.float64):
    """Values near to the bounds of the splines above, on them and far beyond."""
    bounds = torch.tensor([1.0, 3.0, math.pi], dtype=dtype)
    near = torch.stack([bounds, bounds.nextafter(bounds + 1), bounds.nextafter(bounds - 1)])
    x = torch.cat([near.flatten(), torch.tensor([0.0, 1e-30, 50.0, 1e6], dtype=dtype)])
    return torch.cat([x, -x])


@every_map
@given(seed=st.integers(0, 2**32 - 1), std=st.sampled_from([0.0, 1.0, 8.0]))
def test_the_inverse_undoes_a_map_and_has_the_opposite_log_slope(name, seed, std):
    torch.manual_seed(seed)
    bijection = MAPS[name].double()
    x = torch.cat([3 * torch.randn(30, dtype=torch.float64), ends()])
    parameters = parameters_for(bijection, len(x), std=std)
    y, log_slope = bijection.forward_and_log_det(x, parameters)
    back, log_slope_back = bijection.inverse_and_log_det(y, parameters)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        log_slope_back.expand_as(x), -log_slope.expand_as(x), rtol=1e-5, atol=1e-5
    )


@every_map
@in_both_directions
@given(seed=st.integers(0, 2**32 - 1), std=st.sampled_from([0.0, 1.0, 8.0]))
def test_the_log_slope_is_that_of_autograd(name, direction, seed, std):
    torch.manual_seed(seed)
    bijection = MAPS[name].double()
    x = (3 * torch.randn(50, dtype=torch.float64)).requires_grad_()
    y, log_slope = getattr(bijection, direction)(x, parameters_for(bijection, 50, std=std))
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope.expand_as(x), slope.abs().log(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", IDENTITIES)
@in_both_directions
def test_a_map_is_the_identity_where_all_parameters_are_zero(name, direction):
    bijection = MAPS[name].double()
    x = torch.cat([torch.randn(50, dtype=torch.float64), ends()])
    parameters = torch.zeros(bijection.parameters_per_value, len(x), dtype=torch.float64)
    y, log_slope = getattr(bijection, direction)(x, parameters)
    torch.testing.assert_close(y, x, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(log_slope.expand_as(x), torch.zeros_like(x), rtol=0, atol=1e-14)


@every_map
@in_both_directions
@pytest.mark.parametrize("std", [1.0, 8.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_slopes_and_gradients_are_finite_for_parameters_of_any_size(
    name, direction, std, dtype
):
    bijection = MAPS[name].to(dtype)
    x = torch.cat([3 * torch.randn(2000), 1e6 * torch.randn(50)]).to(dtype)
    x = torch.cat([x, ends(dtype)]).requires_grad_()
    parameters = parameters_for(bijection, len(x), std=std, dtype=dtype).requires_grad_()
    y, log_slope = getattr(bijection, direction)(x, parameters)
    gradients = torch.autograd.grad(
        y.sum() + log_slope.expand_as(x).sum(), (x, parameters), materialize_grads=True
    )
    for found in (y, log_slope, *gradients):
        assert found.isfinite().all()


@every_map
def test_parameters_may_broadcast(name):
    bijection = MAPS[name].double()
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    parameters = parameters_for(bijection, 1, 3, 1, 1)
    y, log_slope = bijection.forward_and_log_det(x, parameters)
    expected, expected_slope = bijection.forward_and_log_det(
        x, parameters.expand(-1, *x.shape).contiguous()
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(log_slope.expand_as(x), expected_slope.expand_as(x))


@pytest.mark.parametrize(
    ("scale", "least", "most", "at_zero"),
    [
        ("soft-clamp", math.exp(-1), math.e, 1.0),
        ("irn", math.exp(-1), math.e, 1.0),
        ("jet", 6.7e-4, 2.0, 1.0),
        ("glow", 3.3e-4, 1.0, 1 / (1 + math.exp(-2))),
    ],
)
def test_a_scale_stays_within_the_bounds_that_are_documented(scale, least, most, at_zero):
    raw = torch.tensor([-1e6, -20.0, 0.0, 20.0, 1e6], dtype=torch.float64)
    y, _ = Affine(scale).forward_and_log_det(
        torch.ones_like(raw), torch.stack([torch.zeros_like(raw), raw])
    )
    assert y.min() >= least
    assert y.max() <= most
    assert y[2].item() == pytest.approx(at_zero)


def test_the_scales_of_glow_jet_and_irn_are_theirs():
    raw = torch.linspace(-6, 6, 50, dtype=torch.float64)
    formulas = {
        "soft-clamp": raw.tanh().exp(),
        "glow": torch.sigmoid(raw + 2),
        "jet": 2 * torch.sigmoid(raw),
        "irn": (2 * torch.sigmoid(raw) - 1).exp(),
    }
    for scale, expected in formulas.items():
        _, log_scale = Affine(scale).forward_and_log_det(raw, torch.stack([raw, raw]))
        torch.testing.assert_close(log_scale.exp(), expected)


def test_the_shift_comes_first_if_asked():
    parameters = torch.tensor([[2.0], [0.5]])
    scale = math.exp(math.tanh(0.5))
    y, _ = Affine().forward_and_log_det(torch.ones(1), parameters)
    assert y.item() == pytest.approx(scale + 2)
    y, _ = Affine(shift_first=True).forward_and_log_det(torch.ones(1), parameters)
    assert y.item() == pytest.approx(3 * scale)


def test_a_factor_that_is_learned_keeps_its_sign_and_stays_away_from_zero():
    bijection = ScaledShift([0.5, -0.5, 1e-3], learned=True)
    torch.testing.assert_close(bijection.factor, torch.tensor([0.5, -0.5, 1e-3]), rtol=1e-2, atol=0)
    optimizer = torch.optim.SGD(bijection.parameters(), lr=100.0)
    for _ in range(50):
        y, _ = bijection.forward_and_log_det(torch.ones(4, 3), torch.zeros(1, 4, 3))
        (y * bijection.sign).sum().backward()
        optimizer.step()
    factor = bijection.factor
    assert factor.sign().tolist() == [1, -1, 1]
    assert (factor.abs() >= 1e-3).all()
    assert (factor.abs() < 2e-3).all()


def test_a_factor_may_be_one_a_channel_of_any_dimension():
    x = torch.ones(2, 4, 3)
    y, log_slope = ScaledShift([1.0, 2.0, 4.0], dim=-1).forward_and_log_det(
        x, torch.zeros(1, 2, 4, 3)
    )
    assert y[0, 0].tolist() == [1, 2, 4]
    assert log_slope.expand_as(x).sum().item() == pytest.approx(8 * math.log(8))
    with pytest.raises(ValueError, match=r"factors for 3 channels along dimension 1, got 4"):
        ScaledShift([1.0, 2.0, 4.0]).forward_and_log_det(x, torch.zeros(1, 2, 4, 3))


def test_factors_and_their_learning_are_kept_in_the_state_dict():
    for learned in (False, True):
        bijection = ScaledShift([0.5, -2.0], learned=learned)
        other = ScaledShift([1.0, 1.0], learned=learned)
        other.load_state_dict(bijection.state_dict())
        torch.testing.assert_close(other.factor, torch.tensor([0.5, -2.0]))
        assert len(list(bijection.parameters())) == learned


@pytest.mark.parametrize("factor", [0.0, 1e-4, math.inf, math.nan, [1.0, 0.0], [[1.0]]])
def test_a_factor_without_an_inverse_is_refused(factor):
    with pytest.raises(
        ValueError, match=re.escape(f"0.001 away from 0, or one for each channel, got {factor}.")
    ):
        ScaledShift(factor)


def test_a_scale_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"takes a scale of 'soft-clamp', .*, got 'exp'. For an"):
        Affine("exp")
