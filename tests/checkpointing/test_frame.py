"""A layer whose sub-network differentiates while it runs."""

import pytest
import torch
from torch import nn
from toys import (
    AffineCoupling,
    Function,
    TwiceEvaluated,
    assert_same_gradients,
    assert_same_step,
    both,
    images,
    linear,
    step,
)

from invertible import AdditiveCoupling, InvertibleSequential, Merge, Split, Swap


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


class Force(nn.Module):
    """The gradient of an energy, as in Hamiltonian and score networks."""

    def __init__(self, out: int = 2):
        super().__init__()
        self.energy = mlp(2, 1)
        self.mix = nn.Linear(2, out)

    def differentiate(self, x):
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    def forward(self, x):
        return self.mix(self.differentiate(x if x.requires_grad else x.detach().requires_grad_()))


class ForceWithoutGraph(Force):
    """A gradient that is taken as a constant."""

    def differentiate(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).sum(), x)[0]


class Curvature(Force):
    """Derivatives of derivatives, from one graph that is asked twice."""

    def differentiate(self, x):
        energy = self.energy(x).sum()
        first = torch.autograd.grad(energy, x, create_graph=True)[0]
        again = torch.autograd.grad(energy, x, retain_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
        return first + again + second


class Adapted(Force):
    """A step of gradient descent on its own parameters."""

    def differentiate(self, x):
        weight = self.energy[0].weight
        slope = torch.autograd.grad(self.energy(x).square().sum(), weight, create_graph=True)[0]
        return x @ (weight - 0.1 * slope).T @ self.energy[2].weight.expand(2, -1).T


SUBNETWORKS = [Force, ForceWithoutGraph, Curvature, Adapted]


def network(coupling, make):
    layers = [coupling(make()), Swap(), coupling(linear(out=make().mix.out_features)), Swap()]
    return InvertibleSequential(Split(), *layers, coupling(make()), Merge()).double()


@pytest.mark.parametrize("make", SUBNETWORKS)
@pytest.mark.parametrize("coupling", [AdditiveCoupling, AffineCoupling, TwiceEvaluated])
def test_a_sub_network_that_differentiates_has_the_gradients_of_storing(coupling, make):
    width = 2 if coupling is AdditiveCoupling else 4
    stored, rebuilt = both(lambda: network(coupling, lambda: make(width)))
    assert_same_step(step(rebuilt, images(5, 4)), step(stored, images(5, 4)))
    assert_same_gradients([stored, rebuilt], lambda net: net(images(5, 4)).sin().sum())


def test_it_has_them_through_the_inverse_and_with_a_log_determinant():
    stored, rebuilt = both(lambda: network(AffineCoupling, lambda: Force(4)))
    for method in ("inverse", "forward_and_log_det"):

        def loss(net, method=method):
            y = getattr(net, method)(images(5, 4))
            return y.sin().sum() if method == "inverse" else y[0].sin().sum() + y[1].sum()

        assert_same_gradients([stored, rebuilt], loss)


def test_it_has_second_derivatives():
    stored, rebuilt = both(lambda: network(AdditiveCoupling, Force))
    found = []
    for net in (stored, rebuilt):
        x = images(5, 4).requires_grad_()
        slope = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)[0]
        slope.square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_what_is_changed_in_place_meanwhile_is_refused():
    def f(x):
        h = x * 1.0
        y = h.square()
        h.add_(1)
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0]

    net = InvertibleSequential(Split(), AdditiveCoupling(Function(f)), Merge(), checkpoint=True)
    with pytest.raises(RuntimeError, match="in place"):
        net(images(3, 4).requires_grad_()).sum().backward()


def test_layers_may_be_differentiated_while_the_run_goes_on():
    def make():
        f = AffineCoupling(linear(out=4)), TwiceEvaluated(linear(out=4)), AdditiveCoupling(linear())
        return InvertibleSequential(
            Split(), *(layer for coupling in f for layer in (coupling, Swap())), Merge()
        ).double()

    found = []
    for net in both(make):
        start = images(5, 4).requires_grad_()
        penalties = Penalties(start)
        net[5].register_forward_hook(penalties)
        y = net(start)
        (y.sin().sum() + penalties.total).backward()
        found.append([start.grad, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


class Penalties:
    """A hook that looks how much a layer's output depends on the input of the network."""

    def __init__(self, start):
        self.start = start

    def __call__(self, _layer, _x, y):
        slope = torch.autograd.grad(y[0].square().sum(), self.start, create_graph=True)[0]
        self.total = slope.square().sum()


def test_a_sub_network_that_differentiates_beyond_its_input_is_refused():
    start = images(5, 4).requires_grad_()

    def f(x):
        return x * torch.autograd.grad(x.square().sum(), start, create_graph=True)[0].mean()

    net = InvertibleSequential(
        Split(), *network(AdditiveCoupling, Force)[1:3], AdditiveCoupling(Function(f)), Merge()
    )
    net.checkpoint = True
    with pytest.raises(RuntimeError, match="layer 3"):
        net(start).sum().backward()
