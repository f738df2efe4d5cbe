"""Memory does not grow with depth, however layers are nested."""

import gc
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from toys import Chained, body, couplings, memory_of, memory_of_step
from toys import body_images as images

from invertible import (
    AdditiveCoupling,
    FactorOut,
    Identity,
    Inverse,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    Permute,
    Rebuild,
    ReversibleBlock,
    Split,
)

# What a layer keeps at most of the numbers that are compared by value, in bytes.
SAMPLES = 3 * 64 * 8


def many():
    """Saves five tensors of its input's size, and has no parameters, whose gradients add up."""
    return nn.Sequential(nn.Tanh(), nn.Softplus(), nn.Sigmoid(), nn.Softsign(), nn.Tanh())


def chain(n, **options):
    """Blocks of two couplings, from a tensor to a tensor."""
    return InvertibleSequential(Split(), *couplings(2 * n, many), Merge(), **options)


def split(layer):
    """A layer of pairs, on tensors."""
    return InvertibleSequential(Split(), layer, Merge())


# Compositions of n blocks.
NESTS = {
    "InvertibleSequential": chain,
    "nested": lambda n: InvertibleSequential(*(chain(1) for _ in range(n))),
    "nested, with checkpoints inside": lambda n: InvertibleSequential(
        chain(n // 2, checkpoint=True), chain(n // 2, checkpoint=True)
    ),
    "nested in all": lambda n: Inverse(
        Chained(split(OnStreams((1, 0), Parallel(Inverse(chain(n)), Identity()))))
    ),
    "Inverse": lambda n: Inverse(chain(n)),
    "a user's Composite": lambda n: Chained(*chain(n)),
    "ReversibleBlock": lambda n: split(
        InvertibleSequential(*(ReversibleBlock(many(), many()) for _ in range(n)))
    ),
    "a branch of Parallel": lambda n: split(Parallel(Permute.random(4, seed=0), chain(n))),
    "both branches of Parallel": lambda n: split(Parallel(chain(n), chain(n))),
    "a Parallel for each block": lambda n: InvertibleSequential(
        Split(), *(Parallel(Identity(), chain(1)) for _ in range(n)), Merge()
    ),
    "OnStreams": lambda n: split(OnStreams(1, chain(n))),
    "OnStreams, with a checkpoint inside": lambda n: split(OnStreams(1, chain(n, checkpoint=True))),
    "an OnStreams for each block": lambda n: InvertibleSequential(
        Split(), *(OnStreams(-1, chain(1)) for _ in range(n)), Merge()
    ),
    "OnStreams of pairs": lambda n: split(
        OnStreams((1, 0), InvertibleSequential(*couplings(2 * n, many)))
    ),
    "several scales": lambda n: InvertibleSequential(
        chain(n // 2),
        FactorOut(),
        OnStreams(0, chain(n // 2)),
        FactorOut(),
        OnStreams((-1, 0), Inverse(AdditiveCoupling(many()))),
        Inverse(FactorOut()),
        Inverse(FactorOut()),
    ),
}


def memory_of_blocks(name, n, checkpoint):
    """Held and peak memory of a step, in states."""
    network = Chained(NESTS[name](n))
    network.checkpoint = checkpoint
    x = torch.randn(32, 8, 32, 32, requires_grad=True)
    return [bytes_ / x.nbytes for bytes_ in memory_of_step(network, x)]


@pytest.mark.parametrize("name", NESTS)
def test_any_nesting_is_flat(name):
    held, peak = memory_of_blocks(name, 2, True)
    held_by_more, peak_of_more = memory_of_blocks(name, 16, True)
    assert held_by_more <= held + 0.1
    assert peak_of_more <= peak + 0.1


def test_stored_activations_are_not_flat():
    held, peak = memory_of_blocks("InvertibleSequential", 2, False)
    held_by_more, peak_of_more = memory_of_blocks("InvertibleSequential", 16, False)
    assert held_by_more > 5 * held
    assert peak_of_more > 5 * peak


def test_compositions_inside_sub_networks_keep_nothing():
    def residual():
        inner = InvertibleSequential(
            Split(), AdditiveCoupling(nn.Conv2d(2, 2, 1)), Merge(), checkpoint=True
        )
        return nn.Sequential(inner, nn.Tanh())

    networks = [body(depth, residual, checkpoint=True) for depth in (2, 12)]
    held = [memory_of(lambda network=network: network(images(16))).held for network in networks]
    assert held[1] <= held[0] + 2 * (12 - 2) * SAMPLES


class Gated(nn.Module):
    """Computes something large of its parameters, which no gradient of the input asks for."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(10_000))

    def forward(self, x):
        return x.tanh() * self.gate.tanh().exp().mean()


def test_what_autograd_does_not_ask_for_goes_with_its_layer():
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    peaks = []
    for depth in (2, 12):
        layers = couplings(depth, Gated)
        loss = InvertibleSequential(Split(), *layers, Merge(), checkpoint=True)(x).sum()
        peaks.append(memory_of(lambda loss=loss: torch.autograd.grad(loss, x)).peak)
    # Samples as they were, and as they were rebuilt, and once more side by side.
    assert peaks[1] <= peaks[0] + x.nbytes + (12 - 2) * 3 * SAMPLES


class Watched(nn.Module):
    """Knows which of the activations that it saved are still in memory."""

    storages: ClassVar[list] = []
    alive: ClassVar[list] = []

    def forward(self, x):
        self.alive.append(sum(not storage.expired() for storage in self.storages))
        y = x.tanh()
        self.storages.append(StorageWeakRef(y.untyped_storage()))
        return y.square()


def test_the_backward_pass_holds_the_activations_of_one_layer():
    network = body(6, Watched, checkpoint=True)
    network(images().requires_grad_()).sum().backward(retain_graph=True)
    assert Watched.alive == [0] * 12


class Stage(nn.Module):
    """Knows which of the states that it was given are still in memory."""

    states: ClassVar[list] = []
    alive: ClassVar[list] = []

    def forward(self, x):
        self.alive.append(sum(not storage.expired() for storage in self.states))
        self.states.append(StorageWeakRef(x.untyped_storage()))
        return x.tanh()


def test_states_that_nobody_needs_any_more_are_dropped():
    network = InvertibleSequential(Split(), *couplings(12, Stage), Merge(), checkpoint=True)
    loss = network(torch.randn(3, 8, requires_grad=True)).sum()
    del Stage.alive[:]
    loss.backward(retain_graph=True)
    assert max(Stage.alive) <= 6


def live_tensors():
    # Not isinstance, which asks some lazy modules for their class, and they warn.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("backward", [False, True])
def test_a_step_leaves_nothing_behind(backward):
    network = body(checkpoint=True)
    step = lambda: network(images()).sum()  # noqa: E731
    step().backward()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(3):
            loss = step()
            if backward:
                loss.backward()
            del loss
        # without the garbage collector: there are no cycles
        assert live_tensors() == before
    finally:
        gc.enable()


def test_states_are_kept_for_the_anchors_only():
    network = body(12, checkpoint=True)
    held = {}
    for every in (None, 6):
        network.checkpoint = Rebuild(anchor_every=every)
        held[every], _, y = memory_of(lambda: network(images(16)))
    anchors = len(range(0, len(network), 6))
    # A state is as large as the input; the first anchor is the input itself.
    assert held[6] - held[None] <= anchors * y.nbytes * 1.1
