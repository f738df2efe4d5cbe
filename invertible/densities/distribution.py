"""What a flow returns when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints
from typing_extensions import override

from .._support.checks import describe
from ..state import Context
from .contexts import count_examples, repeated

if TYPE_CHECKING:
    from .flow import Flow


class FlowDistribution(Distribution):
    """The distribution of data under a :class:`Flow`, given a context if that takes one.

    Its ``batch_shape`` is that of the context, ``(B,)``, and empty without one. All that
    :class:`torch.distributions.Distribution` does in terms of samples and densities works;
    moments are not known. Arguments are not validated.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, as torch has it

    def __init__(self, flow: Flow, context: Context) -> None:
        self.flow = flow
        self.context = context
        count = count_examples(context)
        batch_shape = Size() if count is None else Size([count])
        super().__init__(batch_shape, flow.event_shape, validate_args=False)

    @override
    def __repr__(self) -> str:
        return f"FlowDistribution(batch {(*self.batch_shape,)}, event {(*self.event_shape,)})"

    @property
    @override
    def support(self) -> constraints.Constraint:
        """All tensors of the event's shape; of layers that map to less, this tells too much."""
        return constraints.independent(constraints.real, len(self.event_shape))  # type: ignore[no-untyped-call]

    @property
    @override
    def has_rsample(self) -> bool:  # type: ignore[override]
        """As :meth:`Flow.has_rsample`."""
        return self.flow.has_rsample(self.context)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        """The logarithm of the density.

        Shape:
            - Input: ``(*, *batch, *event)``, or what can be broadcast to it, as of all
              distributions of torch: one value for each context, or one for all of them.
            - Output: ``(*, *batch)``.
        """
        batch = self._batch_with(value)
        single = self.batch_shape.numel() == 1
        context = self.context if single else repeated(self.context, batch[:-1].numel())
        value = value.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        return self.flow.log_prob(value, context).reshape(batch)

    def _batch_with(self, value: Tensor) -> Size:
        """The shape of the densities of some values."""
        place = value.dim() - len(self.event_shape)
        if value.shape[place:] == self.event_shape:
            with suppress(RuntimeError):
                batch = torch.broadcast_shapes(value.shape[:place], self.batch_shape)  # type: ignore[no-untyped-call]
                return Size(batch)
        sizes = ", ".join(map(str, (*self.batch_shape, *self.event_shape)))
        raise ValueError(
            f"FlowDistribution takes values of shape (*, {sizes}), got {describe(value)}."
        )

    @override
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws examples."""
        x: Tensor = self.flow.sample(sample_shape, self.context)
        return x

    @override
    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws examples with gradients."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """As :meth:`Flow.rsample_and_log_prob`."""
        return self.flow.rsample_and_log_prob(sample_shape, self.context)
