"""A conditional neural spline flow learns a posterior from simulations alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from invertible import (
    Flow,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    RationalQuadraticSpline,
    SplineCoupling,
    Split,
    Swap,
)

# Two parameters, of which three measurements tell something: a linear model with noise.
MIXED = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, -1.0]])
NOISE = 0.7


def simulated(count: int) -> tuple[Tensor, Tensor]:
    """Parameters of a standard normal prior, and what is measured."""
    parameters = torch.randn(count, 2)
    return parameters, parameters @ MIXED.T + NOISE * torch.randn(count, 3)


def posterior(measured: Tensor) -> MultivariateNormal:
    precision = torch.eye(2) + MIXED.T @ MIXED / NOISE**2
    mean = measured @ MIXED @ precision.inverse() / NOISE**2
    return MultivariateNormal(mean, precision_matrix=precision)


class Conditioner(nn.Module):
    """From one parameter and all measurements to a spline of the other."""

    def __init__(self, out: int):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(1 + 3, 32), nn.SiLU(), nn.Linear(32, out))
        nn.init.zeros_(self.f[-1].weight)
        nn.init.zeros_(self.f[-1].bias)

    def forward(self, x: Tensor, measured: Tensor) -> Tensor:
        return self.f(torch.cat((x, measured), 1))


def neural_spline_flow() -> Flow:
    def step() -> list[InvertibleModule]:
        f = Conditioner(RationalQuadraticSpline(8).parameters_per_value)
        coupling = SplineCoupling(f, bins=8, bound=4.0, conditional=True)
        return [InvertibleLinear(2), Split(), coupling, Swap(), Merge()]

    return Flow(InvertibleSequential(*step(), *step(), *step()), event_shape=(2,))


@pytest.mark.slow
def test_the_posterior_of_simulations_is_learned():
    torch.manual_seed(0)
    flow = neural_spline_flow()
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    steps = 120
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        parameters, measured = simulated(128)
        loss = -flow.log_prob(parameters, measured).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        parameters, measured = simulated(2000)
        exact = posterior(measured).log_prob(parameters)
        divergence = (exact - flow.log_prob(parameters, measured)).mean().item()
        samples = flow.sample((4000,), torch.tensor([[1.0, -0.5, 1.5]]))[:, 0]
    assert -0.01 < divergence < 0.06
    expected = posterior(torch.tensor([[1.0, -0.5, 1.5]]))
    torch.testing.assert_close(samples.mean(0), expected.mean[0], atol=0.1, rtol=0)
    torch.testing.assert_close(samples.T.cov(), expected.covariance_matrix[0], atol=0.05, rtol=0)
