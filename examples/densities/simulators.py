"""Simulators of which the posterior of the parameters is known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal


class Task(ABC):
    """A prior and a simulator of which the posterior is known."""

    parameters: int
    observed: int

    @abstractmethod
    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws parameters from the prior, and an observation of each."""

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """The same, where :meth:`log_posterior` holds."""
        return self.simulate(count)

    @abstractmethod
    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        """The logarithm of the posterior's density at parameters, each given its observation."""

    @abstractmethod
    def sample_posterior(self, count: int, x: Tensor) -> Tensor:
        """Draws parameters given a single observation."""


class LinearGaussian(Task):
    r"""A normal prior and a normal likelihood: :math:`x = A \theta + 0.5 n`."""

    parameters, observed, noise = 3, 5, 0.5

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(self.observed, self.parameters, generator=generator) / 2

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        theta = torch.randn(count, self.parameters)
        return theta, theta @ self.matrix.T + self.noise * torch.randn(count, self.observed)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        a = self.matrix / self.noise**2
        precision = torch.eye(self.parameters) + self.matrix.T @ a
        return MultivariateNormal((x @ a) @ precision.inverse(), precision_matrix=precision)

    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.posterior(x).log_prob(theta)
        return found

    def sample_posterior(self, count: int, x: Tensor) -> Tensor:
        return self.posterior(x).sample((count,))


class TwoMoons(Task):
    r"""Half a thin ring, moved by the parameters; of one of them only the size is seen.

    With :math:`u = (\theta_1 + \theta_2) / \sqrt 2` and :math:`v = (\theta_2 - \theta_1) / \sqrt
    2`, :math:`x = (r \cos \alpha + 0.25 - |u|, r \sin \alpha + v)`.
    """

    parameters = observed = 2
    radius, thickness = 0.1, 0.01

    def ring(self, count: int) -> Tensor:
        r = self.radius + self.thickness * torch.randn(count)
        alpha = math.pi * (torch.rand(count) - 0.5)
        return torch.stack([r * alpha.cos() + 0.25, r * alpha.sin()], 1)

    def simulate(self, count: int) -> tuple[Tensor, Tensor]:
        theta = 2 * torch.rand(count, 2) - 1
        u, v = turned(theta).unbind(1)
        return theta, self.ring(count) + torch.stack([-u.abs(), v], 1)

    def pairs(self, count: int) -> tuple[Tensor, Tensor]:
        """Where both crescents lie within the prior, and apart from each other."""
        theta, x = self.simulate(8 * count)
        u, v = turned(theta).unbind(1)
        inside = (u.abs() > 0.2) & (u.abs() + v.abs() < 0.9)
        return theta[inside][:count], x[inside][:count]

    def log_posterior(self, theta: Tensor, x: Tensor) -> Tensor:
        """Half of the ring's density at what the parameters leave of the observation."""
        u, v = turned(theta).unbind(1)
        first, second = (x + torch.stack([u.abs() - 0.25, -v], 1)).unbind(1)
        r = torch.hypot(first, second)
        normal = -((r - self.radius) / self.thickness).square() / 2
        found = normal - (r * self.thickness * math.sqrt(2 * math.pi) * math.pi).log() - math.log(2)
        return found.where(first > 0, -math.inf)

    def sample_posterior(self, count: int, x: Tensor) -> Tensor:
        first, second = (self.ring(count) - x).unbind(1)
        sign = 2 * torch.randint(2, (count,)) - 1
        return turned(torch.stack([first * sign, -second], 1), back=True)


def turned(theta: Tensor, back: bool = False) -> Tensor:
    """The sum and the difference of both parameters, as a rotation; or these from them."""
    a, b = theta.unbind(1)
    parts = (a - b, a + b) if back else (a + b, b - a)
    return torch.stack(parts, 1) / math.sqrt(2)


TASKS: dict[str, type[Task]] = {"linear-gaussian": LinearGaussian, "two-moons": TwoMoons}
