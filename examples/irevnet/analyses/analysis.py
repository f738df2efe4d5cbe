"""What the analyses share: their flags, the network, the images, and where results go."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor

from experiment.folder import RunError, writing
from images.batches import Batches, Normalise, load_plain
from networks.irevnet import IRevNet
from networks.presets import is_invertible
from trainer.distributed import find_device
from trainer.training import build_model
from trainer.weights import Network

Part = Literal["train", "test"]
T = TypeVar("T")
S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Settings:
    """The flags of every analysis; each adds its own."""

    weights: Path | None = None
    """A run's folder, its checkpoint.pt, a .safetensors file or the released .pth.tar; by default
    the latest run under runs/irevnet."""

    data: str | None = None
    """The images, as for training; by default those that the network was trained on."""

    out: Path = Path("figures")
    """Folder of the figure (PNG and PDF) and the numbers (JSON)."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else cpu."""

    threads: int = 0
    """CPU threads that compute; 0 leaves the choice to torch."""

    seed: int = 0
    """Seed of whatever is drawn at random."""


def run_script(
    settings: type[S],
    body: Callable[[S, torch.device, Console], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs an analysis with these flags, or the command line's; returns the exit status.

    Args:
        settings: The flags. Their default values must be valid.
        body: The analysis, given its settings, the device and the terminal.
        arguments: The flags' words; None takes those of the command line.
    """
    console = Console(highlight=False, soft_wrap=True)
    try:
        description = sys.modules[body.__module__].__doc__
        chosen = tyro.cli(settings, args=arguments, description=description)
        if chosen.threads:
            torch.set_num_threads(chosen.threads)
        torch.manual_seed(chosen.seed)
        body(chosen, find_device(chosen.device), console)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped before there was anything to keep.", file=sys.stderr)
        return 130
    return 0


def in_arithmetic(network: Network, *, dtype: torch.dtype, quantum: float | None) -> IRevNet:
    """A copy of an i-RevNet that computes otherwise, with the same weights.

    Args:
        network: As it was trained.
        dtype: Of weights and states.
        quantum: The grid of the states; None computes in floating point.
    """
    if not is_invertible(network.model):
        raise RunError(f"only an i-RevNet can be decoded, got --preset {network.config.preset}.")
    config = replace(network.config, quantum=quantum, checkpoint=False)
    copy: Any = build_model(config, network.classes)
    # By position: the grid is an entrance to the first layer, behind which all are renumbered.
    weights = zip(copy.state_dict(), network.model.state_dict().values(), strict=True)
    copy.load_state_dict(dict(weights))
    device = next(network.model.parameters()).device
    return copy.to(device, dtype).eval()  # type: ignore[no-any-return]


class Plain(Batches, Protocol):
    """Batches in order, of which fewer can be had."""

    def few(self, images: int) -> Plain:
        """Batches of so many of the images."""


@dataclass(frozen=True)
class Images:
    """Images as a network reads them.

    Iterating gives pairs of normalised float32 images and labels, in the order of the data;
    ``len()`` is the number of batches.

    Args:
        source: Where they come from.
        normalise: From uint8 to what the network reads, and back.
    """

    source: Plain
    normalise: Normalise

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in self.source.epoch():
            yield self.normalise(pixels), labels

    @property
    def count(self) -> int:
        """How many images there are."""
        return self.source.images

    def at_most(self, count: int) -> Images:
        """So many of the images, evenly spread, or all if there are no more."""
        return replace(self, source=self.source.few(count)) if count < self.count else self

    def together(self) -> tuple[Tensor, Tensor]:
        """All in one batch: for few images."""
        images, labels = (torch.cat(parts) for parts in zip(*self, strict=True))
        return images, labels


def images(
    network: Network,
    data: str | None,
    part: Part,
    device: torch.device,
    limit: int | None,
    *,
    classified: bool = False,
) -> Images:
    """The images of one part of the data, prepared as the network was trained on them.

    Args:
        network: Its settings say how images are resized and normalised.
        data: As ``--data``; None takes what the network was trained on.
        part: Which images.
        device: Where they are given.
        limit: How many, evenly spread; None takes all, as does more than there are.
        classified: Whether there must be as many classes as the network tells apart.
    """
    if limit is not None and limit < 1:
        raise RunError(f"--limit must be at least 1, got {limit}.")
    config = network.config if data is None else replace(network.config, data=data)
    normalise = Normalise(config.mean, config.std, device)
    batches = load_plain(config, device, part, network.classes if classified else None)
    found = Images(batches, normalise)
    return found if limit is None else found.at_most(limit)


def progress(
    items: Iterable[T], description: str, console: Console, total: int | None = None
) -> Iterator[T]:
    """Goes through the items with a progress bar, if there is a terminal to draw it on.

    Args:
        items: What to go through.
        description: What is being done.
        console: The terminal.
        total: How many items there are, if they have no length.
    """
    yield from track(
        items, description, total=total, console=console, disable=not console.is_terminal
    )


def provenance(settings: Settings, network: Network) -> dict[str, Any]:
    """What numbers must say of their origin: put it before them."""
    return {
        "settings": asdict(settings),
        "weights": network.origin,
        "preset": network.config.preset,
        "data": settings.data or network.config.data or "digits",
        "torch": torch.__version__,
    }


def save(out: Path, name: str, figure: Figure, numbers: Mapping[str, Any]) -> list[Path]:
    """Writes ``name.png``, ``name.pdf`` and ``name.json`` into the folder ``out``.

    Args:
        out: Made if it is not there.
        name: The script's.
        figure: Drawn with constrained layout.
        numbers: Plain values, tensors and paths. What is not finite becomes null.

    Returns:
        The three paths.
    """
    paths = [out / f"{name}.{ending}" for ending in ("png", "pdf", "json")]
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for path in paths[:2]:
        with writing(path):
            figure.savefig(path, dpi=150)
    with writing(paths[2]):
        paths[2].write_text(json.dumps(_plain(numbers), indent=2, allow_nan=False) + "\n")
    return paths


def _plain(value: Any) -> Any:
    """The value in JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
