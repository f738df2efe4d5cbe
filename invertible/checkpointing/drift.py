"""How far rebuilt states are from the true ones."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ..state import map_streams, tensors
from .frame import Frame
from .norms import Call, NormWatch, count_spoiled, near_constant

_current: ContextVar[Drift | None] = ContextVar("drift", default=None)


class LayerDrift(NamedTuple):
    """One row of a :class:`Drift`: a layer, and the error of its rebuilt input."""

    layer: str
    error: float


class NearConstant(NamedTuple):
    """One entry of :attr:`Drift.near_constants`: a normalization, and how many channels it is."""

    layer: str
    norm: str
    channels: int


class Drift:
    r"""The relative errors that :func:`measure_drift` found; printed, it is a table.

    An error is :math:`\lVert \hat x - x \rVert / \lVert x \rVert` over the whole input state of a
    layer, all streams and examples together.
    """

    def __init__(self) -> None:
        self._true: dict[Frame, Any] = {}
        self._errors: dict[Frame, Tensor] = {}
        self._watch = NormWatch()
        self._norms: dict[Frame, list[Call]] = {}
        self._spoiled: dict[Frame, dict[str, int]] = {}

    def remember(self, frame: Frame, x: Any) -> None:
        """Stores the state that enters a layer, and watches its normalizations."""
        self._true[frame] = map_streams(Tensor.detach, x)
        survey = frame.step.survey
        if survey is not None and not survey.may_be_compiled:  # hooks would be compiled as well
            self._watch.follow(frame.step.layer)

    def ran(self, frame: Frame) -> None:
        """Stores what the normalizations of a layer were given, if it is nearly constant."""
        self._norms[frame] = near_constant(self._watch.take())

    def measure(self, frame: Frame, rebuilt: Any) -> None:
        """Compares the rebuilt state with the true one."""
        found, true = (
            torch.cat([_real(x).flatten().double() for x in tensors(state)])
            for state in (rebuilt, self._true[frame])
        )
        self._errors[frame] = (found - true).norm() / true.norm().clamp_min(1e-300)
        names = {part: name for name, part in frame.step.layer.named_modules()}
        spoiled = count_spoiled(self._norms.get(frame, []), self._watch.take())
        self._spoiled[frame] = {
            f"{names[norm]} ({type(norm).__name__})": count for norm, count in spoiled.items()
        }

    def end(self) -> None:
        """Stops watching."""
        self._watch.end()

    @property
    def rows(self) -> list[LayerDrift]:
        """One row for each layer whose input was rebuilt, in the order in which they ran."""
        return [
            LayerDrift(frame.step.place, self._errors[frame].item())
            for frame in self._true
            if frame in self._errors
        ]

    @property
    def worst(self) -> LayerDrift | None:
        """The row with the largest error (NaN counts as largest), or None without rows."""
        rows = self.rows
        return max(rows, key=lambda row: (row.error != row.error, row.error), default=None)

    @property
    def near_constants(self) -> list[NearConstant]:
        """Normalizations of nearly constant channels that came back with rounding errors.

        Nearly constant is a channel whose variance is below ``eps``. BatchNorm and its like
        multiply the errors by up to 300, and a ReLU behind them may be on the other side of its
        kink: then gradients are wrong by as much as they are long, however small the drift.
        Channels that came back bit for bit do no harm and are not named. Where a norm looks at each
        example by itself, as :class:`torch.nn.GroupNorm` does, each group of each example counts as
        a channel. Compiled sub-networks are not looked into.
        """
        return [
            NearConstant(frame.step.place, norm, count)
            for frame in self._true
            for norm, count in self._spoiled.get(frame, {}).items()
            if count
        ]

    @override
    def __str__(self) -> str:
        rows = self.rows
        width = max((len(row.layer) for row in rows), default=0)
        lines = [f"{row.layer:<{width}}  {row.error:.2e}" for row in rows]
        lines += [
            f"{row.layer}: {row.norm} has {row.channels} nearly constant channels"
            for row in self.near_constants
        ]
        return "\n".join([f"{'rebuilt input of':<{width}}  relative error", *lines])


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@contextmanager
def measure_drift(bound: float = 1e-3) -> Iterator[Drift]:
    r"""Measures how far reversible checkpointing's rebuilt states are from the true ones.

    Inversion rounds, and rounding errors grow from layer to layer. Run a training step,
    forward and backward, in this context: the true states are stored for that run and compared
    with those that the backward pass rebuilds. Memory is then that of the stored states,
    gradients are unchanged. Where the drift is too large: let the state be float64, set
    ``anchor_every``, or look for the layer where it jumps, often batch statistics of a channel
    that is nearly constant. Such channels are named by themselves: they spoil gradients where no
    drift is seen.

    Args:
        bound: Relative error above which a warning is given at the end.

    Yields:
        A :class:`Drift`, complete once the backward pass is done.

    Warns:
        RuntimeWarning: At the end, if a layer's relative error exceeds ``bound``; and if the input
            of a normalization is nearly constant, see :attr:`Drift.near_constants`.

    References:
        Behrmann et al., *Understanding and Mitigating Exploding Inverses in Invertible Neural
        Networks* (2021), https://arxiv.org/abs/2006.09347.

    Example:
        >>> block = [AdditiveCoupling(nn.Linear(2, 2)), Swap()]
        >>> network = InvertibleSequential(Split(), *(2 * block), checkpoint=True)
        >>> with measure_drift() as drift:
        ...     y1, y2 = network(torch.randn(8, 4))
        ...     (y1 * y2).sum().backward()
        >>> drift.worst.error < 1e-5
        True
    """
    drift = Drift()
    token = _current.set(drift)
    try:
        yield drift
    finally:
        _current.reset(token)
        drift.end()
    worst = drift.worst
    if worst and not worst.error <= bound:
        warnings.warn(
            f"the rebuilt input of {worst.layer} is off by {worst.error:.2e} of its norm, more "
            f"than {bound:g}: gradients are wrong by as much or more. Use a float64 state or "
            "anchor_every, and print the drift to see where it grows.",
            RuntimeWarning,
            stacklevel=3,
        )
    found = drift.near_constants
    if found:
        layer, norm, channels = found[0]
        more = f" ({len(found) - 1} more of the kind)" if found[1:] else ""
        warnings.warn(
            f"{norm} in {layer} normalizes {channels} channels that are nearly constant and come "
            f"back with rounding errors{more}. It multiplies these by up to 300, and with a ReLU "
            "behind it gradients can be wrong by as much as they are long. Give the couplings a "
            "quantum, which leaves no errors, or store the states with anchor_every=1.",
            RuntimeWarning,
            stacklevel=3,
        )


def current_drift() -> Drift | None:
    """The drift that is being measured, if any."""
    return _current.get()
