"""A composition is exact if nothing in it throws away what its layers add."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Chained, Function

from invertible import (
    AdditiveCoupling,
    HaarWavelet,
    Identity,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    PairScaling,
    Parallel,
    Permute,
    Quantize,
    ReversibleBlock,
    Split,
    Swap,
)
from invertible.exact.composed import composed

FINE, COARSE = 2**-16, 2**-8


def shift(quantum=FINE):
    return AdditiveCoupling(Function(lambda x: 0.3 * x), quantum=quantum)


def sequence(*layers):
    return InvertibleSequential(*layers)


EXACT = {
    "one grid": (FINE, sequence(Quantize(FINE), Split(), shift(), Merge())),
    "two grids": (FINE, sequence(Split(), shift(COARSE), Swap(), shift(), Merge())),
    "a coarse entrance": (FINE, sequence(Permute([1, 0]), Quantize(COARSE), Split(), shift())),
    "a coarse entrance of each stream": (
        FINE,
        sequence(Split(), Parallel(Quantize(COARSE), Quantize(2**-6)), shift()),
    ),
    "a coarse entrance of one stream": (
        FINE,
        sequence(Split(), Parallel(Quantize(COARSE), Identity()), shift()),
    ),
    "a fine Quantize behind": (FINE, sequence(Split(), shift(), Merge(), Quantize(FINE))),
    "a finer Quantize behind": (2**-20, sequence(Split(), shift(), Merge(), Quantize(2**-20))),
    "a finer Quantize inverted": (
        2**-20,
        sequence(Inverse(Quantize(2**-20)), PairScaling(2, quantum=FINE)),
    ),
    "coarse streams only": (
        COARSE,
        sequence(Split(), Parallel(PairScaling(2, quantum=COARSE), Identity()), Merge()),
    ),
    "a layer": (FINE, shift()),
}

LOSING = {
    "behind": sequence(Split(), shift(), Merge(), Quantize(COARSE)),
    "behind an entrance": sequence(Quantize(FINE), Quantize(COARSE)),
    "before a finer layer": sequence(Split(), shift(), Merge(), Quantize(COARSE), Split(), shift()),
    "in a nest": sequence(Split(), sequence(shift(), Merge()), sequence(Quantize(COARSE))),
    "on one stream": sequence(Split(), shift(), OnStreams(1, Quantize(COARSE))),
    "in parallel": sequence(Split(), shift(), Parallel(Identity(), Quantize(COARSE)), Merge()),
    "behind parallel layers": sequence(
        Split(), Parallel(Quantize(COARSE), HaarWavelet(quantum=FINE)), Merge(), Quantize(COARSE)
    ),
    "within a branch": Parallel(Identity(), sequence(HaarWavelet(quantum=FINE), Quantize(COARSE))),
    "under an inverse, last": sequence(PairScaling(2, quantum=FINE), Inverse(Quantize(COARSE))),
    "under an inverse, first": sequence(Inverse(Quantize(COARSE)), PairScaling(2, quantum=FINE)),
    "an inverse of both": Inverse(sequence(Quantize(COARSE), PairScaling(2, quantum=FINE))),
    "in somebody's container": Chained(PairScaling(2, quantum=FINE), Quantize(COARSE)),
}


@pytest.mark.parametrize("name", EXACT)
def test_it_keeps_the_finest_grid_of_its_layers(name):
    quantum, layer = EXACT[name]
    assert layer.quantum == quantum
    assert layer.exact


@pytest.mark.parametrize("name", LOSING)
def test_it_keeps_none_where_digits_are_thrown_away(name):
    network = LOSING[name]
    assert network.quantum is None
    assert not network.exact
    (layer,) = network.inexact_layers.values()
    assert isinstance(layer, Quantize)
    assert layer.quantum == COARSE
    assert sequence(network).inexact_layers


def test_it_keeps_none_if_a_layer_keeps_none():
    mixed = sequence(shift(), AdditiveCoupling(Function(lambda x: x)))
    assert mixed.quantum is None
    assert list(mixed.inexact_layers) == ["1"]


def test_layers_that_only_move_numbers_keep_any():
    for network in (sequence(Split(), Merge()), sequence(), Parallel(Identity())):
        assert network.quantum is None
        assert network.exact


@pytest.mark.parametrize(
    ("network", "takes_any"),
    [
        (Quantize(COARSE), True),
        (sequence(Permute([1, 0]), Quantize(COARSE), Split(), shift()), True),
        (sequence(Split(), Parallel(Quantize(COARSE), Quantize(2**-4))), True),
        (sequence(InjectivePad(2), sequence(sequence(Quantize(COARSE)))), True),
        (sequence(Split(), Parallel(Quantize(COARSE), Identity())), False),
        (sequence(Split(), OnStreams(0, Quantize(COARSE)), shift()), False),
        (sequence(Inverse(Quantize(COARSE))), False),
        (Inverse(sequence(Quantize(COARSE), PairScaling(2, quantum=COARSE))), False),
        (shift(), False),
    ],
)
def test_any_state_is_taken_where_each_stream_is_quantized_first(network, takes_any):
    assert composed(network).takes_any is takes_any


def test_a_stream_that_is_not_quantized_is_checked():
    network = sequence(Split(), OnStreams(0, Quantize(COARSE)), shift())
    with pytest.raises(ValueError, match="not on the grid"):
        network(torch.full((2, 4), 1 / 3))


class Coarsening(InvertibleModule):
    """Somebody's own Quantize."""

    injective = bijective = False
    surjective = volume_preserving = True
    quantum = COARSE

    def forward(self, x):
        return (x / COARSE).round() * COARSE

    def inverse(self, y):
        return y


def test_layers_that_say_that_they_throw_digits_away_count_as_well():
    assert sequence(Coarsening(), PairScaling(2, quantum=FINE)).exact
    assert not sequence(PairScaling(2, quantum=FINE), Coarsening()).exact


@st.composite
def stacks(draw, depth=2):
    """Layers on two channels."""
    powers = st.integers(-12, -6).map(lambda n: 2.0**n)
    leaves = st.one_of(
        powers.map(Quantize),
        powers.map(lambda q: PairScaling(2, quantum=q)),
        powers.map(lambda q: sequence(Split(), Parallel(Quantize(q), Identity()), Merge())),
        powers.map(lambda q: sequence(Split(), ReversibleBlock(*halves(), quantum=q), Merge())),
    )
    inner = leaves if depth == 0 else st.one_of(leaves, stacks(depth - 1))
    layers = draw(st.lists(inner, min_size=1, max_size=4))
    network = sequence(*layers)
    return Inverse(network) if draw(st.booleans()) and network.surjective else network


def halves():
    return Function(lambda x: 0.3 * x), Function(lambda x: -0.7 * x)


@given(network=stacks(), seed=st.integers(0, 2**32 - 1))
def test_what_says_that_it_is_exact_gives_back_every_bit(network, seed):
    """Of a state that it reaches: an entrance rounds what it is given, and is found out once."""
    if not network.exact:
        return
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    x = Quantize(network.quantum)(x)
    rounded = network.inverse(network(x))
    if not composed(network).takes_any and network.injective:
        assert torch.equal(rounded, x)
    assert torch.equal(network.inverse(network(rounded)), rounded)
    assert torch.equal(network(network.inverse(network(x))), network(x))
