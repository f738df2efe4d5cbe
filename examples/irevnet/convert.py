"""Writes a trained network as a ``.safetensors`` file, which holds its settings as well.

    python examples/irevnet/convert.py ILSVRC_trained_irevnet.pth.tar irevnet.safetensors
    python examples/irevnet/convert.py runs/irevnet/1 irevnet.safetensors

The source is a run's folder, its checkpoint, the published weights, or another such file. The
result is what ``--weights`` takes, and it can be handed on: to read it, nothing in it is run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from experiment.folder import RunError
from trainer.weights import load_network, save_weights


@dataclass(frozen=True)
class Settings:
    """One conversion."""

    source: tyro.conf.Positional[Path]
    """A run's folder, a checkpoint.pt, a .safetensors file or a .pth.tar of the released code."""

    target: tyro.conf.Positional[Path]
    """The .safetensors file to write."""

    overwrite: bool = False
    """Replace the target if it is there."""


def convert(settings: Settings) -> None:
    """Reads the source and writes the target."""
    target = settings.target
    if target.suffix != ".safetensors":
        raise RunError(f"the target must end in .safetensors, got {target}.")
    if target.exists() and not settings.overwrite:
        raise RunError(f"{target} exists: choose another name, or give --overwrite.")
    network = load_network(settings.source, torch.device("cpu"))
    save_weights(target, network)
    weights = sum(parameter.numel() for parameter in network.model.parameters())
    print(f"{network.origin}\n{weights:,} parameters, {network.classes:,} classes: {target}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the script with these flags, or the command line's; returns the exit status."""
    try:
        convert(tyro.cli(Settings, description=__doc__, args=arguments))
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
