"""States are checked around a run: on the grid at the entrance, within the range at both ends."""

import math

import pytest
import torch
from torch import nn
from toys import Function

from invertible import (
    AdditiveCoupling,
    Identity,
    Inverse,
    InvertibleSequential,
    OnStreams,
    Parallel,
    Quantize,
    ReversibleBlock,
    Split,
    Swap,
)
from invertible.exact import ranges
from invertible.exact.grid import Grid
from invertible.exact.ranges import check_range, stay_in_range

GRID = Grid(2**-8)  # in float32 exact below 2**16


@pytest.mark.parametrize("on_grid", [False, True])
def test_a_state_in_the_range_passes(on_grid):
    check_range("x", torch.tensor([2.0**16 - 2**-8, -1.5]), GRID, on_grid=on_grid)
    check_range("x", (torch.zeros(2), torch.ones(3)), GRID, on_grid=on_grid)
    check_range("x", torch.zeros(0), GRID, on_grid=on_grid)
    check_range("x", torch.ones(2, dtype=torch.int64) << 40, GRID, on_grid=on_grid)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("stream", [0, 1])
def test_a_state_beyond_it_is_an_error_that_names_the_way_out(sign, stream):
    streams = [torch.zeros(3), torch.zeros(2)]
    streams[stream][1] = sign * 2.0**16
    with pytest.raises(
        ValueError,
        match=r"^the output reached 65536, and with quantum 2\*\*-8 sums are exact only below "
        r"65536 in torch.float32. Take quantum=2\*\*-6 or larger, or a float64 state.",
    ):
        check_range("the output", tuple(streams), GRID, on_grid=False)
    check_range("the output", tuple(x.double() for x in streams), GRID, on_grid=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told_as_such(value):
    x = torch.tensor([1e9, value, 3.0])
    with pytest.raises(ValueError, match=r"x reached (nan|inf): the network has diverged"):
        check_range("x", x, GRID, on_grid=True)


def test_a_state_beside_the_grid_is_an_error_only_where_asked():
    x = torch.tensor([1.0, 2.0 + 2**-9])
    check_range("x", x, GRID, on_grid=False)
    with pytest.raises(
        ValueError, match=r"grid of multiples of 2\*\*-8, off by up to 0.00195.*Put Quantize\(2\*\*"
    ):
        check_range("x", x, GRID, on_grid=True)


def test_an_accelerator_in_training_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(ranges, "accelerators", lambda _: [torch.device("cuda")])
    inside, outside = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0**20])
    y1, y2, y3 = stay_in_range("x", (inside, outside, torch.zeros(0)), GRID)
    assert torch.equal(y1, inside)
    assert y2.isnan().all()
    assert y3.numel() == 0
    with torch.no_grad(), pytest.raises(ValueError, match="x reached"):
        stay_in_range("x", outside, GRID)


# --- around a run


def shifting(value):
    return AdditiveCoupling(Function(lambda x: torch.full_like(x, value)), quantum=2**-8)


BESIDE = torch.full((2, 2), 1 / 3), torch.full((2, 2), 1 / 3)
FAR = torch.full((2, 2), 60_000.0), torch.zeros(2, 2)

NETWORKS = {
    "a sequence": lambda layer: InvertibleSequential(layer),
    "a nest": lambda layer: InvertibleSequential(Swap(), Inverse(Inverse(layer)), Swap()),
    "streams": lambda layer: OnStreams((0, 1), layer),
}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_compositions_are_checked_at_both_ends(name, checkpoint):
    network = NETWORKS[name](shifting(10_000.0))
    network.checkpoint = checkpoint
    kind = type(network).__name__
    with pytest.raises(ValueError, match=f"the input of {kind} is not on the grid"):
        network(BESIDE)
    with pytest.raises(ValueError, match=f"the output of {kind} .* reached 70000"):
        network(FAR[::-1] if name == "a nest" else FAR)
    inside = torch.ones(2, 2), torch.ones(2, 2)
    assert torch.equal(network.inverse(network(inside))[0], inside[0])
    # Going backward, features may have been edited.
    network.inverse(BESIDE)
    with pytest.raises(ValueError, match=f"the inverse of {kind} .* reached"):
        network.inverse((-FAR[0], -FAR[0]))


def test_a_range_left_and_entered_again_is_found_on_request():
    there_and_back = [shifting(40_000.0), shifting(40_000.0), shifting(-80_000.0)]
    x = torch.zeros(2, 2), torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"the output of layer 1 \(AdditiveCoupling\) reached"):
        InvertibleSequential(*there_and_back, check_layers=True)(x)
    inner = InvertibleSequential(*there_and_back, check_layers=True)
    with pytest.raises(ValueError, match=r"the output of layer 1.1 \(AdditiveCoupling\) reached"):
        InvertibleSequential(Swap(), inner)(x)


@pytest.mark.parametrize(
    "network",
    [
        InvertibleSequential(
            Quantize(2**-8), Split(), ReversibleBlock(nn.Tanh(), nn.Tanh(), quantum=2**-8)
        ),
        InvertibleSequential(Split(), Parallel(Quantize(2**-8), Quantize(2**-4))),
        InvertibleSequential(Identity(), InvertibleSequential(Identity(), Quantize(2**-8))),
    ],
)
def test_what_quantizes_first_takes_any_input(network):
    for checkpoint in (False, True):
        network.checkpoint = checkpoint
        network(torch.full((2, 4), 1 / 3))


def test_what_quantizes_one_stream_only_does_not():
    network = InvertibleSequential(Split(), Parallel(Quantize(2**-8), Identity()))
    with pytest.raises(ValueError, match="is not on the grid"):
        network(torch.full((2, 4), 1 / 3))


def test_compositions_that_keep_no_grid_take_all():
    network = InvertibleSequential(shifting(1.0), AdditiveCoupling(nn.Tanh()))
    network(BESIDE)
    network((FAR[0] * 1e6, FAR[1]))
