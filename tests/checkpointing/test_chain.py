"""A chain rebuilds what is asked for, by what streams need, and keeps no more than that."""

import weakref

import pytest
import torch
from torch import nn
from toys import AffineCoupling, Counting, Function, Keep, evaluations, linear, pair

from invertible import (
    AdditiveCoupling,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    OnStreams,
    Parallel,
    Permute,
    Rebuild,
    Split,
    Swap,
)
from invertible.checkpointing.chain import Chain
from invertible.checkpointing.plan import Plan
from invertible.direction import Direction


def watched(kind, log, **options):
    """A layer that logs its inverse runs."""

    class Watched(kind):
        def inverse(self, y):
            log.append(self)
            return super().inverse(y)

    Watched.__module__ = kind.__module__
    return Watched(**options)


def recorded(network, x):
    """A chain that a network ran in, and what came out."""
    chain = Chain(None)
    for step in Plan(network, Direction(), True, Rebuild()).steps:
        x, _ = chain.record(step, x)
    chain.end()
    return chain, x


def leaves(count=3):
    return tuple(torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(count))


def test_layers_that_hand_streams_through_are_never_undone():
    log = []
    swap = watched(Swap, log)
    network = InvertibleSequential(
        AdditiveCoupling(linear()), swap, AdditiveCoupling(linear()), swap, checkpoint=True
    ).double()
    sum(y.sum() for y in network(leaves(2))).backward()
    assert log == []


def test_layers_that_move_numbers_are_undone_once():
    log = []
    permute = watched(Permute, log, permutation=torch.tensor([1, 0]))
    part = AdditiveCoupling(linear())
    network = InvertibleSequential(
        part, Parallel(permute, Keep()), Swap(), part, checkpoint=True
    ).double()
    loss = sum(y.sum() for y in network(leaves(2)))
    loss.backward()
    assert log == [permute]


def test_branches_that_were_not_asked_for_are_not_undone():
    log = []
    first, second = (watched(Permute, log, permutation=torch.tensor([1, 0])) for _ in "ab")
    coupling = AdditiveCoupling(Counting(linear()))
    network = InvertibleSequential(
        OnStreams((0, 1), coupling), OnStreams(0, first), OnStreams(2, second), checkpoint=True
    ).double()
    network(leaves())[0].sum().backward()
    assert log == [first]
    assert evaluations(network) == [2]


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_layer_in_the_middle_is_reached_through_what_lies_behind_its_streams(last):
    """Three couplings on three streams; only the needed ones are evaluated."""
    layers = [
        OnStreams(pair, AdditiveCoupling(Counting(linear()))) for pair in ((0, 1), (1, 2), (2, 0))
    ]
    network = InvertibleSequential(*layers, checkpoint=True).double()
    stored = InvertibleSequential(*layers)
    x = leaves()
    parameters = list(layers[last].parameters())
    results = []
    for net in (stored, network):
        y = net(x)
        loss = sum(part.sin().sum() for part in y)
        results.append(torch.autograd.grad(loss, parameters))
    torch.testing.assert_close(*results)


def test_one_tensor_in_two_streams_is_one():
    network = InvertibleSequential(AdditiveCoupling(linear()), Swap(), AdditiveCoupling(linear()))
    network.double()
    (x,) = leaves(1)
    results = []
    for checkpoint in (False, True):
        network.checkpoint = checkpoint
        y = network((x, x))
        loss = y[0].sin().sum() + 2 * y[1].cos().sum()
        results.append(torch.autograd.grad(loss, [x, *network.parameters()]))
    torch.testing.assert_close(*results)


class Copies(InvertibleModule):
    """Hands one stream through, and copies the other."""

    def forward(self, x):
        return x[0], x[1].clone()

    inverse = forward


def test_outputs_may_be_inputs_in_part_and_in_any_order():
    for layer in (Copies(), Inverse(Copies()), Swap(), Keep()):
        parts = [AffineCoupling(linear(out=4)), layer, AffineCoupling(linear(out=4)), layer]
        network = InvertibleSequential(*parts).double()
        x, results = leaves(2), []
        for checkpoint in (False, True):
            network.checkpoint = checkpoint
            loss = sum(y.sin().sum() for y in network(x))
            results.append(torch.autograd.grad(loss, [*x, *network.parameters()]))
        torch.testing.assert_close(*results)


# --- what is kept


def couplings(count):
    return InvertibleSequential(
        *(AffineCoupling(linear(out=4)) if i % 2 else Swap() for i in range(2 * count))
    ).double()


def test_states_on_the_way_are_not_kept():
    x = tuple(part.detach() for part in leaves(2))
    states = []

    class Spy(Keep):
        def forward(self, x):
            states.extend(weakref.ref(part) for part in x)
            return x

    network = InvertibleSequential(*(layer for part in couplings(4) for layer in (part, Spy())))
    chain, y = recorded(network, x)
    del x
    alive = {id(ref()) for ref in states if ref() is not None}
    assert alive == {id(part) for part in y}
    assert chain is not None


def test_all_that_was_rebuilt_goes_with_the_graph():
    network = couplings(4)
    network.checkpoint = True
    loss = sum(y.sin().sum() for y in network(leaves(2)))
    inner = []
    network[1].f.register_forward_hook(lambda _, x, __: inner.append(weakref.ref(x[0])))
    loss.backward()
    assert len(inner) == 1
    del loss
    assert inner[0]() is None


@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_a_retained_graph_is_served_in_any_order(method):
    network = couplings(5)
    network.checkpoint = True
    loss = sum(y.sin().sum() for y in getattr(network, method)(pair(3, 4)))
    groups = [list(layer.parameters()) for layer in network if list(layer.parameters())]
    every = torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)
    size = len(groups[0])
    for i in (4, 0, 2, 2, 3, 1, 0):
        found = torch.autograd.grad(loss, groups[i], retain_graph=True)
        torch.testing.assert_close(found, every[size * i : size * (i + 1)])


# --- states in low precision


def coarse_network(stem=None):
    layers = [Split(), AdditiveCoupling(linear(8)), Swap(), AdditiveCoupling(linear(8)), Merge()]
    body = InvertibleSequential(*layers, checkpoint=True)
    return nn.Sequential(nn.Linear(16, 16), stem or nn.Identity(), body)


def test_a_state_that_a_stem_under_autocast_made_is_warned_of_once():
    network = coarse_network()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"layer 1 .*torch.bfloat16.*put \.float\(\)") as found:
            network(torch.randn(4, 16)).sum().backward()
        assert len(found) == 1
        network(torch.randn(4, 16)).sum().backward()  # warnings are errors
        cast = coarse_network(Function(torch.Tensor.float))
        cast(torch.randn(4, 16)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_state_in_low_precision_is_warned_of_where_it_is_rebuilt(dtype):
    x = torch.randn(4, 16, dtype=dtype)
    network = coarse_network()[2].to(dtype)
    with torch.no_grad():
        network(x)
    network.checkpoint = False
    network(x)
    network.checkpoint = Rebuild(anchor_every=1)
    network(x)
    moves = InvertibleSequential(Split(), Swap(), Merge(), checkpoint=True)
    moves(x.requires_grad_()).sum().backward()
    network.checkpoint = True
    with pytest.warns(UserWarning, match="mixed precision"):
        network(x)
