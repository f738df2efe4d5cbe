"""Causal sub-networks, ready for :class:`MaskedAutoregressive`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .._support.checks import describe


class MADE(nn.Module):
    r"""A perceptron of vectors, with weights masked so that it is causal.

    .. math:: f(x)_i \text{ depends on } x_1, \dots, x_{i - 1} \text{ and on the context}

    Each hidden unit sees the first so many values, as many units for each number as for any other;
    so a hidden layer should be as wide as there are values, or wider. A context enters the first
    hidden layer through weights without a mask. The last layer begins with zeros, where most maps
    are the identity.

    Args:
        channels: :math:`D`, how many values there are.
        parameters_per_value: :math:`P`, that of the map.
        hidden: Widths of the hidden layers, at least one.
        context: How many numbers the context has; None for none.
        activation: Makes what is between the layers; must treat each unit by itself.

    Shape:
        - Input: :math:`(N, D)`, and a context :math:`(N, K)`.
        - Output: :math:`(N, P\, D)`, in blocks: the first parameter of all values, then the second.

    Raises:
        ValueError: If a number is less than 1, or there is no hidden layer.
        TypeError: When called with a missing or a superfluous context.

    References:
        Germain et al., *MADE: Masked Autoencoder for Distribution Estimation* (2015), section 3,
        https://arxiv.org/abs/1502.03509.

    Example:
        >>> f = MADE(3, 2, hidden=(32, 32), context=5)
        >>> f(torch.randn(8, 3), torch.randn(8, 5)).shape
        torch.Size([8, 6])
    """

    def __init__(
        self,
        channels: int,
        parameters_per_value: int,
        hidden: Sequence[int] = (64, 64),
        *,
        context: int | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        numbers = {
            "channels": [channels],
            "parameters_per_value": [parameters_per_value],
            "hidden": list(hidden),
            "context": [] if context is None else [context],
        }
        for name, found in numbers.items():
            if (not found and name == "hidden") or min(found, default=1) < 1:
                raise ValueError(f"MADE takes {name} of at least 1, got {found}.")
        # How many values each unit sees; those that see none carry the context only.
        least = 1 if context is None and channels > 1 else 0
        sees = [torch.arange(channels) + 1]
        sees += [least + torch.arange(w) * (channels - least) // w for w in hidden]
        sees.append(torch.arange(channels).repeat(parameters_per_value))
        layers = [_MaskedLinear(before, after) for before, after in pairwise(sees)]
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(activation() for _ in hidden)
        self.from_context = None if context is None else nn.Linear(context, hidden[0], bias=False)

    @override
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_context(self, context)
        first, *others = self.layers
        x = first(x)
        if self.from_context is not None:
            x = x + self.from_context(context)
        for activation, layer in zip(self.activations, others, strict=True):
            x = layer(activation(x))
        return x


class _MaskedLinear(nn.Linear):
    """A linear layer from units that know so many values to such as may see so many."""

    knows: Tensor
    sees: Tensor

    def __init__(self, knows: Tensor, sees: Tensor) -> None:
        super().__init__(len(knows), len(sees))
        # Not the mask itself: reversible checkpointing keeps copies of buffers.
        self.register_buffer("knows", knows)
        self.register_buffer("sees", sees)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (self.knows <= self.sees[:, None]), self.bias)


class CausalTransformer(nn.Module):
    r"""A small transformer of tokens: parameters for each from the tokens before it.

    .. math:: f(x)_t \text{ depends on } x_1, \dots, x_{t - 1} \text{ and on the context}

    The sequence is shifted by one place, so that what attends to all tokens up to its own place has
    not yet seen the token there. Blocks are attention and a perceptron, each behind a LayerNorm;
    places are learned. The last layer begins with zeros, where most maps are the identity.

    Args:
        channels: :math:`C`, of a token.
        parameters_per_value: :math:`P`, that of the map.
        length: How many tokens there are at most.
        width: Of the blocks, a multiple of ``heads``.
        depth: How many blocks.
        heads: How many heads attention has.
        context: How many numbers the context has, added to all tokens through a linear layer;
            None for none.

    Shape:
        - Input: :math:`(N, T, C)`, and a context :math:`(N, K)`.
        - Output: :math:`(N, T, P\, C)`, in blocks as :class:`Coupling` has them.

    Raises:
        ValueError: If a number is less than 1, or ``width`` no multiple of ``heads``; when called
            on more tokens than ``length``.
        TypeError: When called with a missing or a superfluous context.

    References:
        Zhai et al., *Normalizing Flows are Capable Generative Models* (2024), section 2.2,
        https://arxiv.org/abs/2412.06329.

    Example:
        >>> f = CausalTransformer(3, 2, length=16)
        >>> layer = MaskedAutoregressive(f, Affine(), order="reversed")
        >>> y, log_det = layer.forward_and_log_det(torch.randn(8, 16, 3))
    """

    def __init__(
        self,
        channels: int,
        parameters_per_value: int,
        length: int,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        context: int | None = None,
    ) -> None:
        super().__init__()
        sizes = (channels, parameters_per_value, length, width, depth, heads, context or 1)
        if min(sizes) < 1:
            raise ValueError(f"CausalTransformer takes numbers of at least 1, got {sizes}.")
        if width % heads:
            raise ValueError(
                f"CausalTransformer takes a width that is a multiple of heads, got {width} and "
                f"{heads}."
            )
        self.embed = nn.Linear(channels, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.from_context = None if context is None else nn.Linear(context, width, bias=False)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, parameters_per_value * channels)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @override
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_context(self, context)
        count = x.shape[1]
        if count > len(self.places):
            raise ValueError(
                f"CausalTransformer takes {len(self.places)} tokens at most, got {count} (input "
                f"shape {tuple(x.shape)})."
            )
        # One place on: the first token's is empty, and the last token is seen by none.
        x = F.pad(self.embed(x[:, :-1]), (0, 0, 1, 0)) + self.places[:count]
        if self.from_context is not None:
            x = x + self.from_context(context)[:, None]
        result: Tensor = self.last(self.norm(self.blocks(x)))
        return result


class _Block(nn.Module):
    """Attention to this place and those before it, then a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, H, W)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


def _check_context(f: MADE | CausalTransformer, context: Tensor | None) -> None:
    expected = None if f.from_context is None else f.from_context.in_features
    if (context is None) is not (expected is None):
        raise TypeError(
            f"{type(f).__name__} was made with context={expected}, and got {describe(context)} as "
            "the context."
        )
