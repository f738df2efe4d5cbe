"""Trained networks in files: those of our runs, those converted from them, and published ones.

Whatever the file, nothing in it is run: it can hold tensors and plain values only.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import RunError, meaning
from experiment.folder import BEST, CHECKPOINT, RUNS, latest_run, load_file, replacing
from experiment.settings import Config, recipe
from images.dataset import difference, numbered
from networks.irevnet import IRevNet
from networks.released import faults, released_names
from presets import PRESETS, Classifier

Said = tuple[dict[str, Any], list[str], str]  # settings, classes and what else a file says
PUBLISHED = "b-released"  # the network of weights that do not say which they are of
ACCEPTED = (
    f"weights are in a run's folder, its {CHECKPOINT}, a .safetensors file of convert.py, a "
    ".pth.tar of the released code or a state dict"
)


@dataclass(frozen=True)
class Network:
    """A trained network and what is known of it."""

    model: Classifier  # in evaluation mode
    config: Config  # of the run that trained it; of published weights, the released code's
    classes: tuple[str, ...]  # the names of the classes, or their numbers
    origin: str  # where it comes from, in one line
    path: Path = Path()  # of the file


@dataclass(frozen=True)
class Weights:
    """What a file holds."""

    path: Path
    state: dict[str, Tensor]
    config: Config
    classes: tuple[str, ...]
    about: str = ""  # what else it says; nothing if it does not say what network it is of


def build_model(config: Config, classes: int) -> Classifier:
    """The network of the preset, for these images."""
    preset = PRESETS[config.preset]
    changes: dict[str, Any] = {"in_channels": len(config.mean)}
    if config.blocks is not None:
        changes["blocks"] = config.blocks
    if preset.reversible:
        changes |= {"checkpoint": config.checkpoint, "quantum": config.quantum}
    with meaning(f"--preset {config.preset}", ValueError):
        model = preset.build(classes, **changes)
    if config.image_size % model.stride:
        raise RunError(
            f"--image-size must be a multiple of {model.stride} for --preset {config.preset}, got "
            f"{config.image_size}."
        )
    return model


def load_network(path: Path | None, device: torch.device, preset: str | None = None) -> Network:
    """Reads a trained network, by default that of the latest run; the preset as for a file."""
    found = read_weights(path, preset)
    model = build_model(found.config, len(found.classes))
    fill(model, found, found.config.preset, found.classes)
    model.to(device).eval()
    origin = f"{found.path}: {found.config.preset}{found.about}"
    return Network(model, found.config, found.classes, origin, found.path)


def fill(model: nn.Module, found: Weights, preset: str, classes: tuple[str, ...]) -> None:
    """Gives a network trained weights; its classifier stays new if its classes are others."""
    own = model.state_dict()
    ours = released_names(model) if isinstance(model, IRevNet) else {}
    state = {ours.get(name, name): value for name, value in found.state.items()}
    if difference(found.classes, classes):
        state |= {name: own[name] for name in own if name.startswith(("classifier.", "fc."))}
    wrong = faults(own, state)
    if wrong:
        hint = "" if found.about else " Say with --preset which network they are of."
        raise RunError(f"{found.path} does not fit --preset {preset}: {wrong}.{hint}")
    model.load_state_dict(own | state)


def read_weights(path: Path | None, preset: str | None = None) -> Weights:
    """Reads a file, whichever of those it is, by default that of the latest run.

    The preset is that of weights which do not say what network they are of; by default they are
    taken for the published ones.
    """
    if path is None:
        path = latest_run()
        if not (path / CHECKPOINT).is_file():
            raise RunError(f"there is no run under {RUNS}: train one, or give --weights.")
    if path.is_dir():
        path /= CHECKPOINT
    if not path.is_file():
        raise RunError(f"there is no {path}: {ACCEPTED}.")
    read = _read_safetensors if path.suffix == ".safetensors" else _read_checkpoint
    state, said = read(path)
    for name, value in state.items():
        if not value.isfinite().all():
            raise RunError(f"{path} has weights that are not finite: {name}.")
    if said is not None:
        settings, classes, about = said
        return Weights(path, state, Config.from_dict(settings, path), tuple(classes), about)
    # In floating point, as it was trained: nothing kept its states in the range of exact sums.
    config = replace(recipe(preset or PUBLISHED), quantum=None)
    for name in ("linear.bias", "classifier.bias", "fc.bias"):
        if name in state:
            return Weights(path, state, config, numbered(len(state[name])))
    raise RunError(f"{path} has no classifier: it holds {', '.join([*state][:6])}.")


def save_weights(path: Path, network: Network) -> None:
    """Writes a network as a ``.safetensors`` file, with its settings, classes and a checksum."""
    safetensors = _import_safetensors(path)
    # Tensors that share memory are refused.
    state = {key: value.clone().contiguous() for key, value in network.model.state_dict().items()}
    metadata = {
        "format": "pt",
        "preset": network.config.preset,
        "classes": json.dumps(network.classes),
        "origin": network.origin,
        "settings": json.dumps(network.config.as_dict()),
        "crc32": _checksum(state),
    }
    with replacing(path) as file:
        file.write(safetensors.torch.save(state, metadata))


def _import_safetensors(path: Path) -> Any:
    with meaning(f"for {path}, install the package safetensors", ImportError):
        import safetensors.torch
    return safetensors


def _checksum(state: Mapping[str, Tensor]) -> str:
    found = 0
    for _, value in sorted(state.items()):
        found = zlib.crc32(value.cpu().reshape(-1).view(torch.uint8).numpy().data, found)
    return str(found)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Said | None]:
    safetensors = _import_safetensors(path)
    damaged = meaning(f"cannot read {path}", safetensors.SafetensorError, OSError)
    with damaged, safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if "settings" not in metadata:
        return state, None
    if metadata["crc32"] != _checksum(state):
        raise RunError(f"cannot read {path}: its checksum is wrong.")
    settings, classes = (json.loads(metadata[name]) for name in ("settings", "classes"))
    return state, (settings, classes, f", made of {metadata['origin']}")


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], Said | None]:
    """A checkpoint of ours or of the released code, or a bare state dict."""
    found = load_file(path)
    content: dict[str, Any] = found if isinstance(found, dict) else {}
    if content.keys() >= {"config", "classes", "model", "epoch"}:
        about, best = f", epochs trained: {content['epoch']}", content.get("best_epoch")
        if best not in (None, content["epoch"]) and (path.parent / BEST).is_file():
            about += f"; {BEST} beside it, of epoch {best}, was better in the test"
        state = content.get("average") or content["model"]
        return state, (content["config"], content["classes"], about)
    state = content.get("state_dict", content)
    items = state.items() if isinstance(state, dict) else ()
    if items and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        return {key.removeprefix("module."): value for key, value in items}, None
    held = [f"{key} ({type(value).__name__})" for key, value in content.items()]
    raise RunError(
        f"{path} holds {', '.join(held[:6]) or f'a {type(found).__name__}'}; {ACCEPTED}."
    )
