"""A grid is the multiples of a power of two, on which sums are exact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invertible.exact.grid import Grid, positive_zeros

POWERS = st.integers(-30, 10).map(lambda n: 2.0**n)
VALUES = st.floats(-1000, 1000)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64)


@given(quantum=POWERS, value=VALUES)
def test_rounding_gives_the_nearest_multiple_and_halves_go_to_even(quantum, value):
    x = torch.tensor([value], dtype=torch.float64)
    found = Grid(quantum).round(x).item()
    assert found == round(value / quantum) * quantum  # as Python rounds
    assert abs(found - value) <= quantum / 2


@given(quantum=POWERS, value=VALUES)
def test_rounding_twice_is_rounding_once(quantum, value):
    grid = Grid(quantum)
    x = grid.round(torch.tensor([value], dtype=torch.float64))
    assert torch.equal(grid.round(x), x)
    assert grid.distance(x) == 0


def test_the_distance_is_that_of_the_worst_value():
    assert Grid(0.5).distance(torch.tensor([0.0, 1.125, -0.75 + 2**-4])).item() == 0.1875


@DTYPES
@given(data=st.data(), power=st.integers(-100, 100))
def test_rounding_is_right_to_the_last_bit_at_any_scale(dtype, data, power):
    """The straight-through sum is the multiple itself, also where values are next to nothing."""
    width = 32 if dtype == torch.float32 else 64
    values = data.draw(st.lists(st.floats(-4, 4, width=width), min_size=1))
    scale = data.draw(st.integers(-6, 20))
    x = torch.tensor(values, dtype=dtype) * 2.0 ** (power + scale)
    expected = (x.double() / 2.0**power).round() * 2.0**power + 0.0
    assert torch.equal(bits(Grid(2.0**power).round(x)), bits(expected.to(dtype)))


@DTYPES
@pytest.mark.parametrize("quantum", [2.0**-100, 2.0**-16, 1.0, 2.0**100])
def test_what_rounds_to_zero_is_positive(dtype, quantum):
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([-0.0, 0.0, -tiny, tiny / 4, -tiny / 4, -quantum / 2], dtype=dtype)
    assert torch.equal(bits(Grid(quantum).round(x)), torch.zeros_like(bits(x)))
    assert not bits(positive_zeros(torch.tensor([-0.0, 0.0], dtype=dtype))).any()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # in torch's own jvp
def test_the_gradient_goes_straight_through():
    grid, x = Grid(0.5), torch.tensor([0.3, 1.9], requires_grad=True)
    (grid.round(x) * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [2, 3]
    y, tangent = torch.func.jvp(grid.round, (x.detach(),), (torch.tensor([1.0, 5.0]),))
    assert y.tolist() == [0.5, 2]
    assert tangent.tolist() == [1, 5]
    assert torch.func.vmap(grid.round)(x.detach()).tolist() == [0.5, 2]
    # As a part of something else, and twice.
    second = torch.func.hessian(lambda x: grid.round(x).pow(3).sum())(x.detach())
    assert second.tolist() == [[3.0, 0.0], [0.0, 12.0]]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
@given(quantum=POWERS)
def test_sums_are_exact_below_the_limit_and_not_above(dtype, bits, quantum):
    grid = Grid(quantum)
    limit = grid.limit(dtype)
    assert limit == 2.0**bits * quantum
    largest = torch.tensor(limit, dtype=dtype) - quantum
    assert largest + quantum - quantum == largest
    beyond = torch.tensor(limit, dtype=dtype)
    assert beyond + quantum == beyond


@pytest.mark.parametrize("quantum", [0, -1, 3, 0.1, math.inf, math.nan, -math.inf, 2**-16 * 1.5])
def test_what_is_no_power_of_two_is_refused(quantum):
    with pytest.raises(ValueError, match=r"^object takes a power of two as quantum.*, got"):
        Grid.of(object(), quantum)


# Reciprocals of the small ones are infinite, or denormal numbers that some devices take for 0.
@pytest.mark.parametrize("power", [-1074, -149, -130, -128, -127, -126, -101, 101, 127, 1023])
def test_a_quantum_out_of_the_range_of_float32_is_refused(power):
    with pytest.raises(ValueError, match=r"from 2\*\*-100 to 2\*\*100, got"):
        Grid.of(object(), 2.0**power)


@given(quantum=POWERS)
def test_powers_of_two_are_taken(quantum):
    assert Grid.of(object(), quantum) == Grid(quantum)
    assert Grid.of(object(), None) is None


def test_a_grid_is_shown_as_a_power():
    assert str(Grid(2**-16)) == "2**-16"
    assert str(Grid(1.0)) == "2**0"
    assert str(Grid(8.0)) == "2**3"


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        (torch.float16, "under torch.autocast"),
        (torch.bfloat16, "under torch.autocast"),
        (torch.uint8, r"x\.float\(\) / 256"),
        (torch.bool, r"Convert it: x\.float\(\)"),
    ],
)
def test_a_dtype_that_holds_no_grid_is_refused_with_advice(dtype, hint):
    with pytest.raises(TypeError, match=f"float32 or float64 state, got {dtype}.*{hint}"):
        Grid(0.5).require_dtype(object(), torch.zeros(1, dtype=dtype))
    for fine in (torch.float32, torch.float64):
        Grid(0.5).require_dtype(object(), torch.zeros(1, dtype=fine))
