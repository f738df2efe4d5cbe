"""Singular values of the Jacobian of an i-RevNet's features, at images.

    python examples/irevnet/spectrum.py --weights runs/irevnet/1

Figure 4 of the paper (https://arxiv.org/abs/1802.07088). Of small images all are computed, from
the Jacobian in full; of large ones the largest, by the Lanczos method, and the energy of all by
Hutchinson's estimator; each with its error. The network computes in float64 and without a grid:
rounding to a grid is a staircase, whose derivative says nothing. By how much decoding amplifies an
error in the features, at worst and in a random direction, is told by the inverse's Jacobian.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor
from torch.func import vjp, vmap

import analysis
from errors import at_least
from scripts import script

BATCH = 32  # directions at once
PARTS = (1e3 / 150_528, 1e4 / 150_528)  # of the singular values: the paper's 1e3 and 1e4
SHARES = (0.8, 0.97)  # of the energy: what these hold


@dataclass(frozen=True)
class Settings(analysis.Settings):
    """Singular values of the Jacobian of an i-RevNet's features, at images."""

    limit: int = 1  # Test images at which to compute them, evenly spread
    # Largest number of values in an image for which the Jacobian is computed in full
    full_up_to: int = 4096
    leading: int = 100  # How many of the largest singular values to compute for larger images
    samples: int = 64  # Random directions that estimate an energy


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> LinearOperator:
    """The matrix of derivatives at a point, known by its products ``J @ v`` and ``J.T @ u``.

    Args:
        function: Maps float64 tensors of a batch of one.
        x: The point, of shape :math:`(1, *)`.
    """
    y, pull = vjp(function, x)  # type: ignore[misc]
    # The derivative of the linear u -> J.T u is J. At a time one direction is faster so than by
    # forward mode, which warns that torch.jit is deprecated besides (torch 2.13).
    _, push = vjp(lambda u: pull(u)[0], torch.zeros_like(y))  # type: ignore[misc]
    forward, back = _on_columns(push, x), _on_columns(pull, y)
    shape = y.numel(), x.numel()
    return LinearOperator(shape, forward, back, matmat=forward, rmatmat=back, dtype=np.float64)


def _on_columns(
    linear: Callable[[Tensor], tuple[Tensor]], like: Tensor
) -> Callable[[np.ndarray], np.ndarray]:
    """A linear function of tensors, on each column of an array."""
    each = vmap(lambda v: linear(v.view_as(like))[0].flatten(), chunk_size=BATCH)

    def product(array: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.ascontiguousarray(array.reshape(len(array), -1).T))
        return each(rows.to(like)).detach().T.cpu().numpy()

    return product


def all_values(jacobian: LinearOperator) -> np.ndarray:
    """All singular values, from the matrix in full."""
    rows, columns = jacobian.shape
    # Going back costs a fourth of going forward, or less.
    back = rows <= 4 * columns
    matrix = (jacobian.T @ np.eye(rows)).T if back else jacobian @ np.eye(columns)
    # NumPy's svd takes five times as long.
    return torch.linalg.svdvals(torch.from_numpy(matrix)).numpy()


def leading(
    jacobian: LinearOperator, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, float, np.ndarray]:
    """The largest singular values by the Lanczos method (ARPACK), the largest first.

    Beside them, how far off they are at most; and the right singular vectors, in columns.
    """
    left, values, right = svds(jacobian, count, v0=rng.standard_normal(min(jacobian.shape)))
    order = np.argsort(values)[::-1]
    u, s, v = left[:, order], values[order], right[order].T
    residuals = jacobian @ v - u * s, jacobian.T @ u - v * s
    return s, max(np.linalg.norm(each, axis=0).max() for each in residuals), v


def energies(
    jacobian: LinearOperator,
    samples: int,
    rng: np.random.Generator,
    without: np.ndarray | None = None,
) -> np.ndarray:
    r"""Independent estimates of the energy :math:`\|J\|_F^2`, the sum of squares of all.

    Each is :math:`\|J z\|^2` with random signs :math:`z`: Hutchinson's estimator of the trace of
    :math:`J^\top J`. That of orthonormal columns is left out: ``without`` the leading singular
    vectors, the estimates vary less.
    """
    signs = rng.choice([-1.0, 1.0], size=(jacobian.shape[1], samples))
    if without is not None:
        signs -= without @ (without.T @ signs)
    return np.square(jacobian @ signs).sum(0)


def spectrum(
    jacobian: LinearOperator, settings: Settings, rng: np.random.Generator
) -> dict[str, Any]:
    """Singular values, all or the largest, and what they tell; None where they are too few.

    A singular value is no farther than ``residual`` from each. The energy is the sum of squares of
    all, with its standard error.
    """
    outputs, inputs = jacobian.shape
    if inputs <= settings.full_up_to:
        values, residual, rest = all_values(jacobian), 0.0, np.zeros(2)  # nothing is left
    else:
        count = min(settings.leading, inputs - 1)  # ARPACK takes no more
        values, residual, vectors = leading(jacobian, count, rng)
        rest = energies(jacobian, settings.samples, rng, without=vectors)
    energy = np.square(values).sum() + rest.mean()
    shares = np.square(values).cumsum() / energy
    firsts = {f"share_of_first_{part:.2%}": max(1, round(part * inputs)) for part in PARTS}
    counts = {f"values_with_{share:.0%}": 1 + np.searchsorted(shares, share) for share in SHARES}
    known = len(values)
    return {
        "values": values,
        "outputs": outputs,
        "inputs": inputs,
        "residual": residual,
        "energy": energy,
        "energy_error": rest.std(ddof=1) / np.sqrt(len(rest)),
        **{name: shares[n - 1] if n <= known else None for name, n in firsts.items()},
        **{name: n if n <= known else None for name, n in counts.items()},
        "log_det": np.log(values).sum() if known == inputs == outputs else None,
    }


def growth(inverse: LinearOperator, samples: int, rng: np.random.Generator) -> dict[str, float]:
    """By how much decoding amplifies an error, at worst and as a root mean square."""
    (worst,), _, _ = leading(inverse, 1, rng)
    mean = energies(inverse, samples, rng).mean() / inverse.shape[1]
    return {"worst": worst, "random": np.sqrt(mean)}


@script
def main(settings: Settings) -> None:
    """Computes the spectra, and writes the results."""
    at_least(1, limit=settings.limit)
    at_least(2, leading=settings.leading, samples=settings.samples)
    network = settings.begin()
    model = analysis.in_mode(network, "float64").requires_grad_(False)
    test = analysis.images(network, "test")
    points = test.at_most(settings.limit).joined().double()
    rng = np.random.default_rng(settings.seed)
    found = {}
    for index, x in enumerate(analysis.progress(points.split(1), "test images")):
        name = f"test image {index * len(test.images) // len(points):,}"
        forward = jacobian(model.features, x)
        back = jacobian(model.inverse, model.features(x))
        found[name] = spectrum(forward, settings, rng) | growth(back, settings.samples, rng)
        found[name]["condition_number"] = found[name]["values"][0] * found[name]["worst"]
    rows = [{"": key} | {name: each[key] for name, each in found.items()} for key in found[name]]
    analysis.print_table(rows)
    numbers = {"images": [{"image": name} | each for name, each in found.items()]}
    about = analysis.provenance(settings, network)
    analysis.save(settings.out, "spectrum", draw(found), about | numbers)


def draw(spectra: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The normalised singular values, and the share of the energy that the first ones hold."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    values, energy = figure.subplots(1, 2)
    for name, found in spectra.items():
        index = np.arange(1, len(found["values"]) + 1)
        values.loglog(index, found["values"] / found["values"][0], label=name)
        shares = np.square(found["values"]).cumsum() / found["energy"]
        error = 2 * found["energy_error"] / found["energy"]
        energy.semilogx(index, shares)
        energy.fill_between(index, shares * (1 - error), shares * (1 + error), alpha=0.3)
    values.set(xlabel="singular value", ylabel="relative to the largest")
    energy.set(xlabel="first singular values", ylabel="share of the energy", ylim=(0, 1.02))
    for axes in (values, energy):
        axes.set_xlim(1, found["inputs"])
        axes.grid(alpha=0.3)
    if len(spectra) <= 10:
        values.legend()
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
