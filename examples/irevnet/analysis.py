"""What the analyses share: their flags, the network, the images, and where results go."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import get_console
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor

from errors import RunError, at_least, try_writing, writing
from experiment.settings import PresetName
from images.batches import Batches, plain
from images.dataset import difference
from images.readers import Part, open_images
from networks.irevnet import IRevNet
from presets import is_invertible
from trainer.distributed import find_device
from trainer.weights import Network, build_model, load_network

T = TypeVar("T")
# How to compute; exact is float32 on the grid that the network was trained on, else 2**-16
Mode = Literal["float32", "float64", "exact"]


@dataclass(frozen=True)
class NetworkSettings:
    """The flags of every script that takes a trained network; each adds its own."""

    # A run's folder, its checkpoint.pt, a .safetensors file or the released .pth.tar; by default
    # the latest run under runs/irevnet
    weights: Path | None = None
    # Network of weights that do not say which they are of, as released ones; by default b-released
    preset: PresetName | None = None
    # The images, as for training; by default those that the network was trained on
    data: str | None = None
    device: str = "auto"  # cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else cpu
    threads: int = 0  # CPU threads that compute; 0 leaves the choice to torch

    def load(self, weights: Path | None = None, **changes: Any) -> Network:
        """The network of these weights, or the flag's; None changes nothing in its settings."""
        if self.threads:
            torch.set_num_threads(self.threads)
        network = load_network(weights or self.weights, find_device(self.device), self.preset)
        changes |= {"data": self.data}
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(network, config=replace(network.config, **given))


@dataclass(frozen=True)
class Settings(NetworkSettings):
    """The flags of every analysis; each adds its own."""

    out: Path = Path("figures")  # Folder of the figure (PNG and PDF) and the numbers (JSON)
    seed: int = 0  # Seed of whatever is drawn at random

    def begin(self, weights: Path | None = None) -> Network:
        """Tells what is wrong before the work, not behind it; else as :meth:`load`."""
        at_least(0, most=2**32 - 1, seed=self.seed)
        try_writing(self.out, folder=True)
        network = self.load(weights)
        print(f"Analysing {network.origin}.")
        return network


def in_mode(network: Network, mode: Mode) -> IRevNet:
    """A copy of an i-RevNet that computes in this way."""
    quantum = (network.config.quantum or 2**-16) if mode == "exact" else None
    config = replace(network.config, quantum=quantum, checkpoint=False)
    copy = build_model(config, len(network.classes))
    if not is_invertible(copy):
        raise RunError(f"only an i-RevNet can be decoded, got --preset {config.preset}.")
    # By position: the grid is an entrance to the first layer, behind which all are renumbered.
    weights = zip(copy.state_dict(), network.model.state_dict().values(), strict=True)
    copy.load_state_dict(dict(weights))
    dtype = torch.float64 if mode == "float64" else torch.float32
    return copy.to(next(network.model.parameters()).device, dtype).eval()


def images(network: Network, part: Part, *, classified: bool = False) -> Batches:
    """Images as the network was trained on them, in order.

    If they are to be ``classified``, they must be of the network's classes.
    """
    found = open_images(network.config, part)
    others = difference(network.classes, found.classes)
    if classified and others:
        data = network.config.data or "digits"
        raise RunError(f"{data} has other classes than the network: {others}.")
    return plain(found, network.config, next(network.model.parameters()).device)


def short_names(runs: Sequence[tuple[str, Path]]) -> list[str]:
    """What networks are called in a legend: their presets, and what tells equal ones apart."""
    presets = [preset for preset, _ in runs]
    # A run's folder bears the name, not the checkpoint in it.
    paths = [path.parent if path.suffix == ".pt" else path for _, path in runs]
    names = [
        preset if presets.count(preset) == 1 else f"{preset} ({path.absolute().name[-24:]})"
        for preset, path in zip(presets, paths, strict=True)
    ]
    return [f"{n} #{i}" if names.count(n) > 1 else n for i, n in enumerate(names, 1)]


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Goes through the items with a progress bar, if there is a terminal to draw it on."""
    return track(items, description, total, disable=not get_console().is_terminal)


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Values below their names: of arrays the least and the largest, of shares the accuracy."""
    columns = (Column(name.replace("_", " "), justify="right") for name in rows[0])
    found = Table(*columns, title=title)
    for row in rows:
        found.add_row(*map(_shown, row.values()))
    # As wide as it is, wherever it goes: a narrow terminal may wrap lines, but no number is cut.
    console = get_console()
    found.width = console.measure(found, options=console.options.update(max_width=1000)).maximum
    return found


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Prints a table."""
    get_console().print(table(rows, title), soft_wrap=True)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.min():.3g} to {value.max():.3g}"
    if isinstance(value, Mapping):
        return _shown(value["accuracy"])
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def provenance(settings: NetworkSettings, network: Network) -> dict[str, Any]:
    """What numbers must say of their origin: put it before them."""
    return {
        "settings": asdict(settings),
        "weights": network.origin,
        "preset": network.config.preset,
        "data": network.config.data or "digits",
        "classes": network.classes,
        "torch": torch.__version__,
    }


def save(out: Path, name: str, figure: Figure, numbers: Mapping[str, Any]) -> None:
    """Writes ``name.png``, ``name.pdf`` and ``name.json`` into the folder ``out``."""
    for kind in ("png", "pdf"):
        with writing(out / f"{name}.{kind}"):
            figure.savefig(out / f"{name}.{kind}", dpi=150)
    write_json(out / f"{name}.json", numbers)
    print(f"Written: {out / name}.png, {out / name}.pdf, {out / name}.json")


def write_json(path: Path, numbers: Mapping[str, Any]) -> None:
    """Writes numbers into a file, those that are not finite as null."""
    # Besides JSON's own types there are paths, tensors, arrays and numbers of NumPy's.
    text = json.dumps(numbers, default=lambda x: str(x) if isinstance(x, Path) else x.tolist())
    finite = json.loads(text, parse_constant=lambda _: None)
    with writing(path):
        path.write_text(json.dumps(finite, indent=2) + "\n")
