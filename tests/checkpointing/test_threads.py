"""Threads, copies, and code that asks whether it is being run again."""

import sys
import threading

import pytest
import torch
from torch import nn
from toys import (
    Chained,
    Probe,
    TwiceEvaluated,
    assert_same_step,
    body,
    bottleneck,
    copied_in_both_ways,
    couplings,
    linear,
    pair,
    probes,
    step,
)
from toys import body_images as images

from invertible import (
    AdditiveCoupling,
    Inverse,
    InvertibleSequential,
    Swap,
    is_rebuilding,
    reversible_checkpoint,
)


def run_all(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_threads_draw_their_own_dropout_masks():
    class Masked(nn.Module):
        """Dropout that remembers its masks."""

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)
            self.masks = []

        def forward(self, x):
            mask = torch.rand_like(x) < 0.5
            self.masks.append(mask)
            return self.conv(x) * mask

    networks = [body(6, Masked, checkpoint=True) for _ in range(2)]
    errors = []

    def train(network):
        try:
            for _ in range(4):
                network(images()).sum().backward()
        except Exception as error:
            errors.append(error)

    run_all([threading.Thread(target=train, args=(network,)) for network in networks])
    assert not errors
    for network in networks:
        for part in network.modules():
            if isinstance(part, Masked):
                for forward, again in zip(part.masks[::2], part.masks[1::2], strict=True):
                    assert torch.equal(forward, again)


class DrawsNothing(nn.Module):
    """Of a class that nobody knows anything of."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).tanh()


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 4, 3, padding=1), DrawsNothing])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_thread_that_draws_does_not_disturb_layers_that_do_not(monkeypatch, make, direction):
    stop = threading.Event()

    def augment():
        while not stop.is_set():
            torch.rand(8, 4, 4)

    network = InvertibleSequential(*couplings(4, make), checkpoint=True)
    x = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6)
    thread = threading.Thread(target=augment)
    thread.start()
    sets = []
    set_state = torch.set_rng_state
    monkeypatch.setattr(torch, "set_rng_state", lambda *a: (sets.append(a), set_state(*a)))
    try:
        for _ in range(10):
            y1, y2 = getattr(network, direction)(x)
            (y1 * y2).sum().backward()
    finally:
        stop.set()
        thread.join()
    assert not sets


def test_threads_may_train_one_network_at_once():
    network = body(6, lambda: bottleneck(4), checkpoint=True).double()
    found, errors = [], []

    def train():
        try:
            y = network(images())
            found.append(torch.autograd.grad(y.square().sum(), [*network.parameters()]))
        except Exception as error:
            errors.append(error)

    run_all([threading.Thread(target=train) for _ in range(3)])
    assert not errors
    alone = torch.autograd.grad(network(images()).square().sum(), [*network.parameters()])
    for gradients in found:
        torch.testing.assert_close(gradients, alone)


def test_threads_can_go_backward_through_one_graph():
    network = body(4, checkpoint=True)
    parameters = list(network.parameters())
    loss = network(images()).sin().sum()
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    results = []

    def backward():
        for _ in range(5):
            results.append(torch.autograd.grad(loss, parameters, retain_graph=True))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads interrupt each other everywhere
    run_all([threading.Thread(target=backward) for _ in range(3)])
    sys.setswitchinterval(interval)
    assert len(results) == 15
    for found in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_a_call_asks_for_stays_in_its_thread():
    """A network that another thread runs meanwhile stores its activations."""
    inside, done = threading.Event(), threading.Event()
    saved = []

    def meet(*_):
        inside.set()
        done.wait(10)

    slow, other = body(1), Chained(AdditiveCoupling(linear()))
    slow.register_forward_pre_hook(meet)

    def run_other():
        inside.wait(10)
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
            other(pair(3, 4, dtype=torch.float32))
        done.set()

    first = threading.Thread(target=lambda: reversible_checkpoint(slow, images()))
    run_all([first, threading.Thread(target=run_other)])
    assert saved
    assert all(isinstance(x, torch.Tensor) for x in saved)


# --- copies


@copied_in_both_ways
def test_a_copy_trains_alike(again):
    network = body(checkpoint=True)
    network(images()).sum().backward()
    twin = again(network)
    assert twin.checkpoint
    assert_same_step(step(twin, images()), step(network, images()), rtol=0)


# --- is_rebuilding


def asked(network):
    """What sub-networks were told, in running order."""
    return [probe.seen for probe in probes(network)]


def asking(**options):
    return InvertibleSequential(
        *couplings(2, lambda: Probe(linear(), lambda *_: is_rebuilding())), **options
    ).double()


@pytest.mark.parametrize("method", ["forward", "inverse", "forward_and_log_det"])
def test_only_what_is_run_again_is_told_so(method):
    network = asking(checkpoint=True)
    y = getattr(network, method)(pair(3, 4))
    assert asked(network) == [[False]] * 2
    assert not is_rebuilding()
    y = y[0] if method.endswith("log_det") else y
    (y[0].sum() + y[1].sum()).backward()
    assert asked(network) == [[False, True]] * 2
    assert not is_rebuilding()


def test_the_first_evaluation_is_none_that_is_run_again():
    network = asking()
    network(network.inverse(pair(3, 4)))[0].sum().backward()
    assert asked(network) == [[False, False]] * 2


def test_both_evaluations_of_the_default_rebuild_are_told():
    f = Probe(linear(out=4), lambda *_: is_rebuilding())
    network = InvertibleSequential(TwiceEvaluated(f), Swap(), checkpoint=True).double()
    network(pair(3, 4))[1].sum().backward()
    assert f.seen == [False, True, True]


def test_a_network_called_while_another_is_rebuilt_is_not_told_of_an_end():
    """An inverse inside a sub-network is part of it."""
    seen = []
    inner = Inverse(asking(checkpoint=True))

    class Inner(nn.Module):
        def forward(self, x):
            seen.append(is_rebuilding())
            y1, y2 = inner((x, x))
            seen.append(is_rebuilding())
            return y1 + y2

    network = InvertibleSequential(AdditiveCoupling(Inner()), checkpoint=True)
    network(tuple(part.requires_grad_() for part in pair(3, 4)))[0].sum().backward()
    assert seen == [False, False, True, True]


@pytest.mark.parametrize("time", [1, 2])
def test_an_error_ends_it(time):
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.calls = nn.Linear(2, 2), 0

        def forward(self, x):
            self.calls += 1
            if self.calls == time:
                assert is_rebuilding() is (time == 2)
                raise ArithmeticError
            return self.linear(x)

    network = InvertibleSequential(AdditiveCoupling(Fails()), checkpoint=True).double()
    with pytest.raises(ArithmeticError):
        network(pair(3, 4))[0].sum().backward()
    assert not is_rebuilding()
    healthy = asking(checkpoint=True)
    healthy(pair(3, 4))[0].sum().backward()
    assert asked(healthy) == [[False, True]] * 2


def test_other_threads_are_not_told():
    told = []

    def ask(*_):
        thread = threading.Thread(target=lambda: told.append(is_rebuilding()))
        thread.start()
        thread.join()
        told.append(is_rebuilding())

    network = InvertibleSequential(AdditiveCoupling(Probe(linear(), ask)), checkpoint=True)
    network.double()(pair(3, 4))[0].sum().backward()
    assert told == [False, False, False, True]
