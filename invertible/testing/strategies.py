"""Hypothesis strategies for states: shapes, values, dtypes and memory formats.

Hypothesis fails a test that takes longer than its deadline of 200 ms, drawing left out. The checks
of a small layer take a tenth of that: :func:`~invertible.testing.inversecheck` runs small states on
one thread, since on a busy machine more only wait for one another. What else a test computes
profits from ``torch.set_num_threads(1)`` in ``conftest.py``; where that is not enough put
``@settings(deadline=None)`` on the test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

# Torch imports this, and sympy with it, when it is first asked for a gradient with grad_outputs.
# That takes 0.4 s: imported here, it is no part of the first test's time.
import torch.fx.experimental.symbolic_shapes
from hypothesis import strategies as st
from torch import Tensor

from .._support.checks import describe

__all__ = ["image_shapes", "pairs", "tensors"]

Shape = tuple[int, ...]


def image_shapes(
    *, rank: int = 2, multiple: int = 2, max_batch: int = 3
) -> st.SearchStrategy[Shape]:
    """Shapes :math:`(N, C, *)` with channels and sides that are multiples of a number.

    Args:
        rank: How many spatial dimensions.
        multiple: What channels and sides are multiples of; they are at most three times it.
        max_batch: Largest batch; the smallest is 1.

    Raises:
        ValueError: If an argument is out of range.
    """
    smallest = {"rank": (rank, 0), "multiple": (multiple, 1), "max_batch": (max_batch, 1)}
    for name, (value, least) in smallest.items():
        if value < least:
            raise ValueError(f"image_shapes takes {name} of at least {least}, got {value}.")
    sizes = st.integers(1, 3).map(lambda n: n * multiple)
    return st.tuples(st.integers(1, max_batch), *[sizes] * (1 + rank))


def tensors(
    shapes: st.SearchStrategy[Shape] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
) -> st.SearchStrategy[Tensor]:
    """Normally distributed tensors, scaled, in any memory format that the shape allows.

    Args:
        shapes: A strategy of shapes, :func:`image_shapes` by default.
        dtypes: The dtypes to draw from.

    Raises:
        TypeError: If ``shapes`` is no strategy, as ``st.just((2, 4, 8, 8))`` is, or ``dtypes`` no
            sequence of dtypes; when drawn, if ``shapes`` yields something else than shapes.

    Example:
        >>> from hypothesis import given
        >>> from invertible.testing import strategies
        >>> @given(strategies.tensors(dtypes=[torch.float32]))
        ... def test_inverse_undoes_forward(x):
        ...     layer = PixelUnshuffle(2)
        ...     assert torch.equal(layer.inverse(layer(x)), x)
        >>> test_inverse_undoes_forward()
    """
    return _tensors(_shapes("tensors", shapes, least=0), _dtypes("tensors", dtypes))


def pairs(
    shapes: st.SearchStrategy[Shape] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Pairs of tensors of one shape, dtype and memory format, as couplings take them.

    Args:
        shapes: A strategy of shapes of one stream, :func:`image_shapes` by default.
        dtypes: The dtypes to draw from.

    Raises:
        TypeError: As :func:`tensors` does.
        ValueError: When drawn, if a shape has no channels.
    """
    return _pairs(_shapes("pairs", shapes, least=2), _dtypes("pairs", dtypes))


@st.composite
def _pairs(
    draw: st.DrawFn, shapes: st.SearchStrategy[Shape], dtypes: st.SearchStrategy[torch.dtype]
) -> tuple[Tensor, Tensor]:
    n, c, *sides = draw(shapes)
    both = draw(_tensors(st.just((n, 2 * c, *sides)), dtypes))
    # Slices of one tensor, as Split makes them, or tensors of their own.
    x1, x2 = both[:, :c], both[:, c:]
    return (x1, x2) if draw(st.booleans()) else (x1.clone(), x2.clone())


@st.composite
def _tensors(
    draw: st.DrawFn, shapes: st.SearchStrategy[Shape], dtypes: st.SearchStrategy[torch.dtype]
) -> Tensor:
    shape = draw(shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-2, 2))
    x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x.to(draw(dtypes))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if len(shape) in formats and draw(st.booleans()):
        x = x.to(memory_format=formats[len(shape)])
    return x


def _shapes(name: str, shapes: Any, least: int) -> st.SearchStrategy[Shape]:
    """The strategy of shapes, each checked when it is drawn."""
    if shapes is None:
        return image_shapes()
    if not isinstance(shapes, st.SearchStrategy):
        hint = "Draw them with image_shapes(), or st.just(shape) for one."
        if isinstance(shapes, tuple | list):
            hint = f"For this one alone write st.just({tuple(shapes)})."
        elif callable(shapes):
            hint = "Call it."
        raise TypeError(f"{name} takes a strategy of shapes, got {describe(shapes)}. {hint}")

    def check(shape: Any) -> Shape:
        if not isinstance(shape, tuple | list) or not all(
            isinstance(size, int) and size >= 0 for size in shape
        ):
            raise TypeError(
                f"{name} takes a strategy of shapes, and it drew {shape!r}. A shape is a tuple of "
                "whole numbers: (N, C, *)."
            )
        if len(shape) < least:
            raise ValueError(
                f"{name} takes shapes of at least {least} dimensions, (N, C, *), and the strategy "
                f"drew {shape!r}."
            )
        return tuple(shape)

    return shapes.map(check)


def _dtypes(name: str, dtypes: Any) -> st.SearchStrategy[torch.dtype]:
    if (
        not isinstance(dtypes, Sequence)
        or not dtypes
        or not all(isinstance(dtype, torch.dtype) for dtype in dtypes)
    ):
        raise TypeError(
            f"{name} takes one or more dtypes as a list, for instance dtypes=[torch.float32], got "
            f"{dtypes!r}."
        )
    return st.sampled_from(dtypes)
