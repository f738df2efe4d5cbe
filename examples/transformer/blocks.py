"""Transformers of two kinds with the same parameters: reversible blocks, and ordinary ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from invertible import InvertibleSequential, ReversibleBlock, measure_memory


class Attention(nn.Module):
    """Self-attention behind a norm; of tokens ``(N, T, D)``."""

    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise SystemExit(f"error: --width {width} is not a multiple of --heads {heads}.")
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.causal, self.dropout = heads, causal, dropout

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.project(self.norm(x)).view(n, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        chance = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=chance, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(n, t, d))


class FeedForward(nn.Sequential):
    """Two layers behind a norm, four times as wide between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )


class Ordinary(nn.Module):
    """The residual blocks that everybody knows; activations are stored."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + part(x)
        return x


class Reversible(nn.Module):
    """The same parts as couplings: attention changes one stream, the other network the other.

    Both streams have the full width and begin as the tokens, as in the Reformer (Kitaev et al.,
    2020, section 3); in the end they are averaged.
    """

    def __init__(self, parts: list[nn.Module], checkpoint: bool) -> None:
        super().__init__()
        blocks = (ReversibleBlock(f, g) for f, g in zip(parts[::2], parts[1::2], strict=True))
        self.blocks = InvertibleSequential(*blocks, checkpoint=checkpoint)

    def forward(self, x: Tensor) -> Tensor:
        y1, y2 = self.blocks((x, x))
        return (y1 + y2) / 2


def transformer(
    layers: int,
    width: int,
    heads: int,
    *,
    causal: bool,
    dropout: float = 0.0,
    reversible: bool = True,
    checkpoint: bool = True,
) -> nn.Module:
    """A stack of blocks from tokens ``(N, T, D)`` to such, with GPT-2's initial weights."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [Attention(width, heads, causal, dropout), FeedForward(width, dropout)]
    for part in parts:
        for name, parameter in part.named_parameters():
            if name.endswith("weight") and parameter.dim() == 2:
                last = name in ("out.weight", "4.weight")  # of a residual branch
                nn.init.normal_(parameter, std=0.02 / ((2 * layers) ** 0.5 if last else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
    return Reversible(parts, checkpoint) if reversible else Ordinary(parts)


def memory_by_depth(
    make: Callable[[int], nn.Module], depths: Sequence[int], x: Tensor
) -> dict[str, list[float]]:
    """MiB held between forward and backward, stored and rebuilt, of networks of some depths."""
    found = [measure_memory(make(depth), x) for depth in depths]
    return {
        "layers": list(depths),
        "stored": [memory.stored.held / 2**20 for memory in found],
        "rebuilt": [memory.as_set.held / 2**20 for memory in found],
    }


def optimizer_for(network: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [p for p in network.parameters() if p.dim() >= 2]
    others = [p for p in network.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
