"""Layers that keep the laws, in ways that a careless check could take for wrong."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from invertible import (
    AdditiveCoupling,
    Inverse,
    InvertibleModule,
    InvertibleSequential,
    Merge,
    Quantize,
    Split,
    State,
    Swap,
    no_trace,
)


class AffineCoupling(InvertibleModule):
    """Has log-determinants, and a sub-network that may draw or take batch statistics."""

    def __init__(self, f: nn.Module):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.forward_and_log_det(x)[0]

    def inverse(self, y):
        return self.inverse_and_log_det(y)[0]

    def forward_and_log_det(self, x):
        x1, x2 = x
        log_scale, shift = self._maps(x2)
        return (x1 * log_scale.exp() + shift, x2), log_scale.flatten(1).sum(1)

    def inverse_and_log_det(self, y):
        y1, x2 = y
        with no_trace(self.f, y):
            log_scale, shift = self._maps(x2)
        return ((y1 - shift) * (-log_scale).exp(), x2), -log_scale.flatten(1).sum(1)

    def _maps(self, x2):
        raw, shift = self.f(x2).chunk(2, dim=1)
        return raw.tanh(), shift


class Conditioned(InvertibleModule):
    """Scales and shifts by functions of a context."""

    conditional = True

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(3, 8)

    def forward(self, x, context):
        return self.forward_and_log_det(x, context)[0]

    def inverse(self, y, context):
        return self.inverse_and_log_det(y, context)[0]

    def forward_and_log_det(self, x, context):
        log_scale, shift = self.f(context).chunk(2, 1)
        return x * log_scale.exp() + shift, log_scale.sum(1)

    def inverse_and_log_det(self, y, context):
        log_scale, shift = self.f(context).chunk(2, 1)
        return (y - shift) * (-log_scale).exp(), -log_scale.sum(1)


class OfLabels(InvertibleModule):
    """Shifts by a label's embedding."""

    conditional = True
    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.shifts = nn.Embedding(5, 4)

    def forward(self, x, context):
        return x + self.shifts(context)

    def inverse(self, y, context):
        return y - self.shifts(context)


class OfAWholeContext(InvertibleModule):
    """Its context does not belong to the examples, though it may be as long as the batch."""

    conditional = True
    volume_preserving = True

    def forward(self, x, context):
        return x + context["table"].mean() * context["list"][0].sum()

    def inverse(self, y, context):
        return y - context["table"].mean() * context["list"][0].sum()


class Leaky(InvertibleModule):
    """Has a kink, and log-determinants that jump."""

    def forward(self, x):
        return F.leaky_relu(x, 0.3)

    def inverse(self, y):
        return F.leaky_relu(y, 1 / 0.3)

    def forward_and_log_det(self, x):
        return self(x), self._log_det(x)

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self._log_det(y)

    def _log_det(self, x):
        return math.log(0.3) * (x <= 0).to(x.dtype).flatten(1).sum(1)


class Linear(InvertibleModule):
    """Has a frozen parameter, and one that is not used."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4) + 0.2 * torch.randn(4, 4))
        self.scale = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * (x @ self.weight.T)

    def inverse(self, y):
        return torch.linalg.solve(self.weight, (y / self.scale).T).T

    def forward_and_log_det(self, x):
        return self(x), self._log_det().expand(len(x))

    def inverse_and_log_det(self, y):
        return self.inverse(y), -self._log_det().expand(len(y))

    def _log_det(self):
        return self.weight.slogdet().logabsdet + self.scale.log().sum()


class Augment(InvertibleModule):
    """Injective: adds a stream of zeros, which need no grad."""

    bijective = False

    def forward(self, x):
        return x, torch.zeros_like(x)

    def inverse(self, y):
        return y[0]


class Cached(InvertibleModule):
    """Fills a cache when it is first inverted."""

    volume_preserving = True

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    @cached_property
    def back(self):
        return self.order.argsort()

    def forward(self, x):
        return x[:, self.order]

    def inverse(self, y):
        return y[:, self.back]


class KeepsAPenalty(nn.Module):
    """A sub-network with a loss of its own, which it keeps, and a count of its calls."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        self.calls += 1
        self.penalty = y.square().mean()
        return y


class Attention(nn.Module):
    """A sub-network with dropout in it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        return self.attention(z, z, z, need_weights=False)[0]


def dense(outputs=8, dropout=0.0, norm: type[nn.Module] = nn.Identity):
    return nn.Sequential(
        nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, outputs)
    )


def convolutions(outputs=4, dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(6, outputs, 1),
    )


def zero_gain():
    norm = nn.BatchNorm1d(4)
    nn.init.zeros_(norm.weight)
    return norm


def normed():
    return nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.ReLU(), weight_norm(nn.Linear(4, 4)))


def rounding():
    q = 2.0**-10
    return [AdditiveCoupling(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), quantum=q) for _ in "ab"]


def vectors(n):
    return torch.randn(n, 4)


def pairs(n):
    return torch.randn(n, 4), torch.randn(n, 4)


def images(n):
    return torch.randn(n, 2, 4, 4), torch.randn(n, 2, 4, 4)


class Case(NamedTuple):
    """A layer, a state of so many examples, and a context for them."""

    layer: Callable[[], InvertibleModule]
    x: Callable[[int], State]
    context: Callable[[int], Any] = lambda _: None
    smallest: int = 1


RIGHT = {
    "affine": Case(lambda: AffineCoupling(dense()), pairs),
    "affine, dropout": Case(lambda: AffineCoupling(dense(dropout=0.5)), pairs),
    "affine, BatchNorm": Case(lambda: AffineCoupling(convolutions()), images),
    "affine, both": Case(lambda: AffineCoupling(convolutions(dropout=0.3)), images),
    "affine, BatchNorm of vectors": Case(
        lambda: AffineCoupling(dense(norm=nn.BatchNorm1d)), pairs, smallest=2
    ),
    "context": Case(Conditioned, vectors, lambda n: torch.randn(n, 3)),
    "context with grad": Case(Conditioned, vectors, lambda n: torch.randn(n, 3).requires_grad_()),
    "labels": Case(OfLabels, vectors, lambda n: torch.arange(n)),
    "whole context": Case(
        OfAWholeContext,
        vectors,
        lambda n: {"table": torch.randn(2), "list": [torch.randn(n, 3), "text"]},
    ),
    "kink": Case(Leaky, vectors),
    "all at the kink": Case(Leaky, lambda n: torch.zeros(n, 4)),
    "ReLU of zeros": Case(
        lambda: AdditiveCoupling(dense(4)), lambda n: (torch.randn(n, 4), torch.zeros(n, 4))
    ),
    "constant images": Case(
        lambda: AdditiveCoupling(convolutions(2)), lambda n: (torch.ones(n, 2, 4, 4),) * 2
    ),
    "unused and frozen": Case(Linear, vectors),
    "all frozen": Case(lambda: AdditiveCoupling(dense(4).requires_grad_(False)), pairs),
    "injective": Case(Augment, vectors),
    "cache": Case(Cached, vectors),
    "penalty": Case(lambda: AdditiveCoupling(KeepsAPenalty()), pairs),
    "attention": Case(
        lambda: AdditiveCoupling(Attention()), lambda n: tuple(torch.randn(2, n, 5, 4))
    ),
    "zero gain": Case(lambda: AdditiveCoupling(zero_gain()), pairs, smallest=2),
    "spectral norm": Case(lambda: AdditiveCoupling(normed()), pairs),
    "lazy": Case(lambda: AdditiveCoupling(nn.Sequential(nn.LazyLinear(4), nn.Tanh())), pairs),
    "inverse": Case(lambda: Inverse(AffineCoupling(dense())), pairs),
    "quantum": Case(lambda: AdditiveCoupling(dense(4), quantum=2.0**-10), pairs),
    "a quantum in part": Case(
        lambda: InvertibleSequential(
            AdditiveCoupling(dense(4), quantum=2.0**-10), AffineCoupling(dense())
        ),
        pairs,
    ),
    "exact network": Case(
        lambda: InvertibleSequential(
            Quantize(2.0**-10), Split(), rounding()[0], Swap(), rounding()[1], Merge()
        ),
        vectors,
    ),
}
