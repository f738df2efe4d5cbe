"""Zeros that are appended come back as they were, or the states in which they stand are stored."""

import pytest
import torch
from torch import nn
from toys import Affine, Keep, both, memory_of_step

from invertible import (
    AdditiveCoupling,
    HaarWavelet,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    Permute,
    PixelUnshuffle,
    Quantize,
    Rebuild,
    ReversibleBlock,
    Split,
    Swap,
    measure_drift,
    no_trace,
    reversible_checkpoint,
)
from invertible.checkpointing.chain import Chain


def kinked(channels=16, out=None):
    """Of constant channels BatchNorm makes zeros, and there ReLU has its kink."""
    return nn.Sequential(
        *(nn.BatchNorm1d(channels), nn.ReLU(), nn.Linear(channels, 16, bias=False)),
        *(nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, out or channels, bias=False)),
    )


def convolutions(channels=24):
    return nn.Sequential(
        *(nn.BatchNorm2d(channels), nn.ReLU()),
        nn.Conv2d(channels, 32, 3, padding=1, bias=False),
        *(nn.BatchNorm2d(32), nn.ReLU()),
        nn.Conv2d(32, channels, 3, padding=1, bias=False),
    )


def tokens(channels):
    return nn.Sequential(nn.LayerNorm(channels), nn.ReLU(), nn.Linear(channels, channels))


def groups():
    return nn.Sequential(nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1))


def couplings(count, make=kinked, **options):
    return [layer for _ in range(count) for layer in (AdditiveCoupling(make(), **options), Swap())]


def error(make, x, run=lambda network, x: network(x), **rebuild):
    """How far the gradients of all parameters are from those of stored activations."""
    gradients = []
    for network, checkpoint in zip(both(make), (False, Rebuild(**rebuild)), strict=True):
        network.to(x.dtype)
        if checkpoint and run is not reversible_checkpoint:
            network.checkpoint = checkpoint
        y = (run if checkpoint else type(network).__call__)(network, x)
        sum(part.sin().sum() for part in (y if isinstance(y, tuple) else (y,))).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    stored, rebuilt = gradients
    return ((stored - rebuilt).norm() / stored.norm()).item()


def vectors(batch=32, channels=8):
    return torch.randn(batch, channels, dtype=torch.float64)


def pictures():
    return torch.randn(8, 3, 8, 8, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def stored(monkeypatch):
    """How many tensors on the way each chain stores."""
    counts = []

    class Counting(Chain):
        def end(self):
            counts.append(len(self._kept))
            super().end()

    monkeypatch.setattr("invertible.checkpointing.follow.Chain", Counting)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-2)])
def test_a_deep_network_of_12_channels_padded_to_48_has_the_gradients_of_stored_states(
    dtype, allowed
):
    def make():
        return InvertibleSequential(
            InjectivePad(9), PixelUnshuffle(2), Split(), *couplings(18, convolutions)
        )

    x = torch.randn(16, 3, 16, 16, dtype=dtype)
    assert error(make, x) < allowed
    assert error(make, x, anchor_every=5) < allowed


class BothAtOnce(InvertibleModule):
    """A layer that is inverted and run again, and evaluates sub-networks on both streams."""

    def __init__(self):
        super().__init__()
        self.f, self.g = kinked(), kinked()

    def forward(self, x):
        y1 = x[0] + self.f(x[1])
        return y1, x[1] + self.g(y1)

    def inverse(self, y):
        with no_trace(self, y):
            x2 = y[1] - self.g(y[0])
            return y[0] - self.f(x2), x2


def cut():
    """Three streams, of which the last is all zeros."""
    sizes = (8, 8, 16)
    return [
        OnStreams((i, j), AdditiveCoupling(kinked(sizes[j], sizes[i])))
        for i, j in 2 * [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0)]
    ]


# Networks, what they are given, and how many tensors they store at most.
NETWORKS = {
    "couplings": (lambda: [InjectivePad(24), Split(), *couplings(6)], vectors, 3),
    "reversible blocks": (
        lambda: [InjectivePad(24), Split(), *[ReversibleBlock(kinked(), kinked())] * 3],
        *(vectors, 3),
    ),
    "nests": (
        lambda: [
            InjectivePad(24),
            InvertibleSequential(Split(), InvertibleSequential(*couplings(3)), *couplings(2)),
        ],
        *(vectors, 3),
    ),
    "layers that are inverted first": (
        lambda: [InjectivePad(24), Split(), *[BothAtOnce() for _ in range(3)]],
        *(vectors, 4),
    ),
    "permutations": (
        lambda: [
            *(InjectivePad(24), Permute.random(32, seed=1), Split(), *couplings(1)),
            Parallel(Permute.random(16, seed=2), Permute.random(16, seed=3)),
            *couplings(4),
        ],
        *(vectors, 4),
    ),
    "branches": (
        lambda: [
            *(InjectivePad(9), Split(), *couplings(1, lambda: convolutions(6))),
            Parallel(PixelUnshuffle(2), PixelUnshuffle(2)),
            *couplings(4, convolutions),
        ],
        *(pictures, 3),
    ),
    "pads in branches": (
        lambda: [Split(), Parallel(InjectivePad(12), InjectivePad(12)), *couplings(5)],
        *(vectors, 3),
    ),
    "a pad in one branch": (
        lambda: [
            *(Split((6, 2)), Parallel(Keep(), InjectivePad(4))),
            *couplings(5, lambda: kinked(6)),
        ],
        *(vectors, 3),
    ),
    "three streams": (lambda: [InjectivePad(24), Split((8, 8, 16)), *cut()], vectors, 5),
    "an inverse": (
        lambda: [InjectivePad(24), Split(), Inverse(InvertibleSequential(*couplings(5)))],
        *(vectors, 3),
    ),
    "a wavelet": (
        lambda: [InjectivePad(9), HaarWavelet(), Split(), *couplings(4, convolutions)],
        *(pictures, 4),
    ),
    "scales": (lambda: [InjectivePad(24), Affine(0.3, 0.0), Split(), *couplings(5)], vectors, 3),
    "shifts": (lambda: [InjectivePad(24), Affine(0.3, 0.7), Split(), *couplings(5)], vectors, 4),
    "two pads": (
        lambda: [
            *(InjectivePad(8), Split(), *couplings(3, lambda: kinked(8)), Merge()),
            *(InjectivePad(16), Split(), *couplings(3)),
        ],
        *(vectors, 4),
    ),
    "rows": (
        lambda: [
            InjectivePad(8, dim=2), InjectivePad(9), Split(), *couplings(4, lambda: convolutions(6))
        ],
        *(pictures, 3),
    ),
    "tokens": (
        lambda: [InjectivePad(5), Split(dim=1), *couplings(4, lambda: tokens(8))],
        *(lambda: torch.randn(6, 5, 8, dtype=torch.float64), 3),
    ),
    "features of tokens": (
        lambda: [InjectivePad(24, dim=-1), Split(dim=-1), *couplings(4, lambda: tokens(16))],
        *(lambda: torch.randn(6, 5, 8, dtype=torch.float64), 3),
    ),
    "groups": (
        lambda: [InjectivePad(9), PixelUnshuffle(2), Split(), *couplings(4, groups)],
        *(pictures, 3),
    ),
    "a batch of one": (
        lambda: [InjectivePad(24), Split(), *couplings(4, lambda: tokens(16))],
        *(lambda: vectors(1), 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_behind_a_pad_are_those_of_stored_activations(name, stored):
    layers, states, at_most = NETWORKS[name]
    x = states()
    assert error(lambda: InvertibleSequential(*layers()), x) < 1e-11
    assert 0 < sum(stored) <= at_most


def padded(*layers, depth=5, **options):
    return InvertibleSequential(InjectivePad(24), *layers, Split(), *couplings(depth), **options)


@pytest.mark.parametrize("layers", [(), (Affine(0.3, 0.0),)])
def test_a_call_may_ask_for_it(layers):
    assert error(lambda: padded(*layers), vectors(), reversible_checkpoint) < 1e-11


def test_no_more_is_stored_for_more_layers(stored):
    for depth in (4, 16):
        network = padded(depth=depth, checkpoint=True).double()
        network(vectors())
    assert stored == [3, 3]


def test_memory_does_not_grow_with_depth():
    def network(depth):
        network = padded(depth=depth, checkpoint=True).double()
        return lambda x: sum(part.sin().sum() for part in network(x))

    x = vectors(256)
    (shallow, _), (deep, _) = (memory_of_step(network(depth), x) for depth in (4, 16))
    assert deep < 1.5 * shallow


@pytest.mark.parametrize("hooked", ["body", "pad", "both"])
def test_compositions_with_hooks_know_what_is_in_front_of_them(hooked):
    def make():
        pad, body = (
            InvertibleSequential(InjectivePad(24)),
            InvertibleSequential(Split(), *couplings(5)),
        )
        for name, part in (("pad", pad), ("body", body)):
            if hooked in (name, "both"):
                part.register_forward_hook(lambda *_: None)
        return InvertibleSequential(pad, body)

    assert error(make, vectors()) < 1e-11


def test_the_pad_may_be_outside_of_what_is_rebuilt():
    def make(checkpoint):
        torch.manual_seed(1)
        body = InvertibleSequential(Split(), *couplings(5), checkpoint=checkpoint)
        return InvertibleSequential(InjectivePad(24), body).double()

    x, gradients = vectors(), []
    for checkpoint in (False, True):
        network = make(checkpoint)
        sum(part.sin().sum() for part in network(x)).backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("own", [True, False])
def test_training_through_inverse_is_right_where_the_pad_comes_last(own):
    """Whether the features are those of an input or not."""
    x = vectors()
    network = InvertibleSequential(InjectivePad(24), Split(), *couplings(5)).double()
    with torch.no_grad():
        features = network(x)
    if not own:
        features = tuple(map(torch.randn_like, features))

    def inverted(network, _):
        return network.inverse(features)

    gradients = []
    for checkpoint in (False, True):
        network.checkpoint = checkpoint
        network.zero_grad()
        inverted(network, x).sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-11 * gradients[0].norm()


def silent():
    """A sub-network that returns zeros, as many do at first."""
    f = kinked()
    nn.init.zeros_(f[-1].weight)
    return f


def test_zeros_that_no_layer_fills_ask_for_no_storage(stored):
    def make():
        return InvertibleSequential(InjectivePad(24), Split(), *couplings(12, silent))

    assert error(make, vectors()) == 0
    assert stored == [0]


def test_a_stream_that_is_never_touched_asks_for_no_storage(stored):
    def make():
        branch = InvertibleSequential(Split(), *couplings(4, lambda: kinked(4)), Merge())
        return InvertibleSequential(InjectivePad(8), Split(), Parallel(branch, Keep()))

    assert error(make, vectors()) < 1e-11
    assert stored == [0]


def test_an_exact_network_stores_nothing(stored):
    q = 2.0**-16

    def make():
        return InvertibleSequential(
            Quantize(q), InjectivePad(24), Split(), *couplings(5, quantum=q)
        )

    assert error(make, vectors()) == 0
    assert stored == [0]


def test_a_network_that_is_exact_in_part_is_no_exact_one(stored):
    q = 2.0**-16

    def make():
        exact = couplings(4, quantum=q)
        return InvertibleSequential(Quantize(q), InjectivePad(24), Split(), *exact, *couplings(3))

    assert error(make, vectors()) < 1e-11
    assert 0 < stored[0] <= 3


def test_nothing_is_looked_at_without_a_pad(monkeypatch):
    def refuse(_):
        raise AssertionError

    monkeypatch.setattr("invertible.checkpointing.constants._constant_slices", refuse)
    network = InvertibleSequential(Split(), *couplings(2, lambda: kinked(4)), checkpoint=True)
    sum(part.sum() for part in network.double()(vectors())).backward()
    with pytest.raises(AssertionError):
        padded(checkpoint=True).double()(vectors())


def test_identical_examples_are_right_behind_a_pad():
    x = vectors(1).expand(32, -1).clone()
    assert error(padded, x) < 1e-11


def test_an_empty_batch_passes():
    network = InvertibleSequential(
        InjectivePad(24), Split(), *couplings(3, lambda: nn.Linear(16, 16)), checkpoint=True
    ).double()
    sum(part.sum() for part in network(vectors(0))).backward()
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_complex_states_are_followed(stored):
    class Real(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = kinked()

        def forward(self, x):
            return self.f(x.real) + 1j * x.imag

    network = InvertibleSequential(
        InjectivePad(24), Split(), *couplings(4, Real), checkpoint=True
    ).double()
    x = torch.complex(vectors(), vectors())
    sum(part.abs().sum() for part in network(x)).backward()
    assert stored[0] > 0


def test_no_drift_is_left_in_front_of_what_fills_the_zeros():
    network = padded(checkpoint=True).double()
    with measure_drift() as drift:
        sum(part.sin().sum() for part in network(vectors())).backward()
    assert drift.rows[1].error == drift.rows[2].error == 0
    assert drift.near_constants == []
