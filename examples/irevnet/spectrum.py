"""Singular values of the Jacobian of an i-RevNet's features, at images.

For instance::

    python examples/irevnet/spectrum.py --weights runs/irevnet/1

Figure 4 of the paper (https://arxiv.org/abs/1802.07088). Of small images all are computed, from
the Jacobian in full; of large ones the largest, by the Lanczos method, and the energy of all by
Hutchinson's estimator; each with its error. The network computes in float64 and without a grid:
rounding to a grid is a staircase, whose derivative says nothing. What decoding does to an error in
the features is told by the inverse's Jacobian, computed by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analyses.analysis import Settings, few_images, images, in_arithmetic, provenance, save
from analyses.decoding import relative_error
from analyses.jacobian import Jacobian, energies, leading
from errors import at_least
from networks.irevnet import IRevNet
from scripts import run_script

ROUNDING = 2.0**-24  # of a float32, relative, at most
PARTS = (1e3 / 150_528, 1e4 / 150_528)  # of the singular values: the paper's 1e3 and 1e4
SHARES = (0.8, 0.97)  # of the energy: what these hold


@dataclass(frozen=True)
class SpectrumSettings(Settings):
    """Singular values of the Jacobian of an i-RevNet's features, at images."""

    limit: int = 1  # Test images at which to compute them, evenly spread
    # Largest number of values in an image for which the Jacobian is computed in full
    full_up_to: int = 4096
    leading: int = 100  # How many of the largest singular values to compute for larger images
    samples: int = 64  # Random directions that estimate an energy


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a Jacobian, the largest first."""

    values: np.ndarray  # all, or the largest
    outputs: int  # rows of the Jacobian
    inputs: int  # its columns, and the number of all singular values
    # so far at most is a singular value of the Jacobian from each of them; 0 if they are computed
    # from the full matrix
    residual: float
    energy: float  # sum of the squares of all
    energy_error: float  # its standard error; 0 if it is summed up

    def shares(self) -> np.ndarray:
        """What share of the energy the first values hold."""
        shares: np.ndarray = np.square(self.values).cumsum() / self.energy
        return shares

    def first(self, part: float) -> float | None:
        """What share of the energy that part of all values holds; None if more than are known."""
        count = max(1, round(part * self.inputs))
        return float(self.shares()[count - 1]) if count <= len(self.values) else None

    def count(self, share: float) -> int | None:
        """How many of the first values hold this share of the energy; None if more than known."""
        enough = np.flatnonzero(self.shares() >= share)
        return int(enough[0]) + 1 if len(enough) else None

    def log_det(self) -> float | None:
        """Sum of all ``log s``, if all are known and the Jacobian is square."""
        if len(self.values) < self.inputs or self.outputs != self.inputs:
            return None
        return float(np.log(self.values).sum())


def full_spectrum(full: Tensor) -> Spectrum:
    """All singular values of a matrix."""
    values = torch.linalg.svdvals(full).cpu().numpy()
    return Spectrum(values, len(full), full.shape[1], 0.0, float(np.square(values).sum()), 0.0)


def leading_spectrum(
    jacobian: Jacobian, count: int, samples: int, rng: np.random.Generator
) -> Spectrum:
    """The largest singular values, and an estimate of the energy of all."""
    values, residuals, vectors = leading(jacobian, count, rng)
    rest = energies(jacobian, samples, rng, without=vectors)
    error = float(rest.std(ddof=1) / np.sqrt(samples))
    energy = float(np.square(values).sum() + rest.mean())
    rows, columns = jacobian.shape
    return Spectrum(values, rows, columns, float(residuals.max()), energy, error)


def decoding(
    model: IRevNet, single: IRevNet, x: Tensor, samples: int, rng: np.random.Generator
) -> dict[str, float]:
    """What decoding does to an error in the features of an image, both by Euclidean norms.

    Args:
        model: The network in float64.
        single: The same in float32.
        x: The image, float32 of shape :math:`(1, C, H, W)`.
        samples: Random directions.
        rng: Draws them.

    Returns:
        ``worst``, the factor by which an error in the worst direction grows, and ``random``, that
        for a random one, a root mean square; with ``_float32``, a bound, to first order, of the
        relative error of an image that is decoded in float64 from features rounded to float32, and
        the same if the rounding errors were as large and in random directions; what that error is
        in fact, ``features_in_float32``; and that of encoding and decoding in float32,
        ``all_in_float32``.
    """
    with torch.no_grad():
        phi = model.features(x.double())
        from_float32 = model.inverse(phi.float().double())
        in_float32 = single.inverse(single.features(x))
    inverse = Jacobian(model.inverse, phi)
    worst = float(leading(inverse, 1, rng)[0][0])
    random = float(np.sqrt(energies(inverse, samples, rng).mean() / phi.numel()))
    relative = ROUNDING * (phi.norm() / x.double().norm()).item()
    return {
        "worst": worst,
        "random": random,
        "worst_float32": worst * relative,
        "random_float32": random * relative,
        "features_in_float32": relative_error(x.double(), from_float32).item(),
        "all_in_float32": relative_error(x, in_float32).item(),
    }


def run(settings: SpectrumSettings, console: Console) -> None:
    """Computes the spectra, and writes the results."""
    at_least(2, leading=settings.leading, samples=settings.samples)
    settings.check()
    network = settings.load()
    console.print(f"Differentiating {network.origin}.")
    model = in_arithmetic(network, dtype=torch.float64, quantum=None).requires_grad_(False)
    single = in_arithmetic(network, dtype=torch.float32, quantum=None)
    every = len(images(network, "test").images)
    points = few_images(network, settings.limit)
    rng = np.random.default_rng(settings.seed)
    spectra: dict[str, Spectrum] = {}
    found = {}
    for index, x in enumerate(points.split(1)):
        name = f"test image {index * every // len(points):,}"
        with console.status(name):
            spectra[name] = spectrum(model, x.double(), settings, rng)
            errors = decoding(model, single, x, settings.samples, rng)
        found[name] = summary(spectra[name], errors)
    console.print(table(found))
    numbers = {"images": [{"image": name, **each} for name, each in found.items()]}
    about = provenance(settings, network)
    save(settings.out, "spectrum", draw(spectra), about | numbers, console)


def spectrum(
    model: IRevNet, x: Tensor, settings: SpectrumSettings, rng: np.random.Generator
) -> Spectrum:
    """The spectrum at an image, in full where the image is small."""
    jacobian = Jacobian(model.features, x)
    if x.numel() <= settings.full_up_to:
        return full_spectrum(jacobian.matrix())
    count = min(settings.leading, x.numel() - 1)  # all of them is more than Lanczos takes
    return leading_spectrum(jacobian, count, settings.samples, rng)


def summary(spectrum: Spectrum, errors: Mapping[str, float]) -> dict[str, Any]:
    """What can be written down of an image."""
    return {
        **asdict(spectrum),
        **errors,
        "condition_number": spectrum.values[0] * errors["worst"],
        **{f"share_of_first_{part:.2%}": spectrum.first(part) for part in PARTS},
        **{f"values_with_{share:.0%}": spectrum.count(share) for share in SHARES},
        "log_det": spectrum.log_det(),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """The numbers, a column for each image."""
    columns = list(map(_column, found.values()))
    rows = Table()
    rows.add_column("Jacobian of the features at")
    for name in found:
        rows.add_column(name, justify="right")
    for name in columns[0]:
        rows.add_row(name, *(column[name] for column in columns))
    return rows


def _column(found: Mapping[str, Any]) -> dict[str, str]:
    values, error = found["values"], found["energy_error"]
    shares = {f"  in the first {p:.2%} of the values": f"share_of_first_{p:.2%}" for p in PARTS}
    counts = {
        f"  values that hold {share:.0%} of it": f"values_with_{share:.0%}" for share in SHARES
    }
    return {
        "size": f"{found['outputs']:,} x {found['inputs']:,}",
        "largest singular value": f"{values[0]:.4g}",
        f"the {len(values):,}th": f"{values[-1]:.4g}",
        "largest residual": f"{found['residual']:.1e}" if found["residual"] else "-",
        "energy, the sum of squares": f"{found['energy']:.5g}"
        + (f" ± {error:.1g}" if error else ""),
        **{name: _or_dash(found[key], ".1%") for name, key in shares.items()},
        **{name: _or_dash(found[key], ",") for name, key in counts.items()},
        "sum of log s, 0 if bijective": _or_dash(found["log_det"], ".1e"),
        "error in the features grows at worst by": f"{found['worst']:.4g}",
        "  in a random direction": f"{found['random']:.4g}",
        "condition number, largest times worst": f"{found['condition_number']:.4g}",
        "error if the features are in float32": f"{found['features_in_float32']:.1e}",
        "  bound": f"{found['worst_float32']:.1e}",
        "  with random directions": f"{found['random_float32']:.1e}",
        "error if all is in float32": f"{found['all_in_float32']:.1e}",
    }


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(spectra: Mapping[str, Spectrum]) -> Figure:
    """The normalised singular values, and the share of the energy that the first ones hold."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    values, energy = figure.subplots(1, 2)
    for name, spectrum in spectra.items():
        index = np.arange(1, len(spectrum.values) + 1)
        values.plot(index, spectrum.values / spectrum.values[0], label=name)
        shares, error = spectrum.shares(), spectrum.energy_error / spectrum.energy
        energy.plot(index, shares)
        energy.fill_between(index, shares * (1 - 2 * error), shares * (1 + 2 * error), alpha=0.3)
    values.set(
        xlabel="singular value", ylabel="relative to the largest", xscale="log", yscale="log"
    )
    energy.set(xlabel="first singular values", ylabel="share of the energy", ylim=(0, 1.02))
    energy.set_xscale("log")
    for axes in (values, energy):
        axes.set_xlim(1, next(iter(spectra.values())).inputs)
        axes.grid(alpha=0.3)
    if len(spectra) <= 10:
        values.legend()
    return figure


main = partial(run_script, SpectrumSettings, run)

if __name__ == "__main__":
    sys.exit(main())
