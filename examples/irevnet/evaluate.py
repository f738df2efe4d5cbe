"""How often a trained network is right on the test images.

    python examples/irevnet/evaluate.py
    python examples/irevnet/evaluate.py --weights ILSVRC_trained_irevnet.pth.tar --data DIR

The first evaluates the latest run on the data that it was trained on. ``DIR`` is any that
``train_imagenet.py`` takes; of a folder with ``train/<class>/<image>`` and ``val/<class>/<image>``,
the classes are numbered in the order of their names, as those of ImageNet's synsets are for
published weights. Images are resized, cropped and normalised as in the tests of the training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

from experiment.folder import RunError, writing
from images.batches import Normalise, load_plain
from trainer.distributed import find_device
from trainer.precision import Precision
from trainer.training import Tally
from trainer.weights import Network, load_network


@dataclass(frozen=True)
class Settings:
    """One evaluation."""

    weights: Path | None = None
    """A run's folder, its checkpoint.pt, a .safetensors file or a .pth.tar of the released code;
    by default the latest run under runs/irevnet."""

    data: str | None = None
    """The images, as for training; by default those that the network was trained on."""

    batch_size: int | None = None
    """Images at once; by default as in training."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else cpu."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Of convolutions, under autocast; auto is bfloat16 on a GPU, float32 on the CPU."""

    workers: int = 2
    """Processes that read image files; 0 reads them in the main one."""

    threads: int = 0
    """CPU threads that compute; 0 leaves the choice to torch."""

    json: Path | None = None
    """File for the numbers."""


@torch.no_grad()
def evaluate(network: Network, settings: Settings, console: Console) -> dict[str, float]:
    """Mean loss and accuracy over all test images."""
    device = next(network.model.parameters()).device
    config = replace(
        network.config,
        data=settings.data or network.config.data,
        batch_size=settings.batch_size or network.config.batch_size,
        workers=settings.workers,
    )
    batches = load_plain(config, device, "test", network.classes)
    normalise = Normalise(config.mean, config.std, device)
    precision = Precision(settings.precision, device)
    tally = Tally(device, network.classes)
    for pixels, labels in track(
        batches.epoch(), "", len(batches), console=console, disable=not console.is_terminal
    ):
        with precision.autocast():
            logits = network.model(normalise(pixels)).float()
        tally.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
    return {"images": tally.images, **tally.read()}


def table(found: dict[str, float]) -> Table:
    """The numbers in rows."""
    rows = Table(show_header=False)
    rows.add_row("test images", f"{found['images']:,}")
    rows.add_row("accuracy, top 1", f"{found['accuracy']:.2%}")
    if "top5_accuracy" in found:
        rows.add_row("accuracy, top 5", f"{found['top5_accuracy']:.2%}")
    rows.add_row("mean loss", f"{found['loss']:.4f}")
    return rows


def run(settings: Settings, console: Console) -> None:
    """Evaluates, prints and writes."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    network = load_network(settings.weights, find_device(settings.device))
    console.print(network.origin)
    found = evaluate(network, settings, console)
    console.print(table(found))
    if settings.json:
        _write(settings.json, found, network, settings)


def _write(path: Path, found: dict[str, float], network: Network, settings: Settings) -> None:
    about: dict[str, Any] = {
        "weights": network.origin,
        "preset": network.config.preset,
        "data": settings.data or network.config.data or "digits",
        "precision": settings.precision,
        "device": str(next(network.model.parameters()).device),
        "torch": torch.__version__,
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | found, indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    try:
        settings = tyro.cli(Settings, description=__doc__, args=arguments)
        run(settings, Console(highlight=False, soft_wrap=True))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped before the last image.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
