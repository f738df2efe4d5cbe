"""Flows of vectors, and how they are fitted: what tabular.py and posterior.py share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import invertible
from invertible import (
    MADE,
    ActNorm,
    Affine,
    Coupling,
    Flow,
    InvertibleLinear,
    InvertibleModule,
    InvertibleSequential,
    MaskedAutoregressive,
    Merge,
    RationalQuadraticSpline,
    Split,
    Swap,
)

Kind = Literal["spline-coupling", "maf", "spline-maf"]


class Network(nn.Module):
    """A perceptron of a stream and a context, whose last layer is zero: flows begin as ActNorm."""

    def __init__(self, channels: int, context: int, width: int, out: int) -> None:
        super().__init__()
        last = nn.Linear(width, out)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first, second = nn.Linear(channels + context, width), nn.Linear(width, width)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        result: Tensor = self.layers(x if context is None else torch.cat([x, context], 1))
        return result


def make_flow(kind: Kind, channels: int, context: int, depth: int, width: int, bins: int) -> Flow:
    """A flow of vectors, conditional if its context has numbers.

    Args:
        kind: Couplings by splines, or autoregressive layers with affine maps or splines.
        channels: How many numbers a vector has; couplings need two.
        context: How many numbers a context has, 0 for none.
        depth: How many steps.
        width: Of the hidden layers.
        bins: Of a spline.
    """
    bijection = Affine() if kind == "maf" else RationalQuadraticSpline(bins, bound=4.0)
    count, conditional = bijection.parameters_per_value, context > 0
    sizes = channels // 2, channels - channels // 2
    layers: list[InvertibleModule] = []
    for step in range(depth):
        layers.append(ActNorm(channels))
        if kind == "spline-coupling":
            layers += [InvertibleLinear(channels), Split(sizes)]
            for changed, seen in (sizes, sizes[::-1]):
                f = Network(seen, context, width, count * changed)
                layers += [Coupling(f, bijection, conditional=conditional), Swap()]
            layers.append(Merge(sizes))
        else:
            made = MADE(channels, count, (width, width), context=context or None)
            order: Any = "reversed" if step % 2 else "natural"
            layers.append(
                MaskedAutoregressive(made, bijection, order=order, conditional=conditional)
            )
    layers.append(ActNorm(channels))
    return Flow(InvertibleSequential(*layers), event_shape=(channels,))


Batch = tuple[Tensor, Tensor | None]


def fit(flow: Flow, draw: Callable[[], Batch], steps: int, lr: float) -> Iterator[int]:
    """Maximum likelihood by Adam; yields the number of each step behind it.

    The learning rate falls in half a cosine to 0, and gradients are clipped to a norm of 5.
    """
    flow.train()
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begin, every = time.perf_counter(), max(1, steps // 10)
    for step in range(1, steps + 1):
        loss = -flow.log_prob(*draw()).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            seconds = time.perf_counter() - begin
            print(f"step {step:6}/{steps}  loss {loss.item():8.4f}  {seconds:6.1f} s", flush=True)
        yield step
    flow.eval()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """A mean and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def write_record(out: Path, config: Any, seconds: float, **results: Any) -> None:
    """Writes ``record.json``: the settings, the versions, the results."""
    settings = {name: str(x) if isinstance(x, Path) else x for name, x in asdict(config).items()}
    versions = {"torch": torch.__version__, "invertible": invertible.__version__}
    record = {"config": settings, "versions": versions, "seconds": round(seconds, 1), **results}
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, value in results.items():
        print(f"{name}: {value}")
    print(f"Everything is in {out}.")
