"""Layers as transforms of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Size, Tensor
from torch.distributions import Transform, constraints
from typing_extensions import override

from .._support.checks import describe
from ..module import InvertibleModule
from .shapes import shapes_through


class AsTransform(Transform):
    """Makes a :class:`torch.distributions.Transform` of a layer.

    Called, the transform is the layer's ``forward``, and its ``inv`` the ``inverse``; so a
    :class:`Flow`'s layer, which leads from data to latents, makes a ``TransformedDistribution`` of
    its base by ``AsTransform(layer, event_dim).inv``. What is in front of the event is the batch.

    A call computes the log-determinant as well. With ``cache_size=1`` it is kept with input and
    output, as torch's transforms keep these two, until the next call; without, asking for it runs
    the layer once more.

    Args:
        layer: A bijective layer from a tensor to a tensor.
        event_dim: How many dimensions one example has: 1 for vectors, 3 for images.
        cache_size: 1 to keep the last input and output, 0 for not.

    Raises:
        TypeError: If ``layer`` is no layer, or not bijective, or takes a context.
        ValueError: If ``event_dim`` is less than 1; when called on a tensor of fewer dimensions.

    Example:
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> layer = InvertibleSequential(Split(), AffineCoupling(nn.Linear(1, 2)), Merge())
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> data = TransformedDistribution(base, AsTransform(layer, event_dim=1).inv)
        >>> x = data.sample((3,))
        >>> torch.testing.assert_close(data.log_prob(x), Flow(layer, base).log_prob(x))
    """

    bijective = True

    def __init__(self, layer: InvertibleModule, event_dim: int, *, cache_size: int = 0) -> None:
        super().__init__(cache_size)
        if not isinstance(layer, InvertibleModule):
            raise TypeError(f"AsTransform takes a layer of this library, got {describe(layer)}.")
        if not layer.bijective or layer.requires_context:
            raise TypeError(
                f"AsTransform takes bijective layers without a context, and {type(layer).__name__} "
                + ("takes one." if layer.bijective else "is not bijective.")
            )
        if event_dim < 1:
            raise ValueError(f"AsTransform takes an event_dim of at least 1, got {event_dim}.")
        self.layer = layer
        self._event_dim = event_dim
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    @override
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Tensors of real numbers; that a layer takes fewer is not known here."""
        return constraints.independent(constraints.real, self._event_dim)  # type: ignore[no-untyped-call]

    @property
    @override
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Tensors of real numbers."""
        return self.domain

    @override
    def with_cache(self, cache_size: int = 1) -> Self:
        if cache_size == self._cache_size:
            return self
        return type(self)(self.layer, self._event_dim, cache_size=cache_size)

    @override
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-determinant, of the shape of the batch."""
        if self._last is None or self._last[0] is not x or self._last[1] is not y:
            return self._run(self.layer.forward_and_log_det, x)[1]
        return self._last[2]

    @override
    def forward_shape(self, shape: Any) -> Size:
        return self._shape(shape, inverse=False)

    @override
    def inverse_shape(self, shape: Any) -> Size:
        return self._shape(shape, inverse=True)

    @override
    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self._run(self.layer.forward_and_log_det, x)
        self._last = (x, y, log_det) if self._cache_size else None
        return y

    @override
    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self._run(self.layer.inverse_and_log_det, y)
        self._last = (x, y, -log_det) if self._cache_size else None
        return x

    def _run(self, method: Callable[[Any], tuple[Any, Tensor]], x: Tensor) -> tuple[Tensor, Tensor]:
        batch = self._split(x.shape)[0]
        y, log_det = method(x.reshape(-1, *x.shape[len(batch) :]))
        return y.reshape(*batch, *y.shape[1:]), log_det.reshape(batch)

    def _split(self, shape: Size) -> tuple[Size, Size]:
        if len(shape) < self._event_dim:
            raise ValueError(
                f"this AsTransform takes events of {self._event_dim} dimensions, got a shape of "
                f"{tuple(shape)}."
            )
        place = len(shape) - self._event_dim
        return Size(shape[:place]), Size(shape[place:])

    def _shape(self, shape: Any, inverse: bool) -> Size:
        batch, event = self._split(Size(shape))
        found = shapes_through(self.layer, (event,), None, 1, inverse)
        if found is None:
            raise ValueError(
                f"the shape that {type(self.layer).__name__} makes depends on values, so that it "
                "can't be told without them."
            )
        return batch + found[0]
