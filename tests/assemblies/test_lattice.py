"""A flow of the phi^4 theory on a lattice, trained by its own samples."""

import math

import pytest
import torch
from torch import Tensor, nn

from invertible import (
    AffineCoupling,
    CheckerboardSplit,
    Flow,
    Inverse,
    InvertibleSequential,
    Scale,
    Swap,
)

SIZE = 8
MASS = 1.0  # squared
STEPS = 80


def periodic(channels: int, out: int) -> nn.Module:
    return nn.Conv2d(channels, out, 3, padding=1, padding_mode="circular")


def lattice_flow() -> Flow:
    """Black and white sites change by turns; the identity at the beginning."""

    def coupling() -> AffineCoupling:
        f = nn.Sequential(periodic(2, 8), nn.LeakyReLU(), periodic(8, 4))
        nn.init.zeros_(f[-1].weight)
        nn.init.zeros_(f[-1].bias)
        return AffineCoupling(f)

    couplings = [layer for _ in range(4) for layer in (coupling(), Swap())]
    board = CheckerboardSplit()
    layers = [board, *couplings, Inverse(board), Scale(1)]
    return Flow(InvertibleSequential(*layers, checkpoint=True), event_shape=(1, SIZE, SIZE))


def action(field: Tensor, strength: float) -> Tensor:
    """Of the phi^4 theory; without coupling it is that of a free field."""
    bonds = sum((field - field.roll(1, dim)).square() for dim in (2, 3))
    return (bonds + MASS * field**2 + strength * field**4).sum((1, 2, 3))


@torch.no_grad()
def log_weights(flow: Flow, strength: float) -> Tensor:
    field, log_density = flow.rsample_and_log_prob((2048,))
    return -action(field, strength) - log_density


def effective_sample_size(log_weight: Tensor) -> float:
    """The share of the samples that is left by their weights, between 1 / count and 1."""
    return 1 / (len(log_weight) * log_weight.softmax(0).square().sum().item())


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_reverse_kullback_leibler_raises_the_effective_sample_size(strength):
    torch.manual_seed(0)
    flow = lattice_flow()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    before = effective_sample_size(log_weights(flow, strength))
    for _ in range(STEPS):
        field, log_density = flow.rsample_and_log_prob((128,))
        loss = (log_density + action(field, strength)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    weights = log_weights(flow, strength)
    after = effective_sample_size(weights)
    print(f"effective sample size {before:.4f}, after {STEPS} steps {after:.4f}")
    assert before < 0.01
    assert after > 0.02
    if strength == 0:
        estimate = weights.logsumexp(0).item() - math.log(len(weights))
        assert estimate == pytest.approx(log_normaliser(), abs=0.2)


def log_normaliser() -> float:
    """Of the free field, whose Fourier modes are independent normals."""
    waves = 2 - 2 * (2 * math.pi * torch.arange(SIZE) / SIZE).cos()
    modes = waves[:, None] + waves + MASS
    return 0.5 * (math.pi / modes).log().sum().item()
