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

from errors import RunError, writing
from experiment.folder import BEST, CHECKPOINT, RUNS, folder_to_resume, load_file
from experiment.settings import Config, recipe
from images.dataset import difference, numbered
from networks.irevnet import IRevNet
from networks.released import faults, released_names
from presets import PRESETS, Classifier

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
    """What a file holds: settings and classes only if it says so."""

    path: Path
    state: dict[str, Tensor]
    config: Config | None = None
    classes: tuple[str, ...] | None = None
    about: str = ""


def build_model(config: Config, classes: int) -> Classifier:
    """The network of the preset, for these images."""
    preset = PRESETS[config.preset]
    changes: dict[str, Any] = {"in_channels": len(config.mean)}
    if config.blocks is not None:
        changes["blocks"] = config.blocks
    if preset.reversible:
        changes |= {"checkpoint": config.checkpoint, "quantum": config.quantum}
    try:
        model = preset.build(classes, **changes)
    except ValueError as error:
        raise RunError(str(error)) from error
    if config.image_size % model.stride:
        raise RunError(
            f"--image-size must be a multiple of {model.stride} for --preset {config.preset}, got "
            f"{config.image_size}."
        )
    return model


def load_network(path: Path | None, device: torch.device, preset: str | None = None) -> Network:
    """Reads a trained network, by default that of the latest run.

    The preset is that of weights which do not say what network they are of; by default they are
    taken for the published ones.
    """
    found = read_weights(path)
    # In floating point, as it was trained: nothing kept its states in the range of exact sums.
    config = found.config or replace(recipe(preset or PUBLISHED), quantum=None)
    classes = found.classes or numbered(_count_classes(found))
    model = build_model(config, len(classes))
    _fill(model, found, config, _in_our_names(model, found.state))
    model.to(device).eval()
    origin = f"{found.path}: {config.preset}{found.about}"
    return Network(model, config, classes, origin, found.path)


def begin_with(path: Path, model: nn.Module, config: Config, classes: tuple[str, ...]) -> None:
    """Fills a network with trained weights; its classifier stays new if its classes are others."""
    found = read_weights(path)
    state, own = _in_our_names(model, found.state), model.state_dict()
    others = found.classes is not None and difference(found.classes, classes)
    for name in state.keys() & own.keys():
        is_classifier = name.startswith(("classifier.", "fc."))
        if is_classifier and (others or state[name].shape != own[name].shape):
            state[name] = own[name]
    _fill(model, found, config, state)


def read_weights(path: Path | None) -> Weights:
    """Reads a file, whichever of those it is."""
    if path is None:
        path = folder_to_resume(None, needed=False)
        if path is None:
            raise RunError(f"there is no run under {RUNS}: train one, or give --weights.")
    if path.is_dir():
        path /= CHECKPOINT
    if not path.is_file():
        raise RunError(f"there is no {path}: {ACCEPTED}.")
    found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    for name, value in found.state.items():
        if not value.isfinite().all():
            raise RunError(f"{path} has weights that are not finite: {name}.")
    return found


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
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(state, partial, metadata)
            partial.replace(path)
    except safetensors.SafetensorError as error:  # for instance a full disk
        raise RunError(f"cannot write {path}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _import_safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise RunError(f"for {path}, install the package safetensors.") from error
    return safetensors


def _checksum(state: Mapping[str, Tensor]) -> str:
    found = 0
    for _, value in sorted(state.items()):
        found = zlib.crc32(value.cpu().reshape(-1).view(torch.uint8).numpy().data, found)
    return str(found)


def _read_safetensors(path: Path) -> Weights:
    safetensors = _import_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise RunError(f"cannot read {path}: {error}.") from error
    if "settings" not in metadata:
        return Weights(path, state)
    if metadata["crc32"] != _checksum(state):
        raise RunError(f"cannot read {path}: its checksum is wrong.")
    config = Config.from_dict(json.loads(metadata["settings"]), str(path))
    classes = tuple(json.loads(metadata["classes"]))
    return Weights(path, state, config, classes, f", made of {metadata['origin']}")


def _read_checkpoint(path: Path) -> Weights:
    """A checkpoint of ours or of the released code, or a bare state dict."""
    found = load_file(path)
    content: dict[str, Any] = found if isinstance(found, dict) else {}
    if content.keys() >= {"config", "classes", "model", "epoch"}:
        config = Config.from_dict(content["config"], str(path))
        about, best = f", epochs trained: {content['epoch']}", content.get("best_epoch")
        if best not in (None, content["epoch"]) and (path.parent / BEST).is_file():
            about += f"; {BEST} beside it, of epoch {best}, was better in the test"
        state = content.get("average") or content["model"]
        return Weights(path, state, config, tuple(content["classes"]), about)
    state = content.get("state_dict", content)
    items = state.items() if isinstance(state, dict) else ()
    if items and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in items):
        return Weights(path, {key.removeprefix("module."): value for key, value in items})
    held = [f"{key} ({type(value).__name__})" for key, value in content.items()]
    raise RunError(
        f"{path} holds {', '.join(held[:6]) or f'a {type(found).__name__}'}; {ACCEPTED}."
    )


def _count_classes(found: Weights) -> int:
    for name in ("linear.bias", "classifier.bias", "fc.bias"):
        if name in found.state:
            return len(found.state[name])
    raise RunError(f"{found.path} has no classifier: it holds {', '.join([*found.state][:6])}.")


def _fill(model: nn.Module, found: Weights, config: Config, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    wrong = faults(own, state)
    if wrong:
        hint = "" if found.config else " Say with --preset which network they are of."
        raise RunError(f"{found.path} does not fit --preset {config.preset}: {wrong}.{hint}")
    model.load_state_dict(own | dict(state))


def _in_our_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by our names, where they have the released code's."""
    if not (isinstance(model, IRevNet) and any(name.startswith("stack.") for name in state)):
        return dict(state)
    ours = released_names(model)
    return {ours.get(name, name): value for name, value in state.items()}
