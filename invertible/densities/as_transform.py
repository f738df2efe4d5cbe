"""Layers as transforms of torch."""

from __future__ import annotations

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
        codomain_event_dim: How many it has as the layer returns it, if another number, as behind
            :class:`Flatten`.
        cache_size: 1 to keep the last input and output, 0 for not.

    Raises:
        TypeError: If ``layer`` is no layer, or not bijective, or takes a context; when called, if
            it returns several streams.
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

    def __init__(
        self,
        layer: InvertibleModule,
        event_dim: int,
        *,
        codomain_event_dim: int | None = None,
        cache_size: int = 0,
    ) -> None:
        super().__init__(cache_size)
        if not isinstance(layer, InvertibleModule):
            raise TypeError(f"AsTransform takes a layer of this library, got {describe(layer)}.")
        if not layer.bijective or layer.requires_context:
            raise TypeError(
                f"AsTransform takes bijective layers without a context, and {type(layer).__name__} "
                + ("takes one." if layer.bijective else "is not bijective.")
            )
        self.layer = layer
        last = event_dim if codomain_event_dim is None else codomain_event_dim
        self._event_dims = (event_dim, last)
        if min(self._event_dims) < 1:
            raise ValueError(
                f"AsTransform takes an event_dim of at least 1, got {min(self._event_dims)}."
            )
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    @override
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Tensors of real numbers; that a layer takes fewer is not known here."""
        return constraints.independent(constraints.real, self._event_dims[0])  # type: ignore[no-untyped-call]

    @property
    @override
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Tensors of real numbers."""
        return constraints.independent(constraints.real, self._event_dims[1])  # type: ignore[no-untyped-call]

    @override
    def with_cache(self, cache_size: int = 1) -> Self:
        if cache_size == self._cache_size:
            return self
        first, last = self._event_dims
        return type(self)(self.layer, first, codomain_event_dim=last, cache_size=cache_size)

    @override
    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """The log-determinant, of the shape of the batch."""
        if self._last is None or self._last[0] is not x or self._last[1] is not y:
            return self._run(x, inverse=False)[1]
        return self._last[2]

    @override
    def forward_shape(self, shape: Any) -> Size:
        return self._shape(shape, inverse=False)

    @override
    def inverse_shape(self, shape: Any) -> Size:
        return self._shape(shape, inverse=True)

    @override
    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self._run(x, inverse=False)
        self._last = (x, y, log_det) if self._cache_size else None
        return y

    @override
    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self._run(y, inverse=True)
        self._last = (x, y, -log_det) if self._cache_size else None
        return x

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        batch, event = self._split(x.shape, inverse)
        run = self.layer.inverse_and_log_det if inverse else self.layer.forward_and_log_det
        y, log_det = run(x.reshape(-1, *event))
        if not isinstance(y, Tensor):
            raise TypeError(
                "AsTransform takes layers from a tensor to a tensor, and "
                f"{type(self.layer).__name__} returned {describe(y)}: put Merge behind."
            )
        return y.reshape(*batch, *y.shape[1:]), log_det.reshape(batch)

    def _split(self, shape: Size, inverse: bool) -> tuple[Size, Size]:
        event_dim = self._event_dims[inverse]
        if len(shape) < event_dim:
            raise ValueError(
                f"this AsTransform takes events of {event_dim} dimensions, got a shape of "
                f"{tuple(shape)}."
            )
        place = len(shape) - event_dim
        return Size(shape[:place]), Size(shape[place:])

    def _shape(self, shape: Any, inverse: bool) -> Size:
        batch, event = self._split(Size(shape), inverse)
        found = shapes_through(self.layer, (event,), None, 1, inverse)
        if found is None:
            raise ValueError(
                f"the shape that {type(self.layer).__name__} makes depends on values, so that it "
                "can't be told without them."
            )
        return batch + found[0]
