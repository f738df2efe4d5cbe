"""Bits of exact mode do not depend on addresses, nor on the sign of zeros."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import EXACT_LAYERS, QUANTUM
from torch import nn
from toys import Probe, probes

from invertible import (
    AdditiveCoupling,
    HaarWavelet,
    InvertibleSequential,
    Merge,
    PairRotation,
    PairScaling,
    PixelUnshuffle,
    Quantize,
    ReversibleBlock,
    Split,
    Swap,
    reversible_checkpoint,
)
from invertible._support.memory_format import canonical

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
Q = 2**-16


def bits(state):
    """The numbers of all streams, as they lie in memory."""
    if isinstance(state, tuple):
        return torch.cat([bits(x) for x in state])
    return (
        state.detach().flatten().view(torch.int32 if state.dtype == torch.float32 else torch.int64)
    )


def same_bits(one, other):
    return torch.equal(bits(one), bits(other))


# --- addresses


def at_offset(x, offset):
    """The same numbers, a few numbers behind the beginning of a tensor."""
    room = torch.empty(x.numel() + offset, dtype=x.dtype)
    return room[offset:].view(x.shape).copy_(x)


def in_numpy(x, _):
    """In memory that torch did not choose."""
    room = np.empty(x.numel() * x.element_size() + 4, dtype=np.uint8)[4:]
    place = torch.from_numpy(room.view(x.numpy().dtype)).view(x.shape)
    return place.copy_(x)


def dense(c):
    return nn.Sequential(nn.Linear(c, 2 * c + 1), nn.GELU(), nn.Linear(2 * c + 1, c))


def convolution(rank):
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d)}
    conv, norm = kinds[rank]
    return lambda c: nn.Sequential(conv(c, c, 3, padding=1), norm(c), nn.GELU(), conv(c, c, 1))


# By name: the sub-network of a number of channels, channels of a stream, and what follows them.
WIDTHS = {
    "odd width": (dense, 257, ()),
    "even width": (dense, 30, ()),
    "a sequence": (dense, 5, None),
    "odd channels": (convolution(1), 5, (7,)),
    "odd images": (convolution(2), 3, (5, 5)),
}


@DTYPES
@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_and_inverses_are_the_same_at_any_address(name, batch, dtype):
    make, c, behind = WIDTHS[name]
    dim = 1 if behind is not None else -1
    shape = (batch, 2 * c, *behind) if behind is not None else (batch, 4, 2 * c)
    f = lambda: AdditiveCoupling(make(c), quantum=Q)  # noqa: E731
    for seed in range(3):
        torch.manual_seed(seed)
        layers = (Split(dim=dim), f(), Swap(), f(), Swap(), f())
        stored = InvertibleSequential(Quantize(Q), *layers).to(dtype)
        rebuilt = copy.deepcopy(stored)
        rebuilt.checkpoint = True
        x = Quantize(Q)(4 * torch.randn(shape, dtype=dtype))
        for network in (stored, rebuilt):
            sum(y.square().mean() for y in network(x)).backward()
        for p, r in zip(stored.parameters(), rebuilt.parameters(), strict=True):
            assert torch.equal(p.grad, r.grad)
        with torch.no_grad():
            y = stored(x)
            for place, offset in ((at_offset, 0), (at_offset, 1), (at_offset, 3), (in_numpy, 0)):
                assert same_bits(stored[1:](place(x, offset)), y)
                there = tuple(place(stream.contiguous(), offset) for stream in y)
                assert same_bits(stored.inverse(there), x)


@pytest.mark.parametrize("offset", [0, 1, 5, 16])
def test_a_sub_network_gets_its_stream_where_torch_could_have_put_it(offset):
    x = at_offset(torch.randn(1, 3, 5, 5), offset)
    for shape in ((1, 3, 5, 5), (3, 25), (1, 75)):
        given = canonical(x.view(shape), nn.Conv2d(3, 3, 1))
        assert given.data_ptr() % 64 == 0
        assert given.stride() == torch.empty(shape).stride()
        assert torch.equal(given, x.view(shape))
    aligned = torch.randn(2, 4)
    assert canonical(aligned, nn.Identity()) is aligned


# --- zeros


def with_zeros(state):
    """Every other number is a zero, with either sign."""
    if isinstance(state, tuple):
        return tuple(map(with_zeros, state))
    kind = torch.arange(state.numel()).view(state.shape) % 4
    return state.masked_fill(kind == 0, 0.0).masked_fill(kind == 1, -0.0)


def small(state):
    """On the grid and within the range of float32, whatever the layer does."""
    if isinstance(state, tuple):
        return tuple(map(small, state))
    return (state.clamp(-16, 16) / QUANTUM).round() * QUANTUM


@pytest.mark.parametrize("name", EXACT_LAYERS)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_zeros_are_positive_and_come_back_to_the_bit(name, data, dtype):
    make, states = EXACT_LAYERS[name]
    x = with_zeros(small(data.draw(states(dtypes=[dtype]))))
    positive = tuple(part + 0.0 for part in x) if isinstance(x, tuple) else x + 0.0
    layer = make(x).to(dtype).eval()
    network = InvertibleSequential(layer)
    with torch.no_grad():
        y = network(x)
        assert same_bits(network.inverse(y), positive)
        assert same_bits(network.inverse(with_zeros(y)), network.inverse(with_zeros(y)))
        assert same_bits(network(network.inverse(y)), y)
        # By itself it makes no -0.0 of states without.
        for made in (layer(positive), layer.inverse(positive if name == "Quantize" else y)):
            assert not (bits(made) == bits(torch.tensor([-0.0], dtype=dtype))).any()
        assert same_bits(layer.inverse(layer(positive)), positive)


@DTYPES
def test_a_half_turn_makes_no_negative_zeros(dtype):
    layer = PairRotation(2, quantum=Q).to(dtype)
    nn.init.constant_(layer.angle, 3.0)
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=dtype)
    for there, back in ((layer, layer.inverse), (layer.inverse, layer)):
        assert same_bits(back(there(x)), x)
        assert not bits(there(x[:1])).any()


@DTYPES
def test_quantize_makes_zeros_positive_in_both_directions(dtype):
    x = torch.tensor([[-0.0, 0.0, -(2**-30)]], dtype=dtype)
    assert not bits(Quantize(Q)(x)).any()
    assert not bits(Quantize(Q).inverse(x[:, :2])).any()


@DTYPES
@pytest.mark.parametrize("training", [False, True])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), inverted=st.booleans())
def test_what_is_rebuilt_has_the_bits_that_were(seed, inverted, training, dtype):
    """Looked at by the sub-networks, which lie between all layers that compute."""
    torch.manual_seed(seed)

    def looking():
        f = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        return Probe(f, lambda _, x: bits(x).clone())

    def block():
        return [Split(), ReversibleBlock(looking(), looking(), quantum=Q), Merge()]

    rotation, scaling = PairRotation(8, quantum=Q), PairScaling(8, quantum=Q)
    nn.init.uniform_(rotation.angle, -7, 7)
    nn.init.normal_(scaling.log_scale, std=0.3)
    haar = HaarWavelet(quantum=Q, orthonormal=True)
    layers = [haar, *block(), rotation, *block(), scaling, *block()]
    network = InvertibleSequential(*layers, checkpoint=True).to(dtype).train(training)
    x = with_zeros(Quantize(Q)(torch.randn(2, 2, 8, 8, dtype=dtype)))
    y = network.inverse(with_zeros(network(x).detach())) if inverted else network(x)
    y.sin().sum().backward()
    for probe in probes(network):
        *seen, again = probe.seen
        assert torch.equal(seen[-1], again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int64, torch.uint8, torch.bool])
def test_a_state_that_holds_no_grid_does_not_become_one(dtype):
    x = torch.zeros(2, 2, 4, 4, dtype=dtype)
    network = InvertibleSequential(PixelUnshuffle(2), HaarWavelet(quantum=Q))
    with pytest.raises(TypeError, match=f"got {dtype}"):
        network(x)
    with pytest.raises(TypeError, match=f"got {dtype}"):
        network.inverse(torch.zeros(2, 32, 1, 1, dtype=dtype))


# --- features beside the grid


def tanh_network(quantum, **options):
    torch.manual_seed(0)
    f = lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))  # noqa: E731
    layers = [part for _ in range(10) for part in (AdditiveCoupling(f(), quantum=quantum), Swap())]
    return InvertibleSequential(Quantize(quantum), Split(), *layers, Merge(), **options)


@DTYPES
@pytest.mark.parametrize("quantum", [2**-16, 2**-12])
@pytest.mark.parametrize("streams", [False, True])
def test_an_inverse_rounds_features_beside_the_grid(quantum, streams, dtype):
    y = torch.randn(4, 16, dtype=dtype)
    y = y.chunk(2, 1) if streams else y
    results = []
    for checkpoint in (False, True):
        network = tanh_network(quantum, checkpoint=checkpoint).to(dtype)
        network = network[:-1] if streams else network
        given = tuple(part.clone().requires_grad_() for part in y) if streams else y.clone()
        leaves = given if streams else (given.requires_grad_(),)
        x = network.inverse(given)
        x.square().mean().backward()
        assert same_bits(network(x), Quantize(quantum)(y))
        results.append(
            [x, *(leaf.grad for leaf in leaves), *(p.grad for p in network.parameters())]
        )
    assert all(map(torch.equal, *results))
    assert all(gradient.abs().sum() > 0 for gradient in results[0][1:])


def test_an_inverse_of_a_layer_by_itself_rounds_as_well():
    layer = PairScaling(4, quantum=Q)
    y = torch.randn(2, 4)
    with pytest.raises(ValueError, match="not on the grid"):
        reversible_checkpoint(layer, y)
    network = InvertibleSequential(layer)
    assert same_bits(network(network.inverse(y)), Quantize(Q)(y))
