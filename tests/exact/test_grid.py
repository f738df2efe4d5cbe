"""A grid is the multiples of a power of two, on which sums are exact."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from invertible.exact.grid import Grid, finest_grid

POWERS = st.integers(-30, 10).map(lambda n: 2.0**n)
VALUES = st.floats(-1000, 1000)


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


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # in torch's own jvp
def test_the_gradient_goes_straight_through():
    grid, x = Grid(0.5), torch.tensor([0.3, 1.9], requires_grad=True)
    (grid.round(x) * torch.tensor([2.0, 3.0])).sum().backward()
    assert x.grad.tolist() == [2, 3]
    y, tangent = torch.func.jvp(grid.round, (x.detach(),), (torch.tensor([1.0, 5.0]),))
    assert y.tolist() == [0.5, 2]
    assert tangent.tolist() == [1, 5]
    assert torch.func.vmap(grid.round)(x.detach()).tolist() == [0.5, 2]


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


def layers(*quanta):
    """Layers with these quanta, "moves" for one that moves numbers only."""
    return [
        SimpleNamespace(
            moves_only=quantum == "moves", quantum=None if quantum == "moves" else quantum
        )
        for quantum in quanta
    ]


@pytest.mark.parametrize(
    ("quanta", "expected"),
    [
        ((0.5, 0.25, "moves"), Grid(0.25)),
        ((0.5,), Grid(0.5)),
        ((0.5, None), None),
        (("moves", "moves"), None),
        ((None,), None),
        ((), None),
    ],
)
def test_a_composition_keeps_the_finest_grid_if_all_its_layers_keep_one(quanta, expected):
    assert finest_grid(layers(*quanta)) == expected
