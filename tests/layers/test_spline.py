"""Splines: what users of other libraries report of theirs, and what is right."""

import math
import re

import pytest
import torch

from invertible import RationalQuadraticSpline


def round_trip(spline, std, count=100_000):
    """The largest error of the inverse in float32, for values within the bound."""
    parameters = std * torch.randn(spline.parameters_per_value, count)
    x = spline.bound * (2 * torch.rand(count) - 1)
    y, _ = spline.forward_and_log_det(x, parameters)
    back, _ = spline.inverse_and_log_det(y, parameters)
    return (back - x).abs().max()


# nflows#87, nflows#23, sbi#373, flowjax#239; zuko has 45 NaN in half a million such draws.
@pytest.mark.parametrize(("std", "error"), [(0, 1e-6), (1, 1e-3), (8, 1e-2), (1e3, 1e-2)])
@pytest.mark.parametrize("circular", [False, True])
def test_a_round_trip_in_float32_is_as_good_as_the_steepest_slope_allows(std, error, circular):
    assert round_trip(RationalQuadraticSpline(circular=circular), std) < error


@pytest.mark.parametrize("std", [1, 8, 1e3])
def test_the_inverse_with_the_constants_of_the_paper_is_finite(std):
    spline = RationalQuadraticSpline(min_bin=1e-3, slopes=(1e-3, math.inf))
    assert round_trip(spline, std).isfinite()


@pytest.mark.parametrize("direction", ["forward_and_log_det", "inverse_and_log_det"])
def test_values_that_all_lie_in_the_tails_stay_as_they_are(direction):
    spline = RationalQuadraticSpline()
    x = torch.tensor([-1e6, -3.1, 3.1, 1e6], requires_grad=True)
    parameters = torch.randn(spline.parameters_per_value, 4, requires_grad=True)
    y, log_slope = getattr(spline, direction)(x, parameters)
    assert torch.equal(y, x)
    assert not log_slope.any()
    slope, of_parameters = torch.autograd.grad(y.sum() + log_slope.sum(), (x, parameters))
    assert torch.equal(slope, torch.ones(4))
    assert not of_parameters.any()


def test_no_values_at_all_are_no_error():
    spline = RationalQuadraticSpline()
    y, log_slope = spline.forward_and_log_det(torch.zeros(0, 2), torch.zeros(23, 0, 2))
    assert y.shape == log_slope.shape == (0, 2)


@pytest.mark.parametrize("circular", [False, True])
def test_a_spline_is_smooth_across_its_bound(circular):
    spline = RationalQuadraticSpline(circular=circular)
    parameters = torch.randn(spline.parameters_per_value, 1, dtype=torch.float64).expand(-1, 2)
    for end in (-3.0, 3.0):
        x = torch.tensor([end - 1e-7, end + 1e-7], dtype=torch.float64, requires_grad=True)
        y, log_slope = spline.forward_and_log_det(x, parameters)
        torch.testing.assert_close(y[0], y[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(log_slope[0], log_slope[1], rtol=0, atol=1e-4)


def test_a_spline_rises_everywhere():
    spline = RationalQuadraticSpline()
    parameters = 5 * torch.randn(spline.parameters_per_value, 1, dtype=torch.float64)
    y, _ = spline.forward_and_log_det(
        torch.linspace(-4, 4, 10_000, dtype=torch.float64), parameters
    )
    assert (y.diff() > 0).all()


def test_a_circular_spline_goes_on_as_it_is_inside():
    spline = RationalQuadraticSpline(bound=math.pi, circular=True)
    parameters = torch.randn(spline.parameters_per_value, 1, dtype=torch.float64)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    y, log_slope = spline.forward_and_log_det(x, parameters)
    for turns in (-2, 1):
        found, slope = spline.forward_and_log_det(x + turns * 2 * math.pi, parameters)
        torch.testing.assert_close(found, y + turns * 2 * math.pi)
        torch.testing.assert_close(slope, log_slope)
    assert (log_slope.abs() > 0.01).any()


def test_knots_and_slopes_stay_within_the_bounds_that_are_documented():
    spline = RationalQuadraticSpline(bins=5, bound=2.0, min_bin=0.05, slopes=(0.1, 4.0))
    x, y, slopes = spline._knots(1e4 * torch.randn(14, 1000))
    for knots in (x, y):
        assert knots[0].eq(-2).all()
        assert knots[-1].eq(2).all()
        assert knots.diff(dim=0).min() > 0.05 * 4 - 1e-5
    assert slopes.min() >= 0.1 - 1e-6
    assert slopes.max() <= 4 + 1e-5
    assert slopes[0].eq(1).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"bins": 1}, "takes bins of at least 2, got 1."),
        ({"bound": 0.0}, "takes a bound above 0, got 0.0."),
        ({"bound": math.inf}, "takes a bound above 0, got inf."),
        ({"min_bin": 0.2}, "below 1 / bins, which is 0.125, got 0.2."),
        ({"min_bin": 0.0}, "takes a min_bin above 0"),
        ({"slopes": (0.0, 2.0)}, "a number within 0 and 1 and one above 1, got (0.0, 2.0)."),
        ({"slopes": (0.5, 1.0)}, "a number within 0 and 1 and one above 1, got (0.5, 1.0)."),
    ],
)
def test_settings_without_an_inverse_are_refused(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        RationalQuadraticSpline(**options)
