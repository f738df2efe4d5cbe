"""Layers on the valid places of padded sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from .._support.checks import check_context, describe, expect_tensor, name_of, rank_for
from .._support.memory_format import memory_format
from ..composition.composite import Composite
from ..module import InvertibleModule, Member
from ..state import Context
from .mapping import expect_dim

# From a context to the mask in it.
Selector = Callable[[Any], Tensor]
Places = tuple[Tensor, ...]


class Masked(Composite):
    r"""Runs a layer on the valid places of padded sequences, and leaves the padding as it is.

    .. math:: y_p = \begin{cases} f(x)_p & \text{where } m_p \\ x_p & \text{elsewhere} \end{cases}
        \qquad \log |\det \partial y / \partial x|_n = \sum_{p \in n,\, m_p} \ell_p

    The context is the mask :math:`m`, or has it. The layer, any composition, is given the valid
    places alone, each as an example of its own with one place, :math:`(M, C, 1)` in place of
    :math:`(N, C, T)`; what it says of each place's log-determinant, :math:`\ell_p`, is summed over
    the places of a sequence. So layers that treat each place by itself need no mask:
    :class:`ActNorm`, whose first statistics are those of valid places, :class:`InvertibleLinear`,
    :class:`Permute`, elementwise maps, :class:`Split` and :class:`Merge` on channels. A coupling
    whose sub-network looks at other places is given ``Padded(f)``, and that calls ``f`` with
    the whole sequences. Without it, ``f`` sees each place alone. A :class:`Flow` needs a base that
    leaves the padding out, too: see :doc:`/howto/padding`.

    Wrap a whole network once, not each layer: with reversible checkpointing, memory is flat in what
    is inside, and each :class:`Masked` stores one state. How many places are valid depends on the
    values of the mask, which an accelerator is waited for, and which tensors on the meta device
    don't have.

    Args:
        layer: What is run, from a tensor to a tensor of the same shape.
        mask: A function that takes the mask out of the context, such as
            ``operator.itemgetter("mask")``; by default the context is the mask.
        dim: The dimension of the channels, not 0; -1 for tokens :math:`(N, T, C)`.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Mask: :math:`(N, *)`, of bools, True where a place is valid.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: If ``layer`` is not an :class:`InvertibleModule`; when called without a context,
            on anything but a tensor, or with a mask that is no tensor of bools.
        ValueError: If ``dim`` is 0; when called, if the mask has another shape, or the layer
            returns another shape than it took.

    References:
        Kim et al., *Glow-TTS* (2020), https://arxiv.org/abs/2005.11129, and Kim et al., *VITS*
        (2021), https://arxiv.org/abs/2106.06103, whose code masks each layer.

    Example:
        >>> x = torch.randn(2, 4, 5)
        >>> mask = torch.arange(5) < torch.tensor([[5], [3]])
        >>> layer = Masked(Sigmoid())
        >>> y, log_det = layer.forward_and_log_det(x, mask)
        >>> torch.equal(y[1, :, 3:], x[1, :, 3:])
        True
        >>> expected = Sigmoid().forward_and_log_det(x[1:, :, :3])[1]
        >>> torch.testing.assert_close(log_det[1:], expected)
    """

    def __init__(
        self, layer: InvertibleModule, mask: Selector | None = None, *, dim: int = 1
    ) -> None:
        super().__init__()
        if not isinstance(layer, InvertibleModule):
            raise TypeError(
                f"Masked takes an invertible layer, got {describe(layer)}. Around a sub-network "
                "of a coupling put Padded."
            )
        self.layer = layer
        self.mask = mask
        self.dim = expect_dim(self, dim)

    @property
    @override
    def conditional(self) -> bool:
        return True

    @property
    @override
    def requires_context(self) -> bool:
        return True

    @override
    def members(self) -> list[Member]:
        return [Member("layer", self.layer)]

    @override
    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    @override
    def forward(self, x: Tensor, context: Context = None) -> Tensor:
        places = self._places(x, context, inverse=False)
        y = super().forward(_gather(x, places, self.dim), self._for_layer(context))
        return self._scatter(x, places, y)

    @override
    def inverse(self, y: Tensor, context: Context = None) -> Tensor:
        places = self._places(y, context, inverse=True)
        x = super().inverse(_gather(y, places, self.dim), self._for_layer(context))
        return self._scatter(y, places, x, inverse=True)

    @override
    def forward_and_log_det(self, x: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        places = self._places(x, context, inverse=False)
        run = super().forward_and_log_det
        y, of_places = run(_gather(x, places, self.dim), self._for_layer(context))
        return self._scatter(x, places, y), _per_sequence(of_places, places, len(x))

    @override
    def inverse_and_log_det(self, y: Tensor, context: Context = None) -> tuple[Tensor, Tensor]:
        places = self._places(y, context, inverse=True)
        run = super().inverse_and_log_det
        x, of_places = run(_gather(y, places, self.dim), self._for_layer(context))
        return self._scatter(y, places, x, inverse=True), _per_sequence(of_places, places, len(y))

    def _places(self, x: Any, context: Context, inverse: bool) -> Places:
        check_context(self, context)
        x = expect_tensor(self, x, min_dim=rank_for(self.dim), inverse=inverse)
        mask = _mask_in(self, context, self.mask)
        expected = list(x.shape)
        del expected[self.dim]
        if list(mask.shape) != expected:
            raise ValueError(
                f"{name_of(self, inverse)} takes a mask of shape {tuple(expected)}, the input's "
                f"{tuple(x.shape)} without its channels (dimension {self.dim}), got "
                f"{tuple(mask.shape)}."
            )
        return mask.nonzero(as_tuple=True)

    def _for_layer(self, context: Context) -> Context:
        return context if self.layer.conditional else None

    def _scatter(self, x: Tensor, places: Places, y: Any, inverse: bool = False) -> Tensor:
        """A tensor with other values at some places."""
        expected = list(x.shape)
        expected[0] = len(places[0])
        for i in range(1, x.dim()):
            if i != self.dim % x.dim():
                expected[i] = 1
        if not isinstance(y, Tensor) or list(y.shape) != expected:
            raise ValueError(
                f"{name_of(self, inverse)} hands its layer ({type(self.layer).__name__}) valid "
                f"places of shape {tuple(expected)} and takes the same shape back, got "
                f"{describe(y)}. Put Merge behind Split, and layers that change shapes outside."
            )
        values = y.movedim(self.dim, -1).flatten(0, -2)
        result = x.movedim(self.dim, -1).index_put(places, values).movedim(-1, self.dim)
        return result.contiguous(memory_format=memory_format(x))


class Padded(nn.Module):
    r"""Calls a sub-network with padded sequences, where a coupling within :class:`Masked` calls it.

    There the coupling's streams are the valid places. They are put back to where they were, among
    zeros; of what ``f(x, context)`` returns, the valid places are taken. ``f`` knows from the mask
    in its context what is padding. If it has several convolutions, say, it has to set their results
    to zero there, so that a sequence is treated as it is by itself.

    Args:
        f: Any module that takes sequences and the context, and returns as many places.
        mask: As :class:`Masked` has it.
        dim: The dimension of the channels, as :class:`Masked` has it.

    Shape:
        - Input: :math:`(M, C, 1)`, with :math:`M` valid places in all, and the context.
        - Output: :math:`(M, C', 1)`.
        - ``f``: from :math:`(N, C, *)` and the context to :math:`(N, C', *)`.

    Raises:
        TypeError: If ``f`` is no module; when called with a mask that is no tensor of bools.
        ValueError: If ``dim`` is 0; when called, if there are not as many places as the mask has
            valid ones, or ``f`` returns other places.

    Example:
        >>> class Convolution(nn.Conv1d):
        ...     def forward(self, x, mask):
        ...         return super().forward(x)
        >>> f = Padded(Convolution(2, 4, kernel_size=3, padding=1))
        >>> coupling = AffineCoupling(f, conditional=True)
        >>> layer = Masked(InvertibleSequential(ActNorm(4), Split(dim=1), coupling, Merge(dim=1)))
        >>> mask = torch.arange(5) < torch.tensor([[5], [3]])
        >>> y, log_det = layer.forward_and_log_det(torch.randn(2, 4, 5), mask)
        >>> log_det.shape
        torch.Size([2])
    """

    def __init__(self, f: nn.Module, mask: Selector | None = None, *, dim: int = 1) -> None:
        super().__init__()
        if not isinstance(f, nn.Module):
            raise TypeError(f"Padded takes a torch.nn.Module, got {describe(f)}.")
        self.f = f
        self.mask = mask
        self.dim = expect_dim(self, dim)

    @override
    def extra_repr(self) -> str:
        return f"dim={self.dim}"

    @override
    def forward(self, x: Tensor, context: Context) -> Tensor:
        mask = _mask_in(self, context, self.mask)
        places = mask.nonzero(as_tuple=True)
        if x.dim() != mask.dim() + 1 or x.numel() != len(places[0]) * x.shape[self.dim]:
            raise ValueError(
                f"Padded takes the {len(places[0])} valid places of a mask of shape "
                f"{tuple(mask.shape)}, each as an example of its own, got {describe(x)}. Put "
                "Masked around the network that it is in."
            )
        values = x.movedim(self.dim, -1).flatten(0, -2)
        padded = x.new_zeros(*mask.shape, values.shape[1]).index_put(places, values)
        found = self.f(padded.movedim(-1, self.dim).contiguous(), context)
        return _gather(self._expect_places(found, mask), places, self.dim)

    def _expect_places(self, found: Any, mask: Tensor) -> Tensor:
        if not isinstance(found, Tensor) or found.movedim(self.dim, -1).shape[:-1] != mask.shape:
            raise ValueError(
                f"Padded's f ({type(self.f).__name__}) must return a tensor whose places are those "
                f"of the mask, {tuple(mask.shape)} without channels (dimension {self.dim}), got "
                f"{describe(found)}."
            )
        return found


def _mask_in(module: nn.Module, context: Context, select: Selector | None) -> Tensor:
    mask: Any = context if select is None else select(context)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        of = f" of {mask.dtype}" if isinstance(mask, Tensor) else ""
        raise TypeError(
            f"{type(module).__name__} takes a mask of bools, True where a place is valid, got "
            f"{describe(mask)}{of}. By default the context is the mask; mask= says how to take it "
            'from another, for instance operator.itemgetter("mask").'
        )
    return mask


def _gather(x: Tensor, places: Places, dim: int) -> Tensor:
    """Values at some places, each as an example with one place."""
    values = x.movedim(dim, -1)[places]
    for _ in range(x.dim() - 2):
        values = values.unsqueeze(1)
    return values.movedim(-1, dim)


def _per_sequence(of_places: Tensor, places: Places, count: int) -> Tensor:
    return of_places.new_zeros(count).index_add(0, places[0], of_places)
