"""Density estimation of vectors: spline couplings and autoregressive flows.

For instance::

    python examples/densities/tabular.py --out runs/mixture
    python examples/densities/tabular.py --out runs/rings --data rings --flow spline-maf
    python examples/densities/tabular.py --out runs/table --data table.csv --condition-on age sex

Without a file, a density of two numbers whose normaliser is known, so that the Kullback-Leibler
divergence from it is known too. The columns of a table are brought to mean 0 and deviation 1; the
likelihood is that of the table's own units. The weights kept are the best on a tenth of the rows
that is not trained on; the results are of another tenth.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from densities_2d import DENSITIES
from invertible import Flow
from vectors import Batch, Kind, fit, make_flow, mean_and_error, write_record


@dataclass(frozen=True)
class Config:
    """Density estimation of vectors: spline couplings and autoregressive flows."""

    out: Path  # Folder of record.json and the pictures
    # A density (mixture, rings, banana, checkerboard), or a table: a .csv with names of its columns
    # in the first line, or a .parquet
    data: str = "mixture"
    condition_on: tuple[str, ...] = ()  # Columns that are given, in place of being modelled
    flow: Kind = "spline-coupling"
    depth: int = 4  # Steps of the flow
    width: int = 64  # Of its networks
    bins: int = 8  # Of its splines
    steps: int = 1500  # Of training
    batch_size: int = 512
    lr: float = 2e-3  # Learning rate of Adam, falling to 0
    points: int = 50_000  # How many are drawn from a density, to train and to test
    seed: int = 0


@dataclass(frozen=True)
class Data:
    """Rows in standard units, and what they were in their own."""

    names: list[str]  # of the columns that are modelled
    parts: dict[Literal["train", "valid", "test"], Batch]
    mean: Tensor
    std: Tensor
    truth: Tensor | None = None  # the log-density of each test row, in its own units

    def own_units(self, x: Tensor) -> Tensor:
        return x * self.std + self.mean


def read_table(path: Path) -> tuple[list[str], Tensor]:
    """The names of the columns and the rows, numbers in float32."""
    if not path.exists():
        raise SystemExit(
            f"error: --data {path} is no file and none of the densities {', '.join(DENSITIES)}."
        )
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = parquet.read_table(path)
        names = table.column_names
        columns = [np.asarray(table.column(name), dtype=np.float64) for name in names]
        values = np.stack(columns, 1)
    else:
        with path.open() as file:
            names = [name.strip().strip('"') for name in file.readline().split(",")]
        values = np.genfromtxt(path, delimiter=",", skip_header=1, ndmin=2)
    if not np.isfinite(values).all():
        bad = [
            n for n, column in zip(names, values.T, strict=True) if not np.isfinite(column).all()
        ]
        raise SystemExit(f"error: {path} has missing values or no numbers in {', '.join(bad)}.")
    return names, torch.as_tensor(values, dtype=torch.float32)


def read_data(config: Config) -> Data:
    """Rows, shuffled and split: 80 % to train, and two tenths."""
    generator = torch.Generator().manual_seed(config.seed)
    truth = None
    if config.data in DENSITIES:
        names = ["x", "y"]
        rows = DENSITIES[config.data].sample(config.points, generator)
    else:
        names, rows = read_table(Path(config.data))
    unknown = set(config.condition_on) - set(names)
    if unknown:
        raise SystemExit(f"error: no column {', '.join(unknown)} in {', '.join(names)}.")
    rows = rows[torch.randperm(len(rows), generator=generator)]
    tenth = len(rows) // 10
    if tenth < 2:
        raise SystemExit(f"error: {len(rows)} rows are too few, at least 20 are needed.")
    if config.data in DENSITIES and not config.condition_on:
        truth = DENSITIES[config.data].log_prob(rows[-tenth:])
    mean, std = rows[: -2 * tenth].mean(0), rows[: -2 * tenth].std(0)
    if not (std > 0).all():
        raise SystemExit("error: a column is constant, and has no density.")
    rows = (rows - mean) / std
    given = [i for i, name in enumerate(names) if name in config.condition_on]
    modelled = [i for i in range(len(names)) if i not in given]
    if len(modelled) < 1 + (config.flow == "spline-coupling"):
        raise SystemExit("error: too few columns are left to be modelled: try --flow spline-maf.")

    def part(rows: Tensor) -> Batch:
        return rows[:, modelled], rows[:, given] if given else None

    return Data(
        [names[i] for i in modelled],
        {
            "train": part(rows[: -2 * tenth]),
            "valid": part(rows[-2 * tenth : -tenth]),
            "test": part(rows[-tenth:]),
        },
        mean[modelled],
        std[modelled],
        truth,
    )


@torch.no_grad()
def log_likelihoods(flow: Flow, batch: Batch) -> Tensor:
    """Of each row, in standard units; in pieces."""
    x, context = batch
    contexts = [None] * len(x) if context is None else context.split(4096)
    flow.eval()
    found = [flow.log_prob(*piece) for piece in zip(x.split(4096), contexts, strict=False)]
    flow.train()
    return torch.cat(found)


def train(flow: Flow, data: Data, config: Config) -> None:
    """Fits the flow, and leaves it with the weights that were best on the validation rows."""
    x, context = data.parts["train"]

    def draw() -> Batch:
        rows = torch.randint(len(x), (config.batch_size,))
        return x[rows], None if context is None else context[rows]

    best, weights = -math.inf, flow.state_dict()
    for step in fit(flow, draw, config.steps, config.lr):
        if step % max(1, config.steps // 20) == 0 or step == config.steps:
            found = log_likelihoods(flow, data.parts["valid"]).mean().item()
            if found > best:
                best, weights = found, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(weights)
    flow.eval()


def draw_density(flow: Flow, data: Data, config: Config) -> None:
    """The true density, what it was learned from, and what was learned."""
    x = data.own_units(data.parts["test"][0])
    least, most = x.amin(0), x.amax(0)
    centre, half = (least + most) / 2, 0.55 * (most - least).max()
    grid = torch.cartesian_prod(*[torch.linspace(-half, half, 200)] * 2) + centre
    standard = (grid - data.mean) / data.std
    learned = log_likelihoods(flow, (standard, None)) - data.std.log().sum()
    fields = {"truth": DENSITIES[config.data].log_prob(grid), config.flow: learned}
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    (left, right), (low, high) = (((c - half).item(), (c + half).item()) for c in centre)
    peak = fields["truth"].exp().max().item()
    shown = dict(zip(axes[::2], fields.items(), strict=True))
    for ax, (name, values) in shown.items():
        picture = values.exp().view(200, 200).T.numpy()
        extent = (left, right, low, high)
        ax.imshow(picture, origin="lower", extent=extent, vmin=0, vmax=peak, cmap="magma")
        ax.set_title(name)
    axes[1].scatter(*x[:2000].T.numpy(), s=1, color="black", linewidths=0)
    axes[1].set(title="test points", xlim=(left, right), ylim=(low, high), aspect="equal")
    figure.savefig(config.out / "density.png", dpi=150)


def draw_samples(flow: Flow, data: Data, config: Config) -> None:
    """Pairs of the first columns: test rows, and samples given what these are conditioned on."""
    x, context = data.parts["test"]
    x, context = x[:1000], None if context is None else context[:1000]
    drawn = flow.sample((len(x),) if context is None else (), context)
    rows = [data.own_units(each).numpy() for each in (x, drawn)]
    count = min(4, len(data.names))
    figure = Figure(figsize=(2.2 * count, 2.2 * count), layout="constrained")
    axes = figure.subplots(count, count, squeeze=False)
    for i in range(count):
        for j in range(count):
            ax = axes[i, j]
            if i == j:
                both = [part[:, i] for part in rows]
                ax.hist(both, bins=30, density=True, histtype="step", color=["C0", "C1"])
                ax.set_xlabel(data.names[i])
                ax.set_yticks([])
            elif i > j:
                for part in rows:
                    ax.scatter(part[:, j], part[:, i], s=2, alpha=0.5, linewidths=0)
                ax.set(xlabel=data.names[j], ylabel=data.names[i])
            else:
                ax.axis("off")
    figure.suptitle("test rows blue, samples orange", fontsize=8)
    figure.savefig(config.out / "samples.png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits a flow, measures it on the test rows, and draws it."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    begin = time.perf_counter()
    torch.manual_seed(config.seed)
    data = read_data(config)
    context = data.parts["train"][1]
    sizes = len(data.names), 0 if context is None else context.shape[1]
    flow = make_flow(config.flow, *sizes, config.depth, config.width, config.bins)
    config.out.mkdir(parents=True, exist_ok=True)
    train(flow, data, config)
    found = log_likelihoods(flow, data.parts["test"]) - data.std.log().sum()
    results: dict[str, float] = {}
    results["log_likelihood"], results["standard_error"] = mean_and_error(found)
    if data.truth is not None:
        results["kl"], results["kl_standard_error"] = mean_and_error(data.truth - found)
        draw_density(flow, data, config)
    draw_samples(flow, data, config)
    write_record(config.out, config, time.perf_counter() - begin, **results)


if __name__ == "__main__":
    main()
