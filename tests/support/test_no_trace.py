"""``no_trace`` leaves buffers and random generators as it found them."""

import threading

import pytest
import torch
from torch import nn
from toys import batch_norm_net, images, pair

from invertible import AdditiveCoupling, no_trace


def buffers(module):
    """Which tensors a module's buffers are, how often they were changed, and to what."""
    return {name: (id(b), b._version, b.clone()) for name, b in module.named_buffers()}


def assert_untouched(module, before):
    torch.testing.assert_close(buffers(module), before, rtol=0, atol=0)


@pytest.fixture
def net():
    return batch_norm_net(4).double()


def test_buffers_and_the_generator_are_put_back(net):
    before, state = buffers(net), torch.get_rng_state()
    with no_trace(net, images()):
        net(images())
        torch.rand(1)
        assert net[0].num_batches_tracked == 1
        assert not torch.equal(torch.get_rng_state(), state)
    assert_untouched(net, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_inside_starts_from_the_values_outside(net):
    net(images())
    expected = net.eval()(images())
    with no_trace(net, images()):
        assert torch.equal(net(images()), expected)


def test_the_evaluation_is_differentiable(net):
    x = images().requires_grad_()
    with no_trace(net, x):
        y = net(x)
    y.sum().backward()
    assert x.grad is not None
    assert net[0].weight.grad is not None


def test_an_error_passes_and_all_is_put_back(net):
    before, state = buffers(net), torch.get_rng_state()

    def fail():
        with no_trace(net, images()):
            net(torch.rand_like(images()))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_untouched(net, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_nests(net):
    before, state = buffers(net), torch.get_rng_state()
    with no_trace(net, images()):
        net(images())
        middle = torch.get_rng_state()
        with no_trace(net[0], images()):
            net(torch.rand_like(images()))
            assert net[0].num_batches_tracked == 2
        assert net[0].num_batches_tracked == 1
        assert torch.equal(torch.get_rng_state(), middle)
    assert_untouched(net, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_buffer_in_two_places_stays_one():
    net = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).double()
    net[1].num_batches_tracked = net[0].num_batches_tracked
    before = buffers(net)
    with no_trace(net, images()):
        net(images())
        assert net[0].num_batches_tracked == 2
        assert net[1].num_batches_tracked is net[0].num_batches_tracked
    assert_untouched(net, before)
    assert net[1].num_batches_tracked is net[0].num_batches_tracked


def test_a_module_in_two_places_is_put_back():
    norm = nn.BatchNorm2d(4).double()
    net = nn.Sequential(norm, norm)
    before = buffers(net)
    with no_trace(net, images()):
        net(images())
        assert norm.num_batches_tracked == 2
    assert_untouched(net, before)


def test_a_buffer_may_be_absent_replaced_or_dropped():
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("absent", None)
            self.register_buffer("replaced", torch.zeros(1))
            self.register_buffer("dropped", torch.zeros(1))

        def forward(self):
            self.absent = torch.ones(1)
            self.replaced = torch.ones(2)
            del self.dropped

    net = Restless()
    before = buffers(net)
    with no_trace(net, ()):
        net()
    assert net.absent is None
    assert_untouched(net, before)


@pytest.mark.parametrize("module", [nn.Identity(), nn.BatchNorm1d(2)])
def test_a_buffer_registered_inside_is_gone_afterwards(module):
    before = list(module._buffers)
    with no_trace(module, ()):
        module.register_buffer("cache", torch.ones(1))
    assert list(module._buffers) == before


def test_it_takes_any_state_or_context(net):
    for state in (images(), pair(), {"a": [images()], "b": 3}, None, ()):
        with no_trace(net, state):
            net(images())
    assert net[0].num_batches_tracked == 0


def test_parameters_are_the_same_tensors_inside(net):
    weight = net[0].weight
    with no_trace(net, images()):
        assert net[0].weight is weight


@pytest.mark.parametrize("training", [True, False])
def test_threads_that_invert_one_network_leave_its_own_buffers(training):
    layer = AdditiveCoupling(batch_norm_net()).double().train(training)
    y = tuple(part.detach() for part in layer(pair()))
    before, expected = buffers(layer), layer.inverse(y)
    wrong, start = [], threading.Barrier(3)

    def invert():
        start.wait()
        for _ in range(20):
            with torch.no_grad():
                x1, _ = layer.inverse(y)
            if not torch.equal(x1, expected[0]):
                wrong.append(x1)

    threads = [threading.Thread(target=invert) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_untouched(layer, before)


def test_a_thread_that_failed_does_not_keep_the_others_waiting(net):
    def fail():
        with pytest.raises(KeyError), no_trace(net, ()):
            raise KeyError

    def succeed():
        with no_trace(net, ()):
            done.set()

    done = threading.Event()
    for target in (fail, succeed):
        threading.Thread(target=target, daemon=True).start()
    assert done.wait(timeout=10)


def test_generators_are_put_back_beside_other_threads():
    class Sometimes(nn.Module):
        def forward(self, x, draws):
            return x + torch.rand(2) if draws else x

    module, stop = Sometimes(), threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        for draws in (False, True, False, True):
            before = torch.get_rng_state()
            with no_trace(module, torch.zeros(2)):
                module(torch.zeros(2), draws)
            assert torch.equal(torch.get_rng_state(), before)
    finally:
        stop.set()
        thread.join()
