"""Momentum and Leapfrog: residual networks whose state remembers the step before."""

import math

import pytest
import torch
from torch import nn
from toys import (
    AddsContext,
    Counting,
    assert_same_gradients,
    batch_norm_net,
    both,
    bottleneck,
    copied_in_both_ways,
    evaluations,
    images,
    memory_of,
    pair,
)

from invertible import (
    InjectivePad,
    Inverse,
    InvertibleSequential,
    Leapfrog,
    Momentum,
    Quantize,
    Rebuild,
    RebuildError,
    Split,
    measure_drift,
)

STEPS = {"Momentum": Momentum, "Leapfrog": lambda f, **options: Leapfrog(f, 0.3, **options)}
both_steps = pytest.mark.parametrize("make", STEPS.values(), ids=STEPS.keys())
WAYS = ["forward", "inverse", "forward_and_log_det", "inverse_and_log_det"]


def inputs(dtype=torch.float64):
    return tuple(part.requires_grad_() for part in pair(dtype=dtype))


def loss_of(way, x, *context):
    def loss(network):
        results = getattr(network, way)(x, *context)
        state, log_det = results if "log_det" in way else (results, torch.zeros(()))
        return sum((part.sin() * part).sum() for part in state) + log_det.square().sum()

    return loss


def test_momentum_mixes_f_into_the_velocity_and_moves_by_it():
    f = nn.Conv2d(2, 2, 1).double()
    x, v = pair()
    y, w = Momentum(f, gamma=0.7).double()((x, v))
    torch.testing.assert_close(w, 0.7 * v + 0.3 * f(x))
    torch.testing.assert_close(y, x + w)


def test_momentum_from_rest_is_nearly_the_ordinary_step_where_gamma_is_small():
    f = nn.Conv2d(2, 2, 1).double()
    x, _ = pair()
    y, _ = Momentum(f, gamma=1e-9)((x, torch.zeros_like(x)))
    torch.testing.assert_close(y, x + f(x))


def test_leapfrog_steps_from_the_place_before_last():
    f = nn.Conv2d(2, 2, 1).double()
    before, x = pair()
    last, y = Leapfrog(f, step=0.3)((before, x))
    assert torch.equal(last, x)
    torch.testing.assert_close(y, before + 0.6 * f(x))


def test_leapfrog_is_of_second_order():
    """Halving the step divides the error by four, here for x' = x from two exact places."""

    def error(steps):
        h = 1 / steps
        x = math.exp(-h) * torch.ones(1, 1, dtype=torch.float64), torch.ones(1, 1).double()
        network = InvertibleSequential(*[Leapfrog(nn.Identity(), h) for _ in range(steps)])
        return abs(network(x)[1].item() - math.e)

    assert error(20) / error(40) == pytest.approx(4, rel=0.05)


def log_determinant(layer, x):
    """Of the Jacobian for the first example, as autograd has it."""

    def run(flat):
        return torch.cat([part.flatten() for part in layer(tuple(flat.view(2, *x[0].shape)))])

    first = torch.cat([part.flatten() for part in x])
    return torch.autograd.functional.jacobian(run, first).slogdet().logabsdet


def test_the_log_determinant_of_momentum_is_that_of_gamma_for_each_number():
    layer = Momentum(bottleneck(2), gamma=0.7).double().eval()
    x = pair(1, 4, 2, 2)
    _, log_det = layer.forward_and_log_det(x)
    assert log_det.item() == pytest.approx(8 * math.log(0.7))
    assert log_determinant(layer, x).item() == pytest.approx(8 * math.log(0.7))


def test_leapfrog_preserves_volume():
    layer = Leapfrog(bottleneck(2)).double().eval()
    assert layer.volume_preserving
    x = pair(1, 4, 2, 2)
    assert layer.forward_and_log_det(x)[1].item() == 0
    assert abs(log_determinant(layer, x).item()) < 1e-10


@both_steps
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("conditional", [False, True])
def test_f_is_evaluated_once_more_where_activations_are_rebuilt(make, way, conditional):
    def network():
        fs = [AddsContext(2) if conditional else bottleneck(2, dropout=0.3) for _ in range(3)]
        return InvertibleSequential(*(make(Counting(f), conditional=conditional) for f in fs))

    networks = both(lambda: network().double())
    context = [torch.tensor([0.5, 2.0], dtype=torch.float64)] if conditional else []
    assert_same_gradients(networks, loss_of(way, inputs(), *context))
    assert evaluations(networks[0]) == [1, 1, 1]
    assert evaluations(networks[1]) == [2, 2, 2]


@both_steps
def test_one_tensor_may_be_both_streams(make):
    def loss(network):
        x = images(2, 2, 2, 2).requires_grad_()
        y1, y2 = network((x, x))
        (gradient,) = torch.autograd.grad(y1.sin().sum() + y2.sum(), x, create_graph=True)
        return gradient.square().sum()

    networks = both(lambda: InvertibleSequential(*(make(bottleneck(2)) for _ in range(3))).double())
    assert_same_gradients(networks, loss)


@both_steps
def test_batches_are_counted_once(make):
    network = InvertibleSequential(make(batch_norm_net()), checkpoint=True).double()
    loss_of("forward", inputs())(network).backward()
    assert [int(b) for name, b in network.named_buffers() if "num_batches" in name] == [1]


@both_steps
def test_memory_does_not_grow_with_depth(make):
    def held(depth):
        layers = [make(nn.Sequential(nn.Conv2d(2, 2, 1), nn.Tanh())) for _ in range(depth)]
        network = InvertibleSequential(*layers, checkpoint=True)
        x = tuple(part.requires_grad_() for part in pair(64, 4, 16, 16, dtype=torch.float32))
        return memory_of(lambda: network(x)).held

    one_stream = 64 * 2 * 16 * 16 * 4
    assert held(2) >= one_stream
    assert held(12) - held(2) < one_stream / 10


@both_steps
def test_rebuilding_is_right_under_autocast(make):
    def loss(network):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of("forward", inputs(torch.float32))(network)

    networks = both(lambda: InvertibleSequential(make(bottleneck(2)), make(bottleneck(2))))
    assert_same_gradients(networks, loss, tolerance=2e-2)


@both_steps
@copied_in_both_ways
def test_a_copy_runs_its_own_f_and_so_does_a_layer_whose_f_was_replaced(make, again):
    layer = make(nn.Conv2d(2, 2, 1)).double()
    copy = again(layer)
    nn.init.zeros_(layer.f.weight)
    assert not torch.equal(copy(pair())[1], layer(pair())[1])
    copy.f = layer.f
    torch.testing.assert_close(copy(pair()), layer(pair()), rtol=0, atol=0)
    assert [name for name, _ in layer.named_parameters()] == ["f.weight", "f.bias"]


def test_leapfrog_with_a_quantum_has_the_gradients_of_stored_activations_bit_for_bit():
    q = 2**-12

    def make():
        layers = [Leapfrog(bottleneck(2, dropout=0.3), 0.3, quantum=q) for _ in range(8)]
        return InvertibleSequential(Quantize(q), *layers)

    def loss(network):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of("forward", inputs(torch.float32))(network)

    networks = both(make)
    assert networks[1].exact
    assert_same_gradients(networks, loss, tolerance=0)


def deep(gamma, **settings):
    torch.manual_seed(0)
    layers = [Momentum(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), gamma) for _ in range(32)]
    return InvertibleSequential(*layers, checkpoint=Rebuild(**settings))


def backward(network):
    x = images(16, 8, dtype=torch.float32)
    place, velocity = network((x, torch.zeros_like(x)))
    (place.sin().sum() + velocity.sum()).backward()


def test_the_inverse_of_momentum_magnifies_rounding_errors_which_anchors_stop():
    with pytest.raises(RebuildError, match="off by"):
        backward(deep(0.5))
    with measure_drift() as drift:
        backward(deep(0.5, anchor_every=10))
    assert drift.worst.error < 1e-4
    with measure_drift() as drift:
        backward(deep(0.9))
    assert drift.worst.error < 1e-4


def test_an_inverse_of_a_step_is_taken_apart():
    networks = both(
        lambda: InvertibleSequential(
            Inverse(Momentum(Counting(bottleneck(2)))), Inverse(Leapfrog(Counting(bottleneck(2))))
        ).double()
    )
    assert_same_gradients(networks, loss_of("forward", inputs()))
    assert evaluations(networks[1]) == [2, 2]


def test_a_tensor_is_put_at_rest_by_a_pad():
    network = InvertibleSequential(
        InjectivePad(4), Split(), Momentum(nn.Linear(4, 4)), checkpoint=True
    ).double()
    x = images(5, 4)
    expected = network[2]((x, torch.zeros_like(x)))
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network.inverse(expected), x)


@pytest.mark.parametrize("gamma", [0, 1, -0.5, 1.5, math.nan, "0.9"])
def test_gamma_is_between_0_and_1(gamma):
    with pytest.raises(ValueError, match=r"Momentum takes a gamma between 0 and 1, .*, got "):
        Momentum(nn.Identity(), gamma)


@pytest.mark.parametrize("step", [0, math.inf, math.nan, "1"])
def test_a_step_is_a_finite_number_other_than_0(step):
    with pytest.raises(ValueError, match="Leapfrog takes a finite step, not 0, got"):
        Leapfrog(nn.Identity(), step)


@pytest.mark.parametrize(
    ("layer", "name"), [(Momentum(nn.Identity()), "gamma"), (Leapfrog(nn.Identity()), "step")]
)
def test_numbers_are_read_only(layer, name):
    with pytest.raises(AttributeError):
        setattr(layer, name, 0.5)


@pytest.mark.parametrize("make", [Momentum, Leapfrog])
def test_what_is_no_module_is_refused_by_name(make):
    with pytest.raises(
        TypeError, match=rf"{make.__name__} takes a torch.nn.Module, got a function"
    ):
        make(lambda x: x)


@both_steps
def test_an_f_of_another_width_is_named(make):
    with pytest.raises(ValueError, match=r"f \(Conv2d\) must return"):
        make(nn.Conv2d(2, 3, 1)).double()(pair())


def test_the_options_are_shown():
    assert "gamma=0.7" in repr(Momentum(nn.Identity(), 0.7))
    assert "step=0.5, quantum=0.25" in repr(Leapfrog(nn.Identity(), 0.5, quantum=0.25))
