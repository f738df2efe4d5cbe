"""The laws of a layer, checked in the manner of ``torch.autograd.gradcheck``."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from .._support.checks import check_context, describe
from ..module import InvertibleModule
from ..state import State
from .laws import LAWS
from .states import is_state
from .subject import InversecheckError, Subject


def inversecheck(
    layer: InvertibleModule,
    x: State,
    context: Any = None,
    *,
    y: State | None = None,
    tolerance: float | None = None,
    laws: Collection[str] | None = None,
    raise_exception: bool = True,
) -> bool:
    r"""Checks that a layer keeps the laws of :class:`invertible.InvertibleModule` at one input.

    The laws, by name:

    - ``state``: both directions return a tensor or a tuple of tensors.
    - ``dtype and device`` go through.
    - ``input untouched``: neither direction changes its argument or the context in place.
    - ``inverse undoes forward``, and for a bijective layer ``forward undoes inverse``, starting
      from ``y``.
    - ``memory format`` goes through.
    - ``no trace``: after ``inverse``, the buffers, the parameters, the modes and the random
      generators are what they were.
    - ``differentiable``: the gradient of ``inverse(forward(x))`` is that of the identity, within
      1e-6 in float64 and within 0.1 in other dtypes, where rounding flips the masks of ReLUs.
    - ``rebuilding``: :func:`invertible.reversible_checkpoint` gives the gradients of stored
      activations, in both directions, for the state and all parameters, as closely.
    - ``log-determinant``: it has the shape :math:`(N,)`, comes with the same output as
      ``forward`` does and agrees with the Jacobian that autograd gives, which is computed for
      states of at most 256 numbers. Passed over for a layer that defines none.

    The layer is checked in the mode that it is in; check twice for train and eval mode. Each
    evaluation starts from the same buffers and the same random state, so that a layer with
    dropout draws one mask. (A composition of several draws their masks in the other order when
    it is inverted: check it in eval mode.) Nothing is left behind, whatever the layer does:
    parameters, gradients, buffers, modes and generators are untouched.

    Args:
        layer: The layer to check.
        x: An input. Take float64 for tight tolerances, and a memory format other than the
            default to see it go through.
        context: What a conditional layer takes as its second argument.
        y: An output for ``forward undoes inverse``; by default the numbers of ``layer(x)``,
            shuffled.
        tolerance: Largest error allowed, relative to the largest magnitude in the states;
            ``eps ** (2/3)`` of the dtype by default: 4e-11 in float64, 2e-5 in float32.
        laws: Names of the laws to check; all by default.
        raise_exception: Whether a violation raises; otherwise it is returned.

    Returns:
        True when all laws hold, False when one is broken and ``raise_exception`` is False.

    Raises:
        InversecheckError: If a law is broken.
        TypeError: If ``layer`` is not an :class:`invertible.InvertibleModule`, or ``x`` or ``y``
            not a state.
        ValueError: If ``laws`` has an unknown name.

    Example:
        >>> layer = PixelUnshuffle(2)
        >>> from invertible.testing import inversecheck
        >>> inversecheck(layer, torch.randn(1, 3, 4, 4, dtype=torch.float64))
        True
    """
    names = LAWS if laws is None else [laws] if isinstance(laws, str) else laws
    unknown = set(names) - set(LAWS)
    if unknown:
        raise ValueError(f"inversecheck knows the laws {list(LAWS)}, got {sorted(unknown)}.")
    if not isinstance(layer, InvertibleModule):
        raise TypeError(
            f"inversecheck takes an invertible layer, got {describe(layer)}. Subclass "
            "InvertibleModule."
        )
    for state in (x,) if y is None else (x, y):
        if not is_state(state):
            raise TypeError(
                f"inversecheck takes a tensor or a tuple of tensors, got {describe(state)}."
            )
    check_context(layer, layer.conditional, context)
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002 - a layer may use it
    try:
        subject = Subject(layer, x, context, y, tolerance)
        for name in names:
            _check(subject, name)
    except InversecheckError:
        if raise_exception:
            raise
        return False
    finally:
        random.setstate(generators[0])
        np.random.set_state(generators[1])  # noqa: NPY002
    return True


def _check(subject: Subject, name: str) -> None:
    subject.law = name
    try:
        LAWS[name](subject)
    except (InversecheckError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hint = (
            " An inverse can't rely on what forward leaves in attributes: they are put back."
            if isinstance(error, AttributeError)
            else ""
        )
        subject.fail(f"it raised {type(error).__name__}: {error}{hint}", cause=error)
