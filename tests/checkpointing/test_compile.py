"""Reversible checkpointing under torch.compile; without code generation, which takes minutes."""

import copy

import pytest
import torch
from torch import nn
from toys import (
    Affine,
    AffineCoupling,
    Chained,
    assert_same_step,
    batch_norm_net,
    body,
    body_images,
    both,
    couplings,
    images,
    linear,
    step,
)

from invertible import (
    Inverse,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    ReversibleBlock,
    Split,
)

# Dynamo warns of what it does itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_sub_networks_have_the_same_gradients():
    stored = body(3)
    rebuilt = copy.deepcopy(stored)
    rebuilt.checkpoint = True
    names = list(rebuilt.state_dict())
    assert rebuilt.compile_subnetworks(backend="aot_eager") is rebuilt
    assert list(rebuilt.state_dict()) == names
    assert_same_step(step(rebuilt, body_images()), step(stored, body_images()))


def test_sub_networks_are_really_compiled():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    network = body(2, checkpoint=True)
    network.compile_subnetworks(backend=backend)
    network(body_images())
    assert graphs
    twin = copy.deepcopy(network)  # a copy is not compiled, and works
    assert_same_step(step(twin, body_images()), step(network, body_images()))


def test_frozen_parts_do_not_disturb_compiled_sub_networks():
    stored = body(3)
    rebuilt = copy.deepcopy(stored)
    rebuilt.checkpoint = True
    rebuilt.compile_subnetworks(backend="aot_eager")
    results = []
    for network in (stored, rebuilt):
        network[2].requires_grad_(False)  # the next sub-network gets an input without grad
        network(body_images()).sin().sum().backward()
        results.append([p.grad for p in network.parameters() if p.requires_grad])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_compiled_network_is_right_in_both_directions(checkpoint):
    network = body(2, checkpoint=checkpoint)
    expected = step(copy.deepcopy(network), body_images())
    compiled = torch.compile(network, backend="aot_eager")
    found = step(compiled, body_images())
    torch.testing.assert_close(found["gradients"], expected["gradients"], rtol=1e-9, atol=1e-9)
    network.eval()
    inverse = torch.compile(network.inverse, backend="aot_eager")
    torch.testing.assert_close(inverse(compiled(body_images())), body_images())


def nest():
    """Compositions on tensors of 4 channels."""
    inner = InvertibleSequential(*couplings(1, linear), ReversibleBlock(linear(), linear()))
    streams = Parallel(Chained(Affine()), Inverse(Affine()))
    return InvertibleSequential(Split(), inner, OnStreams(0, Affine()), streams, Merge())


@pytest.mark.parametrize("method", ["forward", "forward_and_log_det"])
def test_a_network_compiles_to_one_graph(method):
    torch.manual_seed(0)
    network = nest().eval()
    x = torch.randn(3, 4)
    run = getattr(network, method)
    compiled = torch.compile(
        network if method == "forward" else run, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), run(x))


def dropout_net():
    return nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout())


@pytest.mark.parametrize("make", [batch_norm_net, dropout_net])
@pytest.mark.parametrize("training", [False, True])
def test_an_inverse_compiles_to_one_graph(make, training):
    torch.manual_seed(0)
    network = InvertibleSequential(Split(), *couplings(2, make), ReversibleBlock(make(), make()))
    network.train(training)
    draws = training and make is not batch_norm_net  # a graph can't put generators back
    compiled = torch.compile(network.inverse, backend="aot_eager", fullgraph=not draws)
    y = images(5, 2, 3, 3).float(), images(5, 2, 3, 3).sin().float()
    before = copy.deepcopy(network.state_dict())
    found = []
    for inverse in (network.inverse, compiled):
        torch.manual_seed(1)
        network.zero_grad()
        x = inverse(y)
        x.sin().sum().backward()
        found.append([x, torch.rand(1), *(p.grad for p in network.parameters())])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


def test_a_network_in_training_compiles_to_one_graph():
    torch.manual_seed(0)
    network = nest()
    x = torch.randn(3, 4)
    gradients = []
    for call in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        call(x).sin().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(*gradients)


class Dropped(nn.Sequential):
    """A sub-network of one's own, with statistics and random numbers."""

    def __init__(self):
        super().__init__(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Dropout(0.3), nn.Tanh())


@pytest.mark.parametrize("part", ["step", "loss", "backward"])
@pytest.mark.parametrize("make", [linear, Dropped])
def test_a_compiled_training_step_is_right(part, make):
    def train(compiles):
        torch.manual_seed(0)
        layers = [Split(), *couplings(2, make), AffineCoupling(linear(out=4)), Merge()]
        network = InvertibleSequential(*layers, checkpoint=compiles).double()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)

        def loss_of(x):
            return network(x).sin().square().mean()

        def backward(loss):
            loss.backward()
            optimizer.step()

        def step(x):
            optimizer.zero_grad()
            loss = loss_of(x)
            backward(loss)
            return loss

        if compiles and part == "step":
            step = torch.compile(step, backend="aot_eager")
        elif compiles and part == "loss":
            loss_of = torch.compile(loss_of, backend="aot_eager")
        elif compiles:
            backward = torch.compile(backward, backend="aot_eager")
        losses = [step(x).item() for x in images(4, 6, 4)]
        return losses, [*network.parameters(), *network.buffers()]

    torch.testing.assert_close(train(True), train(False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("place", ["1", "1.0", "2"])
def test_layers_compiled_by_themselves_have_the_gradients_of_storing(place, hooked):
    stored, rebuilt = both(lambda: nest().double())
    for net in (stored, rebuilt):
        if hooked:
            net.get_submodule(place).register_forward_hook(lambda _m, _x, y: (y[0] * 1.5 + 1, y[1]))
    rebuilt.get_submodule(place).compile(backend="aot_eager")
    expected = step(stored, images(5, 4))
    for _ in range(2):
        found = step(rebuilt, images(5, 4))
        torch.testing.assert_close(found["gradients"], expected["gradients"], rtol=1e-9, atol=1e-9)
