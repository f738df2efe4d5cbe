"""What surrounds the forward pass is there again when layers are rebuilt."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from toys import Probe, assert_as_without, body, linear, probes
from toys import body_images as images

from invertible import AdditiveCoupling, InvertibleSequential, Swap


class Scaled(nn.Module):
    """Makes a tensor of the default device and dtype."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        return self.f(x).tanh() * torch.tensor([0.1, 0.2, 0.3, 0.4])


def test_tensors_are_made_on_the_default_device_of_the_forward_pass():
    torch.set_default_device("meta")
    try:
        network = InvertibleSequential(AdditiveCoupling(Scaled()), Swap(), checkpoint=True)
        loss = network((torch.randn(3, 4), torch.randn(3, 4)))[1].sum()
    finally:
        torch.set_default_device(None)
    loss.backward()
    assert next(network.parameters()).grad.is_meta


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_default_device_need_not_be_there_in_both_passes(when):
    def train(network, x):
        if when == "forward":
            with torch.device("cpu"):
                return network(x).sin().sum()
        loss = network(x).sin().sum()
        loss.register_hook(lambda _: torch.set_default_device("meta"))
        return loss

    try:
        assert_as_without(Scaled, train)
    finally:
        torch.set_default_device(None)


def test_the_default_dtype_is_that_of_the_forward_pass():
    def train(network, x):
        torch.set_default_dtype(torch.float64)
        try:
            return network(x).sin().sum()
        finally:
            torch.set_default_dtype(torch.float32)

    assert_as_without(Scaled, train)


class Halving(TorchFunctionMode):
    """Halves each hyperbolic tangent."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result / 2 if func is torch.Tensor.tanh else result


def test_function_modes_are_those_of_the_forward_pass():
    def inside(network, x):
        with Halving():
            return network(x).sin().sum()

    assert_as_without(Scaled, inside)


@pytest.mark.parametrize("forward", [True, False])
def test_a_function_mode_around_the_backward_pass_makes_no_difference(forward):
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        network = InvertibleSequential(AdditiveCoupling(Scaled()), checkpoint=checkpoint).double()
        x = torch.ones(3, 4).double(), torch.ones(3, 4).double()
        loss = None if forward else network(x)[0].sin().sum()
        with Halving():
            (network(x)[0].sin().sum() if loss is None else loss).backward()
            assert torch._C._len_torch_function_stack() == 1
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)


def test_switches_are_those_of_the_forward_pass():
    def look(*_):
        return (
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        )

    network = body(2, lambda: Probe(nn.Conv2d(4, 4, 1), look), checkpoint=True)
    precision, before = torch.get_float32_matmul_precision(), look()
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            loss = network(images()).sum()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(precision)
    loss.backward()
    assert look() == before
    for probe in probes(network):
        first, again = probe.seen
        assert first == again != before


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_backward_may_be_called_in_any_grad_mode(around):
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        network = body(2, lambda: nn.Conv2d(4, 4, 1), checkpoint=checkpoint)
        loss = network(images()).sin().sum()
        with around():
            loss.backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_parametrizations_may_be_cached(backward_inside):
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        network = InvertibleSequential(
            AdditiveCoupling(parametrizations.weight_norm(linear()[0])), checkpoint=checkpoint
        )
        x = torch.ones(3, 2), torch.ones(3, 2)
        with parametrize.cached():
            loss = network(x)[0].sin().sum()
            if backward_inside:
                loss.backward()
                assert parametrize._cache_enabled
        if not backward_inside:
            loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    torch.testing.assert_close(*gradients)
