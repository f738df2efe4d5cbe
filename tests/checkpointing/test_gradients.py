"""Training without stored activations is ordinary training, up to the rounding of inversion."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import checkpoint as torch_checkpoint
from toys import (
    AffineCoupling,
    Counting,
    TwiceEvaluated,
    assert_same_gradients,
    assert_same_step,
    body,
    both,
    bottleneck,
    couplings,
    evaluations,
    linear,
    pair,
    step,
)
from toys import body_images as images

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    PixelUnshuffle,
    Rebuild,
    ReversibleBlock,
    Split,
    Swap,
    no_trace,
)

METHODS = ("forward", "inverse", "forward_and_log_det", "inverse_and_log_det")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_step_equals_ordinary_training(training, direction):
    stored, rebuilt = both(lambda: body(5, lambda: bottleneck(4, 0.3)).train(training))
    x = images() if direction == "forward" else copy.deepcopy(stored)(images()).detach()
    found, expected = (step(getattr(net, direction), x) for net in (rebuilt, stored))
    assert_same_step(found, expected)


@settings(max_examples=15)
@given(
    depth=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    dropout=st.sampled_from([0.0, 0.4]),
    training=st.booleans(),
    channels_last=st.booleans(),
    frozen=st.lists(st.integers(0, 4)),
    anchor_every=st.sampled_from([None, 1, 3]),
)
def test_random_stacks_have_the_gradients_of_ordinary_training(
    depth, seed, dropout, training, channels_last, frozen, anchor_every
):
    torch.manual_seed(seed)
    stored, rebuilt = both(lambda: body(depth, lambda: bottleneck(4, dropout)).train(training))
    rebuilt.checkpoint = Rebuild(anchor_every=anchor_every)
    x = images(seed=seed)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    for network in (stored, rebuilt):
        layers = [layer for layer in network if isinstance(layer, AdditiveCoupling)]
        for i in frozen:
            layers[i % depth].requires_grad_(False)
    expected = step(stored, x)
    assert_same_step(step(rebuilt, x), expected)


# --- each layer, in each of its four runs


def additive(depth):
    return [part for _ in range(depth) for part in (AdditiveCoupling(counted()), Swap())]


def blocks(depth):
    return [ReversibleBlock(counted(), counted()) for _ in range(depth)]


def affine(depth, layer=AffineCoupling):
    return [part for _ in range(depth) for part in (layer(counted(out=4)), Swap())]


def twice_evaluated(depth):
    return affine(depth, TwiceEvaluated)


def counted(**sizes):
    return Counting(linear(**sizes))


def loss_of(method, x):
    """A loss of everything that a method returns."""

    def loss(network):
        y = getattr(network, method)(x)
        y, *log_det = y if method.endswith("log_det") else (y,)
        return sum(part.sin().sum() for part in (*y, *log_det))

    return loss


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "again"), [(additive, 1), (blocks, 1), (affine, 1), (twice_evaluated, 2)]
)
def test_each_sub_network_is_evaluated_once_more_in_each_run(make, again, method):
    networks = both(lambda: InvertibleSequential(*make(3)).double())
    x = tuple(part.requires_grad_() for part in pair(4, 4))
    assert_same_gradients(networks, loss_of(method, x))
    stored, rebuilt = map(evaluations, networks)
    assert set(stored) == {1}
    assert set(rebuilt) == {1 + again}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [AffineCoupling, TwiceEvaluated])
def test_a_layer_with_dropout_has_the_same_gradients_in_each_run(make, method):
    def network():
        layers = [make(nn.Sequential(nn.Dropout(0.5), *linear(out=4))) for _ in range(3)]
        return InvertibleSequential(layers[0], Swap(), layers[1], Swap(), layers[2]).double()

    assert_same_gradients(both(network), loss_of(method, pair(8, 4)))


class TwoDropouts(InvertibleModule):
    """Two couplings in one layer: its inverse draws in the other order."""

    def __init__(self):
        super().__init__()
        self.f, self.g = bottleneck(4, 0.5), bottleneck(4, 0.5)

    def forward(self, x):
        y1 = x[0] + self.f(x[1])
        return y1, x[1] + self.g(y1)

    def inverse(self, y):
        with no_trace(self, y):
            x2 = y[1] - self.g(y[0])
            return y[0] - self.f(x2), x2


def test_dropout_that_an_inverse_cannot_follow_is_an_error():
    network = InvertibleSequential(PixelUnshuffle(2), Split(), TwoDropouts(), checkpoint=True)
    with pytest.raises(RuntimeError, match="what it returned is off by"):
        network.double()(images())[0].sum().backward()


def test_the_inverse_of_an_injective_network_keeps_what_it_crops():
    def make():
        layers = (InjectivePad(6), Split(), *couplings(1, lambda: bottleneck(4)), Merge())
        return InvertibleSequential(*layers).double()

    stored, rebuilt = both(make)
    phi = torch.randn(3, 8, 8, 8, dtype=torch.float64)  # not an output of the network
    assert_same_step(step(rebuilt.inverse, phi), step(stored.inverse, phi))


# --- all kinds of sub-networks


class Symmetric(nn.Module):
    def forward(self, w):
        return w + w.mT


def parametrized():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Symmetric())
    return copy.deepcopy(nn.Sequential(conv, nn.Tanh()))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return torch_checkpoint.checkpoint(self.f, x, use_reentrant=False)


def with_a_composition():
    inner = InvertibleSequential(Split(), AdditiveCoupling(nn.Conv2d(2, 2, 1)), Swap(), Merge())
    return nn.Sequential(inner, nn.Tanh(), nn.Conv2d(4, 4, 1))


SHARED = bottleneck(4, 0.3)


@pytest.mark.parametrize(
    "f",
    [
        parametrized,
        Checkpointed,
        with_a_composition,
        lambda: SHARED,
        lambda: bottleneck(4, activation=lambda: nn.Hardtanh(inplace=True)),
    ],
    ids=["parametrized", "torch's checkpoint", "a composition", "shared", "in place"],
)
def test_any_sub_network_has_the_same_gradients(f):
    stored, rebuilt = both(lambda: body(3, f))
    assert_same_step(step(rebuilt, images()), step(stored, images()))


# --- contexts


class Gains(nn.Module):
    """Takes a dictionary as context."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, context):
        return self.conv(x * context["gain"]).tanh()


def test_a_context_gets_gradients():
    def make():
        layers = [AdditiveCoupling(Gains(), conditional=True), Swap()]
        return InvertibleSequential(PixelUnshuffle(2), Split(), *(2 * layers), Merge()).double()

    gradients = []
    for network in both(make):
        context = {"gain": torch.full((4, 4, 4), 0.7, dtype=torch.float64, requires_grad=True)}
        network(images(), context).sin().sum().backward()
        gradients.append([context["gain"].grad] + [p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
