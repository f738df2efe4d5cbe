"""Channels in another order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from typing_extensions import override

from .._support.checks import expect_tensor, name_of, rank_for
from .._support.memory_format import memory_format
from ..module import InvertibleModule


class Permute(InvertibleModule):
    r"""Puts channels in another order, fixed or random.

    .. math:: y_{n, c, *} = x_{n, \pi(c), *}

    Args:
        permutation: :math:`\pi`, the numbers 0 to :math:`C - 1` in some order. It is kept as a
            buffer, so that a saved network finds its order again.
        dim: Dimension that is permuted, not 0; counted from the end if negative.

    Shape:
        - Input: :math:`(N, C, *)`.
        - Output: :math:`(N, C, *)`.

    Raises:
        TypeError: When called on anything but a tensor.
        ValueError: If ``permutation`` is none, or ``dim`` is 0; when called, if the tensor has
            another number of channels.

    Example:
        >>> Permute([2, 0, 1])(torch.tensor([[10, 11, 12]]))
        tensor([[12, 10, 11]])
    """

    volume_preserving = True
    moves_only = True
    permutation: Tensor

    def __init__(self, permutation: Sequence[int], dim: int = 1) -> None:
        super().__init__()
        if isinstance(permutation, int):
            raise TypeError(
                f"Permute takes an order, as Permute([2, 0, 1]) does, got {permutation}. For a "
                f"random one use Permute.random({permutation}, seed=0)."
            )
        given = list(permutation)
        order = [int(c) for c in given]
        if not order or order != given or sorted(order) != list(range(len(order))):
            raise ValueError(
                f"Permute takes the numbers 0 to C - 1 in some order, got {given}. For a random "
                "order use Permute.random(channels, seed=0)."
            )
        if dim == 0:
            raise ValueError("Permute cannot take dim=0, the batch; channels are dim=1.")
        self.register_buffer("permutation", torch.tensor(order))
        self.dim = dim

    @classmethod
    def random(cls, channels: int, *, seed: int | None = None, dim: int = 1) -> Permute:
        """A permutation drawn uniformly.

        Args:
            channels: :math:`C`, at least 1.
            seed: Seed of a generator of its own, which leaves torch's alone; None draws from
                torch's, which ``torch.manual_seed`` seeds.
            dim: Dimension that is permuted.
        """
        if channels < 1:
            raise ValueError(f"Permute.random takes channels of at least 1, got {channels}.")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        with _disable_current_modes():  # a fake tensor has no values
            order = torch.randperm(channels, generator=generator, device="cpu").tolist()
        return cls(order, dim)

    @override
    def extra_repr(self) -> str:
        return f"channels={len(self.permutation)}, dim={self.dim}"

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self._select(x, self.permutation)

    @override
    def inverse(self, y: Tensor) -> Tensor:
        return self._select(y, self.permutation.argsort(), inverse=True)

    def _select(self, x: Tensor, order: Tensor, inverse: bool = False) -> Tensor:
        x = expect_tensor(self, x, min_dim=rank_for(self.dim), inverse=inverse)
        if x.shape[self.dim] != len(order):
            raise ValueError(
                f"{name_of(self, inverse)} orders {len(order)} channels along dimension "
                f"{self.dim}, got {x.shape[self.dim]} (input shape {tuple(x.shape)}). Give it an "
                "order of that many."
            )
        y = x.index_select(self.dim, order)
        # index_select returns the default memory format, whatever came.
        return y.contiguous(memory_format=memory_format(x))
