"""Compositions inside compositions are taken apart, unless they do something of their own."""

import copy

import pytest
import torch
from toys import (
    Affine,
    AffineCoupling,
    Chained,
    Counting,
    assert_same_gradients,
    assert_same_step,
    body,
    body_images,
    both,
    bottleneck,
    couplings,
    evaluations,
    images,
    linear,
    pair,
    step,
)

from invertible import (
    AdditiveCoupling,
    Composite,
    Identity,
    Inverse,
    InvertibleSequential,
    Member,
    Merge,
    OnStreams,
    Parallel,
    Permute,
    PixelUnshuffle,
    ReversibleBlock,
    Split,
    Swap,
)


def branch(channels=4, dropout=0.3):
    """Two couplings on a tensor, which draw in two places."""
    return InvertibleSequential(
        Split(), *couplings(2, lambda: bottleneck(channels // 2, dropout)), Merge()
    )


def on_pairs(*layers):
    """A network of images from layers of pairs of 4 channels."""
    return InvertibleSequential(PixelUnshuffle(2), Split(), *layers, Merge()).double()


NESTS = {
    "sequences": lambda: on_pairs(
        InvertibleSequential(*couplings(2, lambda: bottleneck(4, 0.3))),
        Inverse(InvertibleSequential(Swap(), AdditiveCoupling(bottleneck(4, 0.3)))),
    ),
    "Parallel": lambda: on_pairs(Parallel(branch(), PixelUnshuffle(1))),
    "both branches of Parallel": lambda: on_pairs(Parallel(branch(), branch())),
    "one layer in both branches": lambda: on_pairs(Parallel(*(2 * [branch()]))),
    "OnStreams": lambda: on_pairs(OnStreams(1, branch()), OnStreams(0, branch()), Swap()),
    "OnStreams in each other": lambda: on_pairs(
        OnStreams((1, 0), OnStreams(-1, OnStreams((0, 1), Swap()) and branch()))
    ),
    "OnStreams with other streams inside": lambda: InvertibleSequential(
        PixelUnshuffle(2),
        Split((2, 2, 4)),
        OnStreams(2, InvertibleSequential(Split((1, 3)), Swap(), Merge((3, 1)), branch(4))),
        OnStreams((0, -2), ReversibleBlock(bottleneck(2, 0.3), bottleneck(2))),
        Merge((2, 2, 4)),
    ).double(),
    "Inverse of all": lambda: Inverse(
        Inverse(on_pairs(Inverse(Parallel(branch(), branch())), OnStreams(0, Inverse(branch()))))
    ),
    "somebody's own": lambda: on_pairs(Chained(ReversibleBlock(bottleneck(4), bottleneck(4, 0.3)))),
    "one layer twice": lambda: on_pairs(*(2 * couplings(1, lambda: bottleneck(4, 0.3)))),
}


@pytest.mark.parametrize("name", NESTS)
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_nest_has_the_gradients_of_ordinary_training(name, direction):
    stored, rebuilt = both(NESTS[name])
    x = body_images()
    if direction == "inverse":
        x = copy.deepcopy(stored).eval()(x).detach()
    found, expected = (step(getattr(net, direction), x) for net in (rebuilt, stored))
    assert_same_step(found, expected)


@pytest.mark.parametrize("outermost", [True, False])
def test_a_checkpoint_anywhere_has_the_same_gradients(outermost):
    inner = InvertibleSequential(Split(), *couplings(2, linear), Merge(), checkpoint=not outermost)
    network = InvertibleSequential(
        Split(), Parallel(inner, Permute.random(4, seed=0)), Merge(), checkpoint=outermost
    ).double()
    stored = copy.deepcopy(network)
    for part in stored.modules():
        if isinstance(part, Composite):
            part.checkpoint = False
    assert_same_step(step(network, images(3, 8)), step(stored, images(3, 8)))


def test_each_layer_of_a_nest_is_evaluated_once_more():
    def f():
        return Counting(linear())

    inner = InvertibleSequential(Split(), *couplings(1, f), ReversibleBlock(f(), f()), Merge())
    network = InvertibleSequential(
        Split(),
        Parallel(inner, Inverse(copy.deepcopy(inner))),
        OnStreams(1, Chained(inner)),
        Merge(),
        checkpoint=True,
    ).double()
    network(images(3, 8)).sum().backward()
    assert evaluations(network) == [4] * 3 + [2] * 3  # the first stands twice


@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_log_determinants_of_a_nest_have_the_same_gradients(method):
    def make():
        affine = AffineCoupling(linear(out=4))
        inner = InvertibleSequential(Split(), affine, Swap(), AdditiveCoupling(linear()), Merge())
        streams = Parallel(InvertibleSequential(inner, Affine()), Inverse(copy.deepcopy(inner)))
        return InvertibleSequential(Split(), streams, OnStreams(0, Affine()), Merge()).double()

    def loss(network):
        y, log_det = getattr(network, method)(images(3, 8))
        return y.sin().sum() + (log_det * torch.tensor([1.0, 2.0, 3.0])).sum()

    assert_same_gradients(both(make), loss)


# --- what keeps a composition in one piece


def test_hooks_on_an_inner_composition_fire_once():
    stored, rebuilt = both(
        lambda: InvertibleSequential(body(2, lambda: bottleneck(4, 0.3))[:-1], body(2)[2:])
    )
    calls = []
    for network in (stored, rebuilt):
        network[0].register_forward_hook(lambda *_: calls.append("forward"))
        network[1].register_forward_hook(lambda *given: 2 * given[-1])
    assert_same_step(step(rebuilt, body_images()), step(stored, body_images()))
    assert calls == ["forward"] * 2


class Doubled(Chained):
    """A container with a forward of its own around that of its members."""

    calls = 0

    def forward(self, x, context=None):
        self.calls += 1
        return 2 * super().forward(x, context)

    def inverse(self, y, context=None):
        return super().inverse(y / 2, context)


class Everything(Chained):
    """A container that does not use what runs the members."""

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x.sinh()

    def inverse(self, y):
        y = y.asinh()
        for part in reversed(self.parts):
            y = part.inverse(y)
        return y


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("kind", [Doubled, Everything])
@pytest.mark.parametrize("outside", [False, True])
def test_a_container_with_a_forward_of_its_own_is_run_as_it_says(kind, outside, direction):
    def make():
        own = kind(Split(), *couplings(2, lambda: Counting(linear())), Merge())
        return (InvertibleSequential(Affine(), own, Affine()) if outside else own).double()

    stored, rebuilt = both(make)
    x = 0.1 * images(3, 4)
    assert_same_step(
        *(step(getattr(network, direction), x) for network in (rebuilt, stored)), rtol=1e-8
    )
    torch.testing.assert_close(rebuilt.inverse(rebuilt(x)), x)


def test_a_container_with_a_forward_of_its_own_runs_once():
    network = InvertibleSequential(Affine(), Doubled(Affine()), Affine(), checkpoint=True)
    network(images(2, 2, dtype=torch.float32)).sum().backward()
    assert network[1].calls == 1


def test_a_method_replaced_on_an_object_is_run():
    network = InvertibleSequential(Identity(), InvertibleSequential(Identity()), checkpoint=True)
    network[1].forward = lambda x: 3 * x
    x = images().requires_grad_()
    y = network(x)
    y.sum().backward()
    assert torch.equal(y, 3 * x)
    assert torch.equal(x.grad, torch.full_like(x, 3))


# --- containers of one's own


class Twice(Composite):
    """Lists its only layer twice, the second time on the other stream and the other way."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def members(self):
        return [
            Member("layer", self.layer, streams=0),
            Member("layer", self.layer, inverted=True, streams=-1),
        ]


def test_a_container_of_ones_own_runs_its_members():
    layer = Affine().double()
    x1, x2 = pair()
    twice = Twice(layer)
    y = twice((x1, x2))
    torch.testing.assert_close(y, (layer(x1), layer.inverse(x2)), rtol=0, atol=0)
    torch.testing.assert_close(twice.inverse(y), (x1, x2))
    _, log_det = twice.forward_and_log_det((x1, x2))
    assert log_det.tolist() == [0, 0]
    assert twice.bijective
    assert not twice.volume_preserving


def test_a_container_of_ones_own_has_the_gradients_of_ordinary_training():
    def make():
        inner = InvertibleSequential(Split(), *couplings(2, lambda: bottleneck(2, 0.3)), Merge())
        return on_pairs(Twice(inner), Swap(), Twice(Affine(0.1)))

    stored, rebuilt = both(make)
    assert_same_step(step(rebuilt, body_images()), step(stored, body_images()))


def test_a_container_of_ones_own_can_ask_for_checkpointing():
    network = Chained(*couplings(3, lambda: Counting(linear()))).double()
    network.checkpoint = True
    network(pair(3, 4))[0].sum().backward()
    assert evaluations(network) == [2] * 3
