"""Transforms of torch as layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from typing_extensions import override

from .._support.checks import check_context, describe, expect_tensor, name_of
from .._support.torch_distributions import WithBuffers
from ..module import InvertibleModule
from ..state import Context, gathered, has_values


class FromTransform(InvertibleModule):
    r"""Makes a layer of a :class:`torch.distributions.Transform`.

    ``forward`` is the transform, ``inverse`` its inverse. Tensors that it is made of move with the
    layer and are not learned; a transform that is a module is a part of the layer, and learned.
    What transforms keep from one call to the next, their cache, is not used.

    Args:
        transform: A bijective transform, such as ``ExpTransform()`` or a ``ComposeTransform``.

    Shape:
        - Input: :math:`(N, *)`, of as many dimensions as an event of the transform has at least.
        - Output: as the transform makes it.

    Raises:
        TypeError: If ``transform`` is none; when called on anything but a tensor.
        ValueError: If it is not bijective, or made of tensors that require grad; when called, if
            values are outside of its domain, or of its codomain when inverted, or would be
            broadcast to the transform's tensors.

    Example:
        >>> layer = FromTransform(torch.distributions.ExpTransform())
        >>> y, log_det = layer.forward_and_log_det(torch.zeros(2, 3))
        >>> y[0], log_det
        (tensor([1., 1., 1.]), tensor([0., 0.]))
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        if not isinstance(transform, Transform):
            raise TypeError(
                f"FromTransform takes a torch.distributions.Transform, got {describe(transform)}."
            )
        if not transform.bijective:
            raise ValueError(f"FromTransform takes bijections, and {transform!r} is none.")
        held: Any = transform
        if not isinstance(transform, nn.Module):
            uncached: Any = transform.with_cache(0)  # type: ignore[no-untyped-call]
            held = WithBuffers("FromTransform", uncached)
        self.held: nn.Module = held

    @property
    def transform(self) -> Transform:
        """The transform."""
        held: Any = self.held
        found: Transform = held.current if isinstance(held, WithBuffers) else held
        return found

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, inverse=False)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._run(y, inverse=True)

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        y = self._run(x, inverse=False)
        return y, self._log_det(x, y)

    @override
    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        check_context(self, context)
        x = self._run(y, inverse=True)
        return x, -self._log_det(x, y)

    def _run(self, x: Tensor, inverse: bool) -> Tensor:
        transform = self.transform
        domain = transform.codomain if inverse else transform.domain
        x = expect_tensor(self, x, min_dim=1 + domain.event_dim, inverse=inverse)
        self._require_shape(x, inverse)
        if not torch.compiler.is_compiling() and has_values(x):
            self._require_within(x, domain, inverse)
        run: Any = transform.inv if inverse else transform
        y: Tensor = run(x)
        return y

    def _require_shape(self, x: Tensor, inverse: bool) -> None:
        """Tells a shape that torch would broadcast, which no inverse undoes."""
        transform: Any = self.transform
        there, back = transform.forward_shape, transform.inverse_shape
        if inverse:
            there, back = back, there
        if back(there(x.shape)) != x.shape:
            raise ValueError(
                f"{name_of(self, inverse)} got {describe(x)}, which does not fit {transform!r}: it "
                f"would be broadcast to {tuple(there(x.shape))}."
            )

    def _require_within(self, x: Tensor, domain: constraints.Constraint, inverse: bool) -> None:
        inside: Tensor = domain.check(x.detach())  # type: ignore[no-untyped-call]
        if not gathered(inside).all():
            raise ValueError(
                f"{name_of(self, inverse)} takes values within {domain}, the "
                f"{'codomain' if inverse else 'domain'} of {self.transform!r}, got some outside."
            )

    def _log_det(self, x: Tensor, y: Tensor) -> Tensor:
        transform: Any = self.transform
        log_det: Tensor = transform.log_abs_det_jacobian(x, y)
        return log_det.sum(list(range(1, log_det.dim()))) if log_det.dim() > 1 else log_det
