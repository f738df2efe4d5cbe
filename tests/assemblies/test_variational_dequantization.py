"""Variational dequantisation, as in Flow++: the noise is drawn from a flow of its own."""

import math

import pytest
import torch
from torch import Tensor, nn
from toys import assert_same_gradients, both

from invertible import (
    ActNorm,
    AffineCoupling,
    Dequantize,
    Flow,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    Logit,
    Merge,
    Split,
    Swap,
)

# Bits a dimension of what numbers() draws.
ENTROPY = (1 - 0.2 * math.log2(0.2) - 0.8 * math.log2(0.8)) / 2


def numbers(count: int) -> Tensor:
    """Two bits, of which the second is the first, but for one time in five."""
    first = torch.rand(count, 1) < 0.5
    return torch.cat((first, first ^ (torch.rand(count, 1) < 0.2)), 1).to(torch.uint8)


def network(inputs: int, out: int) -> nn.Sequential:
    f = nn.Sequential(nn.Linear(inputs, 32), nn.SiLU(), nn.Linear(32, out))
    nn.init.zeros_(f[-1].weight)
    nn.init.zeros_(f[-1].bias)
    return f


class GivenNumbers(nn.Module):
    """A sub-network of half of the noise and the numbers that it is added to."""

    def __init__(self, out: int):
        super().__init__()
        self.f = network(1 + 2, out)

    def forward(self, noise: Tensor, x: Tensor) -> Tensor:
        return self.f(torch.cat((noise, x), 1))


def noise() -> Flow:
    """Noise between 0 and 1: from there to all numbers, and to normal ones."""

    def coupling() -> list[InvertibleModule]:
        return [AffineCoupling(GivenNumbers(2), conditional=True), Swap()]

    layers = [Logit(), Split(), *(coupling() + coupling() + coupling()), Merge()]
    return Flow(InvertibleSequential(*layers), event_shape=(2,))


def flow_of_numbers(noise: Flow | None) -> Flow:
    """A density that is far from being constant between whole numbers."""
    f = network(1, 2)
    layers = [ActNorm(2), InvertibleLinear(2), Split(), AffineCoupling(f), Swap(), Merge()]
    return Flow(InvertibleSequential(Dequantize(2, noise), *layers), event_shape=(2,))


def trained_bits(flow: Flow, steps: int) -> float:
    """What a trained flow says of numbers that it has not seen."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = flow.bits_per_dim(numbers(128)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return flow.bits_per_dim(numbers(4000)).mean().item()


@pytest.mark.slow
def test_learned_noise_lowers_the_bound_which_stays_above_the_entropy():
    torch.manual_seed(0)
    uniform = trained_bits(flow_of_numbers(None), steps=100)
    learned = trained_bits(flow_of_numbers(noise()), steps=100)
    assert ENTROPY < learned < uniform - 0.1


def test_samples_are_numbers_without_a_density():
    torch.manual_seed(0)
    flow = flow_of_numbers(noise())
    flow.log_prob(numbers(100))
    assert set(flow.sample((100,)).flatten().tolist()) == {0, 1}
    with pytest.raises(NotImplementedError, match="Dequantize's inverse forgets the noise"):
        flow.rsample_and_log_prob((100,))


def test_gradients_are_those_of_stored_activations():
    def make() -> Flow:
        torch.manual_seed(0)
        flow = flow_of_numbers(noise()).double()
        flow.log_prob(numbers(100).double())
        for parameter in flow.parameters():
            nn.init.normal_(parameter, std=0.3)
        return flow

    x = numbers(20).double()
    assert_same_gradients(both(make), lambda flow: flow.bits_per_dim(x).square().sum())
