"""Singular values of the Jacobian of an i-RevNet's features, at images.

For instance::

    python examples/irevnet/spectrum.py --weights runs/irevnet/1

Figure 4 of the paper (https://arxiv.org/abs/1802.07088): the singular values of (b) at an image
fall so fast that the first 1e3 and 1e4 of 150,528 hold 80 % and 97 % of the energy, here the sum of
their squares. Of small images all are computed, from the Jacobian in full; of large ones the
largest, by the Lanczos method, and the energy of all by Hutchinson's estimator; each with its
error.

The Jacobian is that of the network in float64 and without a grid: rounding to a grid is a
staircase, whose derivative says nothing. The log-determinant of a bijective i-RevNet is 0 whatever
its weights are, so that the sum of all ``log s`` shows how right the singular values are.

What decoding does to an error in the features is told by the inverse's Jacobian, computed by
itself: its largest singular value is how much the worst error grows (1 over the smallest of the
features', if these are bijective), the root mean square of all how much one in a random direction
does. For comparison images are decoded from features in float32, which are rounded by up to 6e-8 of
themselves, and encoded and decoded in float32 throughout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from analyses.analysis import (
    Settings,
    images,
    in_arithmetic,
    progress,
    provenance,
    run_script,
    save,
)
from analyses.jacobian import Jacobian, energies, leading, matrix
from analyses.report import relative_error
from experiment.folder import RunError
from networks.irevnet import IRevNet
from trainer.weights import load_network

ROUNDING = 2.0**-24  # of a float32, relative, at most
PARTS = (1e3 / 150_528, 1e4 / 150_528)  # of the singular values: the paper's 1e3 and 1e4
SHARES = (0.8, 0.97)  # of the energy: what these hold


@dataclass(frozen=True)
class SpectrumSettings(Settings):
    """Singular values of the Jacobian of an i-RevNet's features, at images."""

    limit: int = 1
    """Test images at which to compute them, evenly spread."""

    full_up_to: int = 4096
    """Largest number of values in an image for which the Jacobian is computed in full."""

    leading: int = 100
    """How many of the largest singular values to compute for larger images."""

    samples: int = 64
    """Random directions that estimate an energy."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a Jacobian, the largest first.

    Args:
        values: All, or the largest.
        outputs: Rows of the Jacobian.
        inputs: Its columns, and the number of all singular values.
        residual: So far at most is a singular value of the Jacobian from each of them; 0 if they
            are computed from the full matrix.
        energy: Sum of the squares of all.
        energy_error: Its standard error; 0 if it is summed up.
    """

    values: np.ndarray
    outputs: int
    inputs: int
    residual: float
    energy: float
    energy_error: float

    def shares(self) -> np.ndarray:
        """What share of the energy the first values hold."""
        return np.square(self.values).cumsum() / self.energy

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
    return Spectrum(values, *full.shape, 0.0, float(np.square(values).sum()), 0.0)


def leading_spectrum(
    jacobian: Jacobian, count: int, samples: int, rng: np.random.Generator
) -> Spectrum:
    """The largest singular values, and an estimate of the energy of all."""
    found = leading(jacobian, count, rng)
    rest = energies(jacobian, samples, rng, without=found.vectors)
    return Spectrum(
        found.values,
        *jacobian.shape,
        found.residuals.max(),
        np.square(found.values).sum() + rest.mean(),
        _standard_error(rest),
    )


def _standard_error(samples: np.ndarray) -> float:
    return float(samples.std(ddof=1) / np.sqrt(len(samples)))


@dataclass(frozen=True)
class Decoding:
    """What decoding does to an error in the features, both measured by Euclidean norms.

    Args:
        worst: Factor by which an error in the worst direction grows: the largest singular value
            of the inverse's Jacobian.
        random: Factor for one in a random direction: root mean square over all directions.
        worst_float32: Bound, to first order, of the relative error of an image that is decoded
            in float64 from features rounded to float32.
        random_float32: The same if the rounding errors were as large and in random directions.
        features_in_float32: The relative error that has in fact.
        all_in_float32: The relative error of encoding and decoding in float32.
    """

    worst: float
    random: float
    worst_float32: float
    random_float32: float
    features_in_float32: float
    all_in_float32: float


def decoding(
    model: IRevNet, single: IRevNet, x: Tensor, samples: int, rng: np.random.Generator
) -> Decoding:
    """Measures what decoding does to an error in the features of an image.

    Args:
        model: The network in float64.
        single: The same in float32.
        x: The image, float32 of shape :math:`(1, C, H, W)`.
        samples: Random directions.
        rng: Draws them.
    """
    with torch.no_grad():
        phi = model.features(x.double())
        from_float32 = model.inverse(phi.float().double())
        in_float32 = single.inverse(single.features(x))
    inverse = Jacobian(model.inverse, phi)
    worst = float(leading(inverse, 1, rng).values[0])
    random = float(np.sqrt(energies(inverse, samples, rng).mean() / phi.numel()))
    relative = ROUNDING * (phi.norm() / x.double().norm()).item()
    return Decoding(
        worst,
        random,
        worst * relative,
        random * relative,
        relative_error(x.double(), from_float32).item(),
        relative_error(x, in_float32).item(),
    )


def run(settings: SpectrumSettings, device: torch.device, console: Console) -> None:
    """Computes the spectra, and writes the results."""
    for name in ("leading", "samples"):
        if getattr(settings, name) < 2:
            raise RunError(f"--{name} must be at least 2, got {getattr(settings, name)}.")
    network = load_network(settings.weights, device)
    console.print(f"Differentiating {network.origin}.")
    model = in_arithmetic(network, dtype=torch.float64, quantum=None).requires_grad_(False)
    single = in_arithmetic(network, dtype=torch.float32, quantum=None)
    points, _ = images(network, settings.data, "test", device, settings.limit).together()
    rng = np.random.default_rng(settings.seed)
    spectra, decodings = [], []
    for number, x in enumerate(points.split(1), 1):
        spectra.append(spectrum(model, x.double(), settings, rng, f"image {number}", console))
        with console.status(f"image {number}: decoding"):
            decodings.append(decoding(model, single, x, settings.samples, rng))
    console.print(table(spectra, decodings))
    numbers = {
        "images": [
            summary(spectrum, decoding)
            for spectrum, decoding in zip(spectra, decodings, strict=True)
        ]
    }
    paths = save(settings.out, "spectrum", draw(spectra), provenance(settings, network) | numbers)
    console.print(f"Written: {', '.join(map(str, paths))}")


def spectrum(
    model: IRevNet,
    x: Tensor,
    settings: SpectrumSettings,
    rng: np.random.Generator,
    name: str,
    console: Console,
) -> Spectrum:
    """The spectrum at an image, in full where the image is small."""
    jacobian = Jacobian(model.features, x)
    if x.numel() <= settings.full_up_to:
        return full_spectrum(matrix(jacobian, partial(progress, description=name, console=console)))
    count = min(settings.leading, x.numel() - 1)  # all of them is more than Lanczos takes
    with console.status(f"{name}: the {count} largest singular values"):
        return leading_spectrum(jacobian, count, settings.samples, rng)


def summary(spectrum: Spectrum, decoding: Decoding) -> dict[str, Any]:
    """What can be written down of an image."""
    return {
        **asdict(spectrum),
        **asdict(decoding),
        "condition_number": spectrum.values[0] * decoding.worst,
        **{f"share_of_first_{part:.2%}": spectrum.first(part) for part in PARTS},
        **{f"values_with_{share:.0%}": spectrum.count(share) for share in SHARES},
        "log_det": spectrum.log_det(),
    }


def table(spectra: Sequence[Spectrum], decodings: Sequence[Decoding]) -> Table:
    """The numbers, a column for each image."""
    columns = [_column(*pair) for pair in zip(spectra, decodings, strict=True)]
    rows = Table()
    rows.add_column("Jacobian of the features at image")
    for number in range(1, len(columns) + 1):
        rows.add_column(str(number), justify="right")
    for name in columns[0]:
        rows.add_row(name, *(column[name] for column in columns))
    return rows


def _column(spectrum: Spectrum, decoding: Decoding) -> dict[str, str]:
    return {
        "size": f"{spectrum.outputs:,} x {spectrum.inputs:,}",
        "largest singular value": f"{spectrum.values[0]:.4g}",
        f"the {len(spectrum.values):,}th": f"{spectrum.values[-1]:.4g}",
        "largest residual": f"{spectrum.residual:.1e}" if spectrum.residual else "-",
        "energy, the sum of squares": _with_error(spectrum.energy, spectrum.energy_error),
        **{
            f"  in the first {part:.2%} of the values": _or_dash(spectrum.first(part), ".1%")
            for part in PARTS
        },
        **{
            f"  values that hold {share:.0%} of it": _or_dash(spectrum.count(share), ",")
            for share in SHARES
        },
        "sum of log s, 0 if bijective": _or_dash(spectrum.log_det(), ".1e"),
        "error in the features grows at worst by": f"{decoding.worst:.4g}",
        "  in a random direction": f"{decoding.random:.4g}",
        "condition number, largest times worst": f"{spectrum.values[0] * decoding.worst:.4g}",
        "error if the features are in float32": f"{decoding.features_in_float32:.1e}",
        "  bound; with random directions": f"{decoding.worst_float32:.1e}; "
        f"{decoding.random_float32:.1e}",
        "error if all is in float32": f"{decoding.all_in_float32:.1e}",
    }


def _with_error(value: float, error: float) -> str:
    return f"{value:.5g} ± {error:.1g}" if error else f"{value:.5g}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(spectra: Sequence[Spectrum]) -> Figure:
    """The normalised singular values, and the share of the energy that the first ones hold."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    values, energy = figure.subplots(1, 2)
    for number, spectrum in enumerate(spectra, 1):
        index = np.arange(1, len(spectrum.values) + 1)
        values.plot(index, spectrum.values / spectrum.values[0], label=f"image {number}")
        shares, error = spectrum.shares(), spectrum.energy_error / spectrum.energy
        energy.plot(index, shares)
        energy.fill_between(index, shares * (1 - 2 * error), shares * (1 + 2 * error), alpha=0.3)
    values.set(
        xlabel="singular value", ylabel="relative to the largest", xscale="log", yscale="log"
    )
    energy.set(xlabel="first singular values", ylabel="share of the energy", ylim=(0, 1.02))
    energy.set_xscale("log")
    for axes in (values, energy):
        axes.set_xlim(1, spectra[0].inputs)
        axes.grid(alpha=0.3)
    if len(spectra) <= 10:
        values.legend()
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    return run_script(SpectrumSettings, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
