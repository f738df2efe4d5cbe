"""Writes a trained network as a ``.safetensors`` file, which holds its settings as well.

    python examples/irevnet/convert.py ILSVRC_trained_irevnet.pth.tar irevnet.safetensors
    python examples/irevnet/convert.py runs/irevnet/1 irevnet.safetensors

The source is a run's folder, its checkpoint, the published weights, or another such file. The
result is what ``--weights`` takes, and it can be handed on: to read it, nothing in it is run.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from errors import RunError, try_writing
from experiment.settings import PresetName
from scripts import script
from trainer.weights import load_network, save_weights


@dataclass(frozen=True)
class Settings:
    """One conversion."""

    # A run's folder, a checkpoint.pt, a .safetensors file or a .pth.tar of the released code
    source: tyro.conf.Positional[Path]
    target: tyro.conf.Positional[Path]  # The .safetensors file to write
    # Network of weights that do not say which they are of; by default b-released
    preset: PresetName | None = None
    overwrite: bool = False  # Replace the target if it is there


@script
def main(settings: Settings) -> None:
    """Reads the source and writes the target."""
    target = settings.target
    if target.suffix != ".safetensors":
        raise RunError(f"the target must end in .safetensors, got {target}.")
    if target.exists() and not settings.overwrite:
        raise RunError(f"{target} exists: choose another name, or give --overwrite.")
    try_writing(target)
    network = load_network(settings.source, torch.device("cpu"), settings.preset)
    save_weights(target, network)
    weights = sum(parameter.numel() for parameter in network.model.parameters())
    print(network.origin)
    print(f"{weights:,} parameters, {len(network.classes):,} classes: {target}")


if __name__ == "__main__":
    raise SystemExit(main())
