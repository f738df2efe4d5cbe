"""Hypothesis strategies for states: shapes, values, dtypes and memory formats."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["image_shapes", "pairs", "tensors"]


@st.composite
def image_shapes(
    draw: st.DrawFn, *, rank: int = 2, multiple: int = 2, max_batch: int = 3
) -> tuple[int, ...]:
    """Shapes :math:`(N, C, *)` with channels and sides that are multiples of a number.

    Args:
        draw: Given by Hypothesis.
        rank: How many spatial dimensions.
        multiple: What channels and sides are multiples of; they are at most three times it.
        max_batch: Largest batch; the smallest is 1.
    """
    sizes = st.integers(1, 3).map(lambda n: n * multiple)
    return (draw(st.integers(1, max_batch)), *(draw(sizes) for _ in range(1 + rank)))


@st.composite
def tensors(
    draw: st.DrawFn,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
) -> Tensor:
    """Normally distributed tensors, scaled, in any memory format that the shape allows.

    Args:
        draw: Given by Hypothesis.
        shapes: A strategy of shapes, :func:`image_shapes` by default.
        dtypes: The dtypes to draw from.

    Example:
        >>> from hypothesis import given
        >>> from invertible.testing import strategies
        >>> @given(strategies.tensors(dtypes=[torch.float32]))
        ... def test_inverse_undoes_forward(x):
        ...     layer = PixelUnshuffle(2)
        ...     assert torch.equal(layer.inverse(layer(x)), x)
        >>> test_inverse_undoes_forward()
    """
    return _tensor(draw, draw(image_shapes() if shapes is None else shapes), dtypes)


@st.composite
def pairs(
    draw: st.DrawFn,
    shapes: st.SearchStrategy[tuple[int, ...]] | None = None,
    *,
    dtypes: Sequence[torch.dtype] = (torch.float64,),
) -> tuple[Tensor, Tensor]:
    """Pairs of tensors of one shape, dtype and memory format, as couplings take them.

    Args:
        draw: Given by Hypothesis.
        shapes: A strategy of shapes of one stream, :func:`image_shapes` by default.
        dtypes: The dtypes to draw from.
    """
    n, c, *sides = draw(image_shapes() if shapes is None else shapes)
    both = _tensor(draw, (n, 2 * c, *sides), dtypes)
    # Slices of one tensor, as Split makes them, or tensors of their own.
    x1, x2 = both.chunk(2, dim=1)
    return (x1, x2) if draw(st.booleans()) else (x1.clone(), x2.clone())


def _tensor(draw: st.DrawFn, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-2, 2))
    x = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x.to(draw(st.sampled_from(list(dtypes))))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if len(shape) in formats and draw(st.booleans()):
        x = x.to(memory_format=formats[len(shape)])
    return x
