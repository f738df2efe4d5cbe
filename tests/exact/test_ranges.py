"""States are checked around a run: on the grid at the entrance, within the range at both ends."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import Function

from invertible import (
    AdditiveCoupling,
    HaarWavelet,
    Identity,
    Inverse,
    InvertibleSequential,
    OnStreams,
    PairRotation,
    PairScaling,
    Parallel,
    Quantize,
    RebuildError,
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
    (y1,) = stay_in_range("x", (inside,), GRID)
    assert torch.equal(y1, inside)
    y1, y2, y3 = stay_in_range("x", (inside, outside, torch.zeros(0)), GRID)
    assert y1.isnan().all()
    assert y2.isnan().all()
    assert y3.numel() == 0
    others = torch.ones(2, dtype=torch.int64), torch.ones(2).half()
    assert stay_in_range("x", others, GRID) == others
    with torch.no_grad(), pytest.raises(ValueError, match="x reached"):
        stay_in_range("x", outside, GRID)


# --- around a run


def shifting(value, quantum=2**-8):
    return AdditiveCoupling(Function(lambda x: torch.full_like(x, value)), quantum=quantum)


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
    # Going backward, features may have been edited: they are rounded.
    assert torch.equal(network.inverse(BESIDE)[0], network.inverse(Quantize(2**-8)(BESIDE))[0])
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


def offset(value, checkpoint, check_layers=False):
    """A network that lifts its first stream by a value and takes it away, behind other layers."""
    torch.manual_seed(0)

    def net():  # what the offset is does not show behind BatchNorm
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))

    layers = [net(), Swap(), net(), value, net(), Swap(), net(), Swap(), -value]
    return InvertibleSequential(
        *[Quantize(2**-16), Split()],
        *[
            shifting(layer, 2**-16)
            if isinstance(layer, float)
            else layer
            if isinstance(layer, Swap)
            else AdditiveCoupling(layer, quantum=2**-16)
            for layer in layers
        ],
        checkpoint=checkpoint,
        check_layers=check_layers,
    )


@pytest.mark.parametrize("value", [100.0, 300.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("inverted", [False, True])
def test_gradients_behind_a_range_left_and_entered_again_are_right_or_an_error(value, inverted):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for checkpoint in (False, True):
        network = offset(value, checkpoint)
        ends = network.inverse(network[:2](x)).chunk(2, 1) if inverted else network(x)
        loss = sum((y.sin() * y).sum() for y in ends)
        try:
            loss.backward()
        except RebuildError:
            assert value > 256
            return
        results.append([p.grad for p in network.parameters()])
    # Backward, far out, so much is rounded away that nothing is left to be rounded differently.
    assert inverted or value < 256
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("inverted", [False, True])
def test_check_layers_finds_what_leaves_the_range_and_comes_back(inverted):
    network = offset(300.0, checkpoint=False, check_layers=True)
    x = torch.randn(64, 8)
    number = 10 if inverted else 5
    with pytest.raises(ValueError, match=rf"the output of layer {number} \(AdditiveCoupling\)"):
        network.inverse(network[:2](x)) if inverted else network(x)


# --- between the steps of a layer

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def room_to_256(dtype):
    """The quantum with which sums are exact below 256."""
    return 2.0**-16 if dtype == torch.float32 else 2.0**-45


def filled(layer, value):
    for parameter in layer.parameters():
        nn.init.constant_(parameter, value)
    return layer


# By name: a layer, and what it takes out of the range and back.
EXCURSIONS = {
    "PairScaling by 1": (lambda q: PairScaling(2, quantum=q), [[200.0, 201.0]]),
    "PairScaling by e**2": (lambda q: filled(PairScaling(2, quantum=q), 2.0), [[30.0, 29.0]]),
    "PairScaling by e**-2": (lambda q: filled(PairScaling(2, quantum=q), -2.0), [[250.0, 30.0]]),
    "PairRotation by -1.5": (lambda q: filled(PairRotation(2, quantum=q), -1.5), [[170.0, 171.0]]),
    "PairRotation by 1.64": (lambda q: filled(PairRotation(2, quantum=q), 1.64), [[170.0, 171.0]]),
    "HaarWavelet": (lambda q: HaarWavelet(quantum=q), [[[[-150.0, -50.0], [150.0, 49.0]]]]),
    "HaarWavelet, orthonormal": (
        lambda q: HaarWavelet(quantum=q, orthonormal=True),
        [[[250.0, 60.0]]],
    ),
    "HaarWavelet, orthonormal, of images": (
        lambda q: HaarWavelet(quantum=q, orthonormal=True),
        [[[[200.0, -60.0], [190.0, -50.0]]]],
    ),
}


@DTYPES
@pytest.mark.parametrize("name", EXCURSIONS)
def test_a_range_left_inside_a_layer_is_found_on_request(name, dtype):
    make, numbers = EXCURSIONS[name]
    layer = make(room_to_256(dtype)).to(dtype)
    x = torch.tensor(numbers, dtype=dtype)
    y = InvertibleSequential(layer)(x)  # both ends are within the range
    checked = InvertibleSequential(Identity(), layer, check_layers=True)
    found = rf"^a state inside layer 1 \({type(layer).__name__}\) reached"
    with pytest.raises(ValueError, match=found):
        checked(x)
    with pytest.raises(ValueError, match=found):
        checked.inverse(y)
    with pytest.raises(ValueError, match=r"^a state inside layer 0.layer"):
        InvertibleSequential(Inverse(layer), check_layers=True)(y)
    assert checked(x / 64).isfinite().all()


@DTYPES
@pytest.mark.parametrize("name", EXCURSIONS)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0, 7))
def test_what_passes_the_check_comes_back_to_the_bit(name, dtype, seed, scale):
    make, numbers = EXCURSIONS[name]
    quantum = room_to_256(dtype)
    network = InvertibleSequential(make(quantum).to(dtype), check_layers=True)
    generator = torch.Generator().manual_seed(seed)
    shape = 4, *torch.tensor(numbers).shape[1:]
    x = torch.randn(shape, generator=generator, dtype=dtype) * 2**scale
    x = Quantize(quantum)(x.clamp(-255, 255))
    with torch.no_grad():
        try:
            y = network(x)
        except ValueError:
            return
        assert torch.equal(network.inverse(y), x)
        assert torch.equal(network(network.inverse(y)), y)


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
