"""Training without stored activations is ordinary training, up to the rounding of inversion."""

import copy
import gc
import pickle
import re
import sys
import threading
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations, parametrize
from torch.utils import checkpoint as torch_checkpoint
from toys import assert_same_step, body, bottleneck, step
from toys import body_images as images

from invertible import (
    AdditiveCoupling,
    InjectivePad,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Parallel,
    PixelUnshuffle,
    Rebuild,
    Split,
    Swap,
    measure_drift,
    no_trace,
    reversible_checkpoint,
)


def both(make, **options):
    """The same network twice: storing activations, and rebuilding them."""
    torch.manual_seed(0)
    stored = make()
    rebuilt = copy.deepcopy(stored)
    for part in rebuilt.modules():
        if isinstance(part, InvertibleSequential):
            part.checkpoint = True
    for name, value in options.items():
        setattr(rebuilt, name, value)
    return stored, rebuilt


class Counting(nn.Module):
    """Counts how often a sub-network is evaluated."""

    def __init__(self, f):
        super().__init__()
        self.f = f
        self.evaluations = 0

    def forward(self, x):
        self.evaluations += 1
        return self.f(x)


# --- the same gradients, statistics and random numbers


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_step_equals_ordinary_training(training, dropout):
    stored, rebuilt = both(lambda: body(6, lambda: bottleneck(4, dropout)).train(training))
    assert_same_step(step(rebuilt, images()), step(stored, images()))


def test_the_function_equals_the_option():
    stored, rebuilt = both(body)
    expected = step(rebuilt, images())
    torch.manual_seed(1)
    x = images().requires_grad_()
    y = reversible_checkpoint(stored, x)
    (y.sin() * y).sum().backward()
    torch.testing.assert_close(x.grad, expected["input gradient"], rtol=0, atol=0)


@settings(max_examples=25)
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
        couplings = [layer for layer in network if isinstance(layer, AdditiveCoupling)]
        for i in frozen:
            couplings[i % depth].requires_grad_(False)
    expected = step(stored, x)
    assert_same_step(step(rebuilt, x), expected)


def test_each_sub_network_is_evaluated_once_in_each_pass():
    network = body(5, lambda: Counting(bottleneck(4)), checkpoint=True)
    counters = [part for part in network.modules() if isinstance(part, Counting)]
    y = network(images())
    assert [counter.evaluations for counter in counters] == [1] * 5
    y.sum().backward()
    assert [counter.evaluations for counter in counters] == [2] * 5


def test_each_sub_network_is_evaluated_once_when_training_through_the_inverse():
    network = body(5, lambda: Counting(bottleneck(4)), checkpoint=True)
    counters = [part for part in network.modules() if isinstance(part, Counting)]
    y = network(images()).detach().requires_grad_()
    x = network.inverse(y)
    for counter in counters:
        counter.evaluations = 0
    x.sin().sum().backward()
    assert [counter.evaluations for counter in counters] == [1] * 5


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_through_the_inverse_equals_ordinary_training(training):
    stored, rebuilt = both(lambda: body(4, lambda: bottleneck(4, 0.3)).train(training))
    y = copy.deepcopy(stored)(images()).detach()
    assert_same_step(step(rebuilt.inverse, y), step(stored.inverse, y))


def test_an_inverse_can_be_checkpointed_as_a_module():
    network = body()
    y = network(images()).detach()
    expected = step(network.inverse, y)
    torch.manual_seed(1)
    y = y.clone().requires_grad_()
    x = reversible_checkpoint(Inverse(network), y)
    (x.sin() * x).sum().backward()
    torch.testing.assert_close(y.grad, expected["input gradient"], rtol=1e-9, atol=1e-9)


def test_the_inverse_of_an_injective_network_keeps_what_it_crops():
    def make():
        coupling = AdditiveCoupling(bottleneck(4))
        return InvertibleSequential(InjectivePad(6), Split(), coupling, Swap(), Merge()).double()

    stored, rebuilt = both(make)
    phi = torch.randn(3, 8, 8, 8, dtype=torch.float64)  # not an output of the network
    assert_same_step(step(rebuilt.inverse, phi), step(stored.inverse, phi))


# --- compositions


def test_nested_compositions_are_taken_apart():
    def make():
        inner = InvertibleSequential(AdditiveCoupling(Counting(bottleneck(4, 0.3))), Swap())
        backwards = Inverse(InvertibleSequential(Swap(), AdditiveCoupling(bottleneck(4, 0.3))))
        outer = InvertibleSequential(inner, backwards, inner)
        return InvertibleSequential(PixelUnshuffle(2), Split(), outer, Merge()).double()

    stored, rebuilt = both(make)
    assert_same_step(step(rebuilt, images()), step(stored, images()))
    counter = rebuilt[2][0][0].f
    assert counter.evaluations == 4  # it stands twice


def test_hooks_on_an_inner_composition_fire_once():
    stored, rebuilt = both(
        lambda: InvertibleSequential(body(2, lambda: bottleneck(4, 0.3))[:-1], body(2)[2:])
    )
    calls = []
    for network in (stored, rebuilt):
        network[0].register_forward_hook(lambda *_: calls.append("forward"))
        network[1].register_forward_hook(lambda *given: 2 * given[-1])
    assert_same_step(step(rebuilt, images()), step(stored, images()))
    assert calls == ["forward"] * 2


def test_streams_in_parallel_are_rebuilt():
    def make():
        stream = InvertibleSequential(Split(), AdditiveCoupling(bottleneck(2)), Merge())
        both_streams = Parallel(stream, PixelUnshuffle(1))
        return InvertibleSequential(PixelUnshuffle(2), Split(), both_streams, Merge()).double()

    stored, rebuilt = both(make)
    assert_same_step(step(rebuilt, images()), step(stored, images()))


def test_dropout_in_several_places_of_a_branch_is_rebuilt():
    def make():
        couplings = [
            AdditiveCoupling(bottleneck(2, 0.5)),
            Swap(),
            AdditiveCoupling(bottleneck(2, 0.5)),
        ]
        branches = [InvertibleSequential(Split(), *copy.deepcopy(couplings), Merge()) for _ in "ab"]
        return InvertibleSequential(
            PixelUnshuffle(2), Split(), Parallel(*branches), Merge()
        ).double()

    stored, rebuilt = both(make)
    assert_same_step(step(rebuilt, images()), step(stored, images()))


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
    with pytest.raises(RuntimeError, match="does not undo what was drawn"):
        network.double()(images())[0].sum().backward()


class Shear(InvertibleModule):
    """A user's layer with a log-determinant, which rebuilds by the default."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.f = nn.Tanh()

    def forward(self, x):
        x1, x2 = x
        return x1 * self.log_scale.exp() + self.f(x2), x2

    def inverse(self, y):
        y1, y2 = y
        return (y1 - self.f(y2)) * (-self.log_scale).exp(), y2

    def forward_and_log_det(self, x):
        return self(x), self.log_scale.expand(len(x[0])) * x[0][0].numel()

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self.log_scale.expand(len(y[0])) * y[0][0].numel()


class WithLogDet(nn.Module):
    def __init__(self, network, method):
        super().__init__()
        self.network = network
        self.method = method

    def forward(self, x):
        y, log_det = getattr(self.network, self.method)(x)
        return torch.cat([y.flatten(1), log_det[:, None]], 1)


@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_log_determinants_have_the_same_gradients(method):
    def make():
        coupling = AdditiveCoupling(bottleneck(4, 0.3))
        network = InvertibleSequential(Split(), Shear(), Swap(), coupling, Shear(), Merge())
        return WithLogDet(network.double(), method)

    stored, rebuilt = both(make)
    x = PixelUnshuffle(2)(images())
    assert_same_step(step(rebuilt, x), step(stored, x))


# --- what rebuilding must keep equal


class Probe(nn.Module):
    """Records how its input looks and what it does, forward and when rebuilt."""

    def __init__(self, f, record):
        super().__init__()
        self.f = f
        self.record = record
        self.seen = []

    def forward(self, x):
        self.seen.append(self.record(self, x))
        return self.f(x)


def test_strides_and_requires_grad_of_states_are_restored():
    def look(_, x):
        return x.stride(), x.requires_grad, x.shape

    network = body(3, lambda: Probe(bottleneck(4), look), checkpoint=True)
    network[2].requires_grad_(False)
    for x in (images(), images().to(memory_format=torch.channels_last), images(1)):
        network(x).sum().backward()
        for probe in (part for part in network.modules() if isinstance(part, Probe)):
            assert len(probe.seen) in (1, 2)
            assert probe.seen[0] == probe.seen[-1]
            probe.seen.clear()


def test_an_expanded_input_is_restored():
    stored, rebuilt = both(lambda: body()[2:])
    pair = torch.randn(1, 4, 5, 5, dtype=torch.float64), torch.randn(1, 4, 1, 1).double()
    expanded = pair[0].expand(3, 4, 5, 5), pair[1].expand(3, 4, 5, 5)
    results = []
    for network in (stored, rebuilt):
        network(expanded).sin().sum().backward()
        results.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_spectral_norm_sees_the_vectors_of_the_forward_pass():
    def make():
        f = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1)), nn.Tanh())
        return body(3, lambda: copy.deepcopy(f))

    stored, rebuilt = both(make)
    for _ in range(2):
        expected = step(stored, images())
        assert_same_step(step(rebuilt, images()), expected)


class RunningMean(nn.Module):
    """Uses a buffer, and then replaces or changes it."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        y = (x - self.mean).tanh()
        if self.in_place:
            self.mean += x.detach().mean()
        else:
            self.mean = self.mean + x.detach().mean()
        return y


@pytest.mark.parametrize("in_place", [True, False])
def test_other_buffers_are_seen_as_the_forward_pass_saw_them(in_place):
    shared = RunningMean(in_place)
    stored, rebuilt = both(lambda: body(4, lambda: nn.Sequential(shared, nn.Conv2d(4, 4, 1))))
    for _ in range(2):
        expected = step(stored, images())
        assert_same_step(step(rebuilt, images()), expected)


def test_buffers_are_the_same_objects_afterwards():
    network = body(checkpoint=True)
    before = dict(network.named_buffers())
    network(images()).sum().backward()
    assert all(value is before[name] for name, value in network.named_buffers())


@pytest.mark.parametrize("backward_in_autocast", [False, True])
def test_autocast_is_that_of_the_forward_pass(backward_in_autocast):
    def record(_, x):
        with torch.no_grad():
            return torch.is_autocast_enabled("cpu"), (x @ x.mT).dtype

    network = body(3, lambda: Probe(bottleneck(4), record), checkpoint=True).float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = network(images().float()).sum()
    with torch.autocast("cpu", torch.float16, enabled=backward_in_autocast):
        loss.backward()
    for probe in (part for part in network.modules() if isinstance(part, Probe)):
        assert probe.seen == [(True, torch.bfloat16)] * 2


def test_gradients_under_autocast_are_those_of_ordinary_training():
    stored, rebuilt = both(lambda: body(2).float())
    gradients = []
    for network in (stored, rebuilt):
        with torch.autocast("cpu", torch.bfloat16):
            y = network(images().float())
        assert y.dtype == torch.float32
        y.sin().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert error < 1e-2  # a state error of 1e-7 can flip the last bit of a bfloat16


def test_in_place_activations_work():
    def make():
        return body(3, lambda: bottleneck(4, activation=lambda: nn.Hardtanh(inplace=True)))

    stored, rebuilt = both(make)
    assert_same_step(step(rebuilt, images()), step(stored, images()))


def test_a_shared_sub_network_works():
    f = bottleneck(4, 0.3)
    stored, rebuilt = both(lambda: body(3, lambda: f))
    assert_same_step(step(rebuilt, images()), step(stored, images()))


def test_parametrized_sub_networks_work():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w + w.mT

    def make():
        conv = nn.Conv2d(4, 4, 3, padding=1)
        parametrize.register_parametrization(conv, "weight", Symmetric())
        return body(3, lambda: copy.deepcopy(nn.Sequential(conv, nn.Tanh())))

    stored, rebuilt = both(make)
    assert_same_step(step(rebuilt, images()), step(stored, images()))


def test_torch_checkpointing_inside_a_sub_network_works():
    class Checkpointed(nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, x):
            return torch_checkpoint.checkpoint(self.f, x, use_reentrant=False)

    stored, rebuilt = both(lambda: body(3, lambda: Checkpointed(nn.Conv2d(4, 4, 3, padding=1))))
    assert_same_step(step(rebuilt, images()), step(stored, images()))


def test_a_composition_inside_a_sub_network_is_part_of_it():
    def make():
        inner = InvertibleSequential(
            Split(), AdditiveCoupling(nn.Conv2d(2, 2, 1)), Swap(), Merge(), checkpoint=True
        )
        return body(3, lambda: nn.Sequential(inner, nn.Tanh(), nn.Conv2d(4, 4, 1)))

    stored, rebuilt = both(make)
    assert_same_step(step(rebuilt, images()), step(stored, images()))


# --- autograd's features


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
@pytest.mark.parametrize("input_needs_grad", [True, False])
def test_frozen_layers_and_inputs_get_no_gradient(frozen, input_needs_grad):
    stored, rebuilt = both(lambda: body(4))
    x = images().requires_grad_(input_needs_grad)
    results = []
    for network in (stored, rebuilt):
        for layer in list(network)[2 : 2 + 2 * frozen]:
            layer.requires_grad_(False)
        network(x).sin().sum().backward()
        results.append([p.grad for p in network.parameters()] + [x.grad])
        x.grad = None
    for found, expected in zip(*results, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_frozen_middle_is_inverted_through():
    stored, rebuilt = both(lambda: body(5, lambda: bottleneck(4, 0.3)))
    results = []
    for network in (stored, rebuilt):
        for layer in list(network)[4:10]:
            layer.requires_grad_(False)
        torch.manual_seed(3)
        network(images()).sin().sum().backward()
        results.append([p.grad for p in network.parameters() if p.requires_grad])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_gradients_of_a_subset_are_those_of_ordinary_training():
    stored, rebuilt = both(lambda: body(5, lambda: bottleneck(4, 0.3)))
    for some in (slice(0, 2), slice(4, 6), slice(-2, None)):
        results = []
        for network in (stored, rebuilt):
            torch.manual_seed(2)
            y = network(images())
            results.append(torch.autograd.grad(y.sin().sum(), list(network.parameters())[some]))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_one_output_stream_is_enough():
    stored, rebuilt = both(lambda: body(3)[:-1])
    for stream in (0, 1):
        results = []
        for network in (stored, rebuilt):
            network.zero_grad()
            network(images())[stream].sin().sum().backward()
            results.append([p.grad for p in network.parameters() if p.grad is not None])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_retained_graph_can_be_used_again_and_again():
    _, network = both(lambda: body(3, lambda: bottleneck(4, 0.3)))
    parameters = list(network.parameters())
    loss = network(images()).sin().sum()
    first, second, third = (
        torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(3)
    )
    torch.testing.assert_close(second, first, rtol=0, atol=0)
    torch.testing.assert_close(third, first, rtol=0, atol=0)


def test_double_backward_is_that_of_ordinary_training():
    stored, rebuilt = both(lambda: body(3, lambda: bottleneck(4)))
    results = []
    for network in (stored, rebuilt):
        x = images().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).sin().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([x.grad] + [p.grad for p in network.parameters()])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


def test_several_forwards_before_one_backward_accumulate():
    stored, rebuilt = both(lambda: body(3, lambda: bottleneck(4, 0.3)))
    results = []
    for network in (stored, rebuilt):
        torch.manual_seed(2)
        loss = sum(network(images(seed=seed)).sin().sum() for seed in range(3))
        loss.backward()
        results.append([p.grad for p in network.parameters()] + list(network.buffers()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_hooks_on_sub_networks_and_tensors_fire():
    stored, rebuilt = both(lambda: body(2))
    calls = {stored: [], rebuilt: []}
    for network in (stored, rebuilt):
        f = network[2].f
        log = calls[network]
        f.register_full_backward_hook(lambda *_, log=log: log.append("backward"))
        f[2].weight.register_hook(lambda _, log=log: log.append("gradient"))
        f[2].weight.register_post_accumulate_grad_hook(lambda _, log=log: log.append("accumulated"))
        # It changes the output, so that it must be applied when the layer is rebuilt as well.
        f.register_forward_hook(lambda *given: 2 * given[-1])
    assert_same_step(step(rebuilt, images()), step(stored, images()))
    assert calls[stored] == calls[rebuilt]
    assert sorted(calls[stored]) == ["accumulated", "backward", "gradient"]


def test_context_reaches_conditional_layers_and_gets_gradients():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x, context):
            return self.conv(x * context["gain"]).tanh()

    def make():
        couplings = [AdditiveCoupling(Conditioned(), conditional=True), Swap()]
        return InvertibleSequential(PixelUnshuffle(2), Split(), *(2 * couplings), Merge()).double()

    stored, rebuilt = both(make)
    results = []
    for network in (stored, rebuilt):
        context = {"gain": torch.full((4, 4, 4), 0.7, dtype=torch.float64, requires_grad=True)}
        network(images(), context).sin().sum().backward()
        results.append([context["gain"].grad] + [p.grad for p in network.parameters()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


# --- memory


def allocated_by(function):
    """Bytes that a call leaves allocated, as the profiler counts them."""
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    return sum(e.nbytes() for e in events if e.name() == "[memory]"), result


def live_tensors():
    # Not isinstance, which asks some lazy modules for their class, and they warn.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_memory_between_the_passes_does_not_grow_with_depth():
    x = images(16)
    stored, rebuilt = {}, {}
    for depth in (2, 12):
        network = body(depth)
        stored[depth], _ = allocated_by(lambda network=network: network(x))
        network.checkpoint = True
        rebuilt[depth], _ = allocated_by(lambda network=network: network(x))
    slope = (rebuilt[12] - rebuilt[2]) / (stored[12] - stored[2])
    assert slope < 0.02


def test_compositions_inside_sub_networks_keep_nothing():
    def residual():
        inner = InvertibleSequential(
            Split(), AdditiveCoupling(nn.Conv2d(2, 2, 1)), Merge(), checkpoint=True
        )
        return nn.Sequential(inner, nn.Tanh())

    x = images(16)
    bytes_kept = []
    for depth in (2, 12):
        network = body(depth, residual, checkpoint=True)
        bytes_kept.append(allocated_by(lambda network=network: network(x))[0])
    assert bytes_kept[0] == bytes_kept[1]


def test_the_backward_pass_holds_the_activations_of_one_layer():
    class Watched(nn.Module):
        """Knows which of the activations that it saved are still in memory."""

        storages: ClassVar[list] = []
        alive: ClassVar[list] = []

        def forward(self, x):
            self.alive.append(sum(not storage.expired() for storage in self.storages))
            y = x.tanh()
            self.storages.append(StorageWeakRef(y.untyped_storage()))
            return y.square()

    network = body(6, Watched, checkpoint=True)
    network(images().requires_grad_()).sum().backward(retain_graph=True)
    assert Watched.alive[:6] == [0] * 6
    assert Watched.alive[6:] == [0] * 6


def test_parameter_gradients_arrive_layer_by_layer():
    network = body(4, checkpoint=True)
    order = []
    for name, parameter in network.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    rebuilt = []
    for position, layer in enumerate(network):
        if isinstance(layer, AdditiveCoupling):
            layer.f.register_forward_hook(lambda *_, p=position: rebuilt.append((p, len(order))))
    network(images()).sum().backward()
    each = len(order) // 4
    assert rebuilt[4:] == [(8, 0), (6, each), (4, 2 * each), (2, 3 * each)]


def test_a_forward_without_backward_leaves_nothing_behind():
    network = body(checkpoint=True)
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(3):
            network(images())
        # without the garbage collector: there are no cycles
        assert live_tensors() == before
    finally:
        gc.enable()


def test_without_grad_nothing_is_recorded():
    network = body(checkpoint=True)
    with torch.no_grad():
        assert not network(images()).requires_grad
    with torch.inference_mode():
        assert network(images()).is_inference()
        assert reversible_checkpoint(network, images()).is_inference()


# --- errors


def test_a_parameter_changed_between_the_passes_is_an_error():
    network = body(checkpoint=True)
    loss = network(images()).sum()
    with torch.no_grad():
        network[4].f[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"parameter of layer 4 \(AdditiveCoupling\)"):
        loss.backward()


def test_an_output_changed_between_the_passes_is_an_error():
    network = body(checkpoint=True)
    y = network(images())
    loss = y.sum()
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match=r"output of a composition.*changed in place"):
        loss.backward()


def test_a_context_changed_between_the_passes_is_an_error():
    class Shift(nn.Module):
        def forward(self, x, context):
            return x.tanh() * context

    network = InvertibleSequential(
        Split(), AdditiveCoupling(Shift(), conditional=True), Merge(), checkpoint=True
    )
    context = torch.ones(())
    loss = network(torch.randn(2, 4, requires_grad=True), context).sum()
    context.zero_()
    with pytest.raises(RuntimeError, match="context was changed in place"):
        loss.backward()


def test_a_tensor_that_its_gradient_needs_changed_in_place_is_an_error():
    class Bad(nn.Module):
        def forward(self, x):
            y = x.sigmoid()
            return y.mul_(2)

    network = body(1, Bad, checkpoint=True)
    with pytest.raises(RuntimeError, match="changes a tensor in place that its gradient needs"):
        network(images().requires_grad_()).sum().backward()


def test_a_sub_network_that_does_something_else_when_run_again_is_an_error():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return self.conv(x) if self.calls == 1 else self.conv(x).tanh()

    network = body(1, Fickle, checkpoint=True)
    with pytest.raises(RuntimeError, match="saved other tensors"):
        network(images()).sum().backward()


def test_random_numbers_drawn_differently_are_an_error():
    class Impatient(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            torch.rand(self.calls)
            return self.conv(x)

    network = body(1, Impatient, checkpoint=True)
    with pytest.raises(RuntimeError, match="drew other random numbers"):
        network(images()).sum().backward()


class Failing(nn.Module):
    """Fails when it is run for the given time."""

    def __init__(self, time):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.time = time
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == self.time:
            raise ArithmeticError("on purpose")
        return self.norm(self.conv(x))


@pytest.mark.parametrize(
    ("time", "note"), [(1, "In layer 2"), (2, "While layer 2 .* was rebuilt in the backward pass")]
)
def test_an_error_in_a_sub_network_names_the_layer_and_leaves_no_trace(time, note):
    network = body(2, lambda: Failing(100), checkpoint=True)
    network[2].f.time = time
    with pytest.raises(ArithmeticError, match="on purpose") as caught:
        network(images()).sum().backward()
    assert re.search(note, "".join(caught.value.__notes__))
    # and the next step is an ordinary one
    stored = copy.deepcopy(network)
    stored.checkpoint = False
    assert_same_step(step(network, images()), step(stored, images()))


def test_a_wrong_argument_is_refused():
    with pytest.raises(TypeError, match=r"InvertibleModule, got a Conv2d"):
        reversible_checkpoint(nn.Conv2d(2, 2, 1), images())
    with pytest.raises(ValueError, match="anchor_every of at least 1, got 0"):
        Rebuild(anchor_every=0)


def test_the_function_checks_the_context_and_that_there_are_layers():
    with pytest.raises(TypeError, match=r"got a context .* that nothing in it would use"):
        reversible_checkpoint(body(), images(), torch.ones(2))
    empty = InvertibleSequential(PixelUnshuffle(2), InvertibleSequential())
    for call in (empty, lambda x: reversible_checkpoint(empty, x)):
        with pytest.raises(ValueError, match="has no layers to run"):
            call(images())


@pytest.mark.parametrize("anchor_every", [None, 2])
def test_the_function_fires_the_hooks_of_its_module(anchor_every):
    network = body(4, lambda: bottleneck(4, 0.3))
    network.register_forward_hook(lambda *given: 2 * given[-1])
    expected = step(copy.deepcopy(network), images())
    torch.manual_seed(1)
    x = images().requires_grad_()
    with measure_drift() as drift:
        y = reversible_checkpoint(network, x, rebuild=Rebuild(anchor_every=anchor_every))
        (y.sin() * y).sum().backward()
    torch.testing.assert_close(y.detach(), expected["output"], rtol=0, atol=0)
    torch.testing.assert_close(x.grad, expected["input gradient"], rtol=1e-9, atol=1e-9)
    assert (drift.worst.error == 0) == (anchor_every == 2)  # every coupling starts afresh


# --- threads, copies, transforms


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

    threads = [threading.Thread(target=train, args=(network,)) for network in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for network in networks:
        for part in network.modules():
            if isinstance(part, Masked):
                for forward, again in zip(part.masks[::2], part.masks[1::2], strict=True):
                    assert torch.equal(forward, again)


def test_two_threads_can_go_backward_through_one_graph():
    network = body(4, checkpoint=True)
    parameters = list(network.parameters())
    loss = network(images()).sin().sum()
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    results = []

    def backward():
        for _ in range(5):
            results.append(torch.autograd.grad(loss, parameters, retain_graph=True))

    threads = [threading.Thread(target=backward) for _ in range(3)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads interrupt each other everywhere
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert len(results) == 15
    for found in results:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_trains_alike(duplicate):
    network = body(checkpoint=True)
    network(images()).sum().backward()
    twin = duplicate(network)
    assert twin.checkpoint
    assert_same_step(step(twin, images()), step(network, images()), rtol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # in torch's own jacfwd
def test_function_transforms_get_the_plain_call():
    network = body(2).eval()
    x = images(1)
    expected = torch.autograd.functional.jacobian(network, x)
    network.checkpoint = True
    torch.testing.assert_close(torch.func.jacrev(network)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(network)(x), expected)


# --- drift and anchors


def test_drift_is_measured_for_every_rebuilt_layer():
    network = body(4, checkpoint=True)
    with measure_drift() as drift:
        network(images()).sum().backward()
    assert [row.layer for row in drift.rows][:2] == [
        "layer 2 (AdditiveCoupling)",
        "layer 4 (AdditiveCoupling)",
    ]
    assert 0 < drift.worst.error < 1e-14
    assert "relative error" in str(drift)


def test_too_much_drift_is_warned_of():
    network = body(6, checkpoint=True).float()
    with pytest.warns(RuntimeWarning, match=r"layer 2 .* more than 1e-12"), measure_drift(1e-12):
        network(images().float()).sum().backward()


def test_anchors_stop_drift():
    network = body(6, checkpoint=True).float()
    errors = []
    for every in (None, 4, 1):
        network.checkpoint = Rebuild(anchor_every=every)
        with measure_drift() as drift:
            network(images().float()).sum().backward()
        errors.append(drift.worst.error)
    assert errors[0] > errors[1] > errors[2] == 0


def test_states_are_kept_for_the_anchors_only():
    x = images(16)
    network = body(12, checkpoint=True)
    bytes_kept = {}
    for every in (None, 6):
        network.checkpoint = Rebuild(anchor_every=every)
        bytes_kept[every], y = allocated_by(lambda: network(x))
    anchors = len(range(0, len(network), 6))
    # A state is as large as the input; the first anchor is the input itself.
    extra = bytes_kept[6] - bytes_kept[None]
    assert extra <= anchors * y.nbytes * 1.1
