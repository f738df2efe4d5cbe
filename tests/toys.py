"""Small layers and sub-networks that several tests share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invertible import InvertibleModule


class Keep(InvertibleModule):
    """Returns its state as it is."""

    volume_preserving = True

    def forward(self, x):
        return x

    def inverse(self, y):
        return y


class Affine(InvertibleModule):
    """Scales and shifts all numbers: a constant log-determinant other than zero."""

    def __init__(self, log_scale: float = 0.5, shift: float = 1.0):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x):
        return x * self.log_scale.exp() + self.shift

    def inverse(self, y):
        return (y - self.shift) / self.log_scale.exp()

    def forward_and_log_det(self, x):
        return self(x), self.log_det(x)

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self.log_det(y)

    def log_det(self, x):
        return (self.log_scale * x[0].numel()).expand(x.shape[0])


class Logistic(InvertibleModule):
    """Maps numbers to those between 0 and 1: a log-determinant that depends on the input."""

    def forward(self, x):
        return x.sigmoid()

    def inverse(self, y):
        return y.logit()

    def forward_and_log_det(self, x):
        return self(x), self.log_det(x)

    def inverse_and_log_det(self, y):
        x = self.inverse(y)
        return x, -self.log_det(x)

    def log_det(self, x):
        return (F.logsigmoid(x) + F.logsigmoid(-x)).flatten(1).sum(1)


class Double(InvertibleModule):
    """A layer that defines no log-determinant."""

    def forward(self, x):
        return 2 * x

    def inverse(self, y):
        return y / 2


class AddsContext(nn.Module):
    """A sub-network that takes a context of one number an example."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.conv(x) * context.view(-1, 1, 1, 1)


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers in a shape, by default two small images; the same in each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape or (2, 4, 2, 2), generator=generator, dtype=torch.float64).to(dtype)


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The halves of :func:`images`."""
    x1, x2 = images(*shape, dtype=dtype).chunk(2, dim=1)
    return x1, x2


def batch_norm_net(channels: int = 2, activation: nn.Module | None = None) -> nn.Sequential:
    """A sub-network with running statistics."""
    return nn.Sequential(
        nn.BatchNorm2d(channels), activation or nn.Tanh(), nn.Conv2d(channels, channels, 1)
    )
