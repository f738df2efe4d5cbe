"""The laws of a layer, checked in the manner of ``torch.autograd.gradcheck``."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .._support.checks import check_context, describe
from ..module import InvertibleModule
from ..state import Context, State, tensors
from .laws import LAWS
from .states import is_state
from .subject import InversecheckError, Subject


def inversecheck(
    layer: InvertibleModule,
    x: State,
    context: Context = None,
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
    - ``input untouched``: neither direction writes into its argument or the context, with grad
      or without.
    - ``inverse undoes forward``, also with a zero in ``x`` if its numbers are of both signs, and in
      a copy of the layer that never ran forward.
    - ``forward undoes inverse``, starting from ``y``, for a bijective layer.
    - ``exact on the grid``: a layer that is :attr:`~invertible.InvertibleModule.exact` keeps the
      grid in both directions, and undoes them bit for bit.
    - ``memory format`` goes through, and the other one, or a slice such as
      :class:`~invertible.Split` makes, leads to the same numbers and back.
    - ``no trace``: after ``inverse``, the buffers, the parameters and their gradients, the modes,
      the attributes of invertible layers, and torch's, Python's and NumPy's random generators
      are what they were.
      ``forward`` keeps no activation with its graph in an attribute of a layer, and no other mode.
    - ``differentiable``: the gradients of ``inverse(forward(x))`` and, for a bijective layer, of
      ``forward(inverse(y))`` are those of the identity: none for parameters and context. Within
      1e-6 in float64 and within 0.1 in other dtypes, where rounding flips the masks of ReLUs.
    - ``derivative``: the gradients of ``forward`` are what finite differences say, for the state,
      all parameters and the context. Looked at in float64, to which a copy of the layer is cast.
    - ``log-determinant``: it has the shape :math:`(N,)`, comes with the same output as
      ``forward`` does, is minus that of the inverse, has gradients that finite differences
      confirm, and agrees with the Jacobian that autograd gives. That is computed for at most
      1024 numbers: in an example, or in the batch where examples depend on each other. For more,
      in float64, that of ``forward`` is estimated by stochastic Lanczos quadrature, which sees
      errors of some per cent: a factor, a sign, a term that is missing. Passed over for a layer
      that defines none.
    - ``batch size``: a few examples, half of them and one more lead to the same numbers and back.
      Passed over where examples depend on each other, as behind BatchNorm in train mode.
    - ``rebuilding``: with ``InvertibleSequential(layer, checkpoint=True)`` all four methods give
      the gradients of stored activations, for the state, all parameters and the context, as
      closely.

    The layer is checked in the mode that it is in; check twice for train and eval mode. Each
    evaluation starts from the same buffers, the same attributes and the same random state, so
    that a layer with dropout draws one mask. (A composition of several draws their masks in the
    other order when it is inverted: check it in eval mode.) Where a layer draws, or rounds to a
    quantum, other layouts and batch sizes are only led there and back. Nothing is left behind,
    whatever the layer does: parameters, gradients, buffers, attributes, modes and generators are
    untouched.

    What is seen depends on the input: large numbers, a batch of several, four dimensions, odd
    sizes. Not seen are errors below the tolerance, which leaves room for inverses by iteration:
    give a smaller one for a closed form. Nor are examples that depend on each other, where both
    directions do so alike. A layer that changes gradients on purpose, to scale them or to stop
    them, breaks ``differentiable`` or ``derivative`` by intent: leave that law out. Small states
    are run on one thread, which takes no longer on a busy machine.

    Args:
        layer: The layer to check.
        x: An input, float64 for tight tolerances. If the layer has a quantum, the numbers are
            rounded to its grid first, and so are those of ``y``.
        context: What a conditional layer takes as its second argument. Floating-point tensors in
            it, also within tuples, lists and dicts, are checked for gradients.
        y: An output for ``forward undoes inverse``; by default the numbers of ``layer(x)``,
            shuffled.
        tolerance: Largest error allowed, relative to the largest magnitude in the states;
            ``eps ** (2/3)`` of the dtype by default: 4e-11 in float64, 2e-5 in float32.
        laws: Names of the laws to check; all by default.
        raise_exception: Whether a violation raises; otherwise it is returned.

    Returns:
        True when all laws hold, False when one is broken and ``raise_exception`` is False.

    Raises:
        InversecheckError: If a law is broken, or if the layer raises an error, which is then the
            cause of this one.
        TypeError: If ``layer`` is not an :class:`invertible.InvertibleModule`, or ``x`` or ``y``
            not a state; if the context is missing, or nothing would use it.
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
    check_context(layer, context)
    generators = random.getstate(), np.random.get_state()  # noqa: NPY002 - a layer may use it
    try:
        with _few_threads(x):
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


# Below so many numbers several threads win nothing. On a busy machine they wait for one another:
# checks that take 0.3 s on one thread took 2 to 11 s on eight, on two cores with a load of nine.
WORTH_THREADS = 2**16


@contextmanager
def _few_threads(x: State) -> Iterator[None]:
    """One thread for small states."""
    count = torch.get_num_threads()
    if count == 1 or sum(part.numel() for part in tensors(x)) >= WORTH_THREADS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


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
