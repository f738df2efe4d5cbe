"""What latents are distributed as."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import (
    Distribution,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
)
from typing_extensions import override

from .._support.checks import describe
from .._support.torch_distributions import WithBuffers
from ..state import Context
from .distribution import FlowDistribution


class Base(nn.Module, ABC):
    """Gives the distribution of one stream of the latents."""

    conditional = False
    """Whether it takes a context, and then gives a distribution for each example of it."""
    requires_context = False

    @abstractmethod
    def distribution(self, shape: Size, context: Context) -> Distribution:
        """That of latents of a shape, which counts for standard normals alone."""

    def shape(self) -> Size | None:
        """The shape of one example's latents, if it is known without a context."""
        return None

    def log_prob(self, z: Tensor, context: Context) -> Tensor:
        """The logarithm of the density of each example, ``(N,)``."""
        found = self.distribution(z.shape[1:], context if self.conditional else None)
        expected = (*found.batch_shape, *found.event_shape)
        if z.shape != (expected if self.conditional else (len(z), *expected)):
            raise ValueError(
                f"Flow's base is a distribution of latents of shape {tuple(expected)}, and the "
                f"layer made {describe(z)}, the batch first."
            )
        if not isinstance(found, FlowDistribution):  # whose layers keep their dtype
            z = z.to(torch.promote_types(z.dtype, torch.float32))
        log_prob: Tensor = found.log_prob(z)
        return log_prob.sum(list(range(1, log_prob.dim()))) if log_prob.dim() > 1 else log_prob

    def draw(self, count: int, shape: Size, context: Context, temperature: float | None) -> Tensor:
        """Draws examples; with gradients if the temperature is None."""
        found = self.distribution(shape, context)
        if self.conditional and found.batch_shape[:1] != (count,):
            raise ValueError(
                f"Flow's base must return a distribution for each of the {count} examples of its "
                f"context, first in its batch_shape, got one of batch_shape "
                f"{tuple(found.batch_shape)}."
            )
        sizes = Size() if self.conditional else Size([count])
        if temperature is None and not found.has_rsample:
            raise NotImplementedError(
                f"Flow's base, {type(found).__name__}, can't be sampled with gradients."
            )
        if temperature is None:
            return found.rsample(sizes)
        z = found.sample(sizes)
        return z if temperature == 1 else _mean(found).lerp(z, temperature)


class StandardNormal(Base):
    """Independent standard normals, of any shape."""

    loc: Tensor
    scale: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", like.new_zeros(()), persistent=False)
        self.register_buffer("scale", like.new_ones(()), persistent=False)

    @override
    def distribution(self, shape: Size, context: Context) -> Distribution:
        # Without validation, which the compiler can't take in one graph.
        return Normal(self.loc.expand(shape), self.scale.expand(shape), validate_args=False)


class Fixed(Base):
    """A distribution of torch, whose tensors are buffers."""

    def __init__(self, distribution: Distribution) -> None:
        super().__init__()
        self.held = WithBuffers("Flow's base", distribution)

    @override
    def distribution(self, shape: Size, context: Context) -> Distribution:
        return self.held.current

    @override
    def shape(self) -> Size:
        found = self.held.current
        return found.batch_shape + found.event_shape


class Learned(Base):
    """A module that returns a distribution, given a context or not."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        parameters = list(inspect.signature(module.forward).parameters.values())
        self.conditional = bool(getattr(module, "conditional", parameters))
        needed = bool(parameters) and parameters[0].default is inspect.Parameter.empty
        self.requires_context = bool(getattr(module, "requires_context", needed))

    @override
    def distribution(self, shape: Size, context: Context) -> Distribution:
        found = self.module(context) if self.conditional else self.module()
        if not isinstance(found, Distribution):
            raise TypeError(
                f"Flow's base ({type(self.module).__name__}) must return a "
                f"torch.distributions.Distribution, got {describe(found)}."
            )
        return found

    @override
    def shape(self) -> Size | None:
        if self.conditional:
            return None
        found = self.distribution(Size(), None)
        return found.batch_shape + found.event_shape


def bases_of(given: Any) -> list[Base]:
    """What a user gave, for one stream or a sequence for several.

    Raises:
        TypeError: If there is anything but distributions and modules.
    """
    several = isinstance(given, Sequence) and len(given) > 0
    return list(map(_base_of, given)) if several else [_base_of(given)]


def _base_of(given: Any) -> Base:
    if isinstance(given, nn.Module):
        return Learned(given)
    if isinstance(given, Distribution):
        return Fixed(given)
    raise TypeError(
        "Flow takes as base a torch.distributions.Distribution, a module that returns one, or a "
        f"list of these, one for each stream of the latents; got {describe(given)}."
    )


def _mean(found: Distribution) -> Tensor:
    """The mean of normal distributions, around which a temperature contracts them."""
    inner = found
    while isinstance(inner, Independent):
        inner = inner.base_dist
    if not isinstance(inner, Normal | MultivariateNormal | LowRankMultivariateNormal):
        raise TypeError(
            f"a temperature is for normal distributions, and Flow's base is of "
            f"{type(inner).__name__}: sample with temperature 1."
        )
    return found.mean
