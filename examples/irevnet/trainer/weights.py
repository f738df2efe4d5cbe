"""Trained networks in files: those of our runs, those converted from them, and the published one.

Whatever the file, nothing in it is run: it can hold tensors and plain values only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiment.folder import CHECKPOINT, RUNS, RunError, folder_to_resume, writing
from experiment.settings import RECIPES, Config
from networks.irevnet import describe, find_faults, load_released, released_names
from networks.presets import PRESETS, Classifier
from trainer.training import build_model

# Those whose weights the released code can have trained.
RELEASED = ("b-released", "cifar10", "b", "a")


@dataclass(frozen=True)
class Network:
    """A trained network and what is known of it.

    Args:
        model: In evaluation mode.
        config: The settings of the run that trained it; of published weights, the released code's.
        classes: Number of classes.
        origin: Where it comes from, in one line.
    """

    model: Classifier
    config: Config
    classes: int
    origin: str


def load_network(path: Path | None, device: torch.device) -> Network:
    """Reads a trained network.

    Args:
        path: A run's folder, a checkpoint, a ``.safetensors`` file of :func:`save_weights`, or a
            checkpoint of the released code such as ``ILSVRC_trained_irevnet.pth.tar``. None is the
            latest run under runs/irevnet.
        device: Where the network goes.

    Raises:
        RunError: If there is no such file, or it holds something else.
    """
    path = _find(path)
    network = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    network.model.to(device).eval()
    return network


def save_weights(path: Path, network: Network) -> None:
    """Writes a network as a ``.safetensors`` file.

    Its metadata are the preset, the number of classes, the origin, and in JSON all settings.

    Raises:
        RunError: If it cannot be written; a file that was there is untouched then.
    """
    # Tensors that share memory are refused.
    state = {key: value.clone().contiguous() for key, value in network.model.state_dict().items()}
    metadata = {
        "format": "pt",
        "preset": network.config.preset,
        "classes": str(network.classes),
        "origin": network.origin,
        "settings": json.dumps(network.config.as_dict()),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(state, partial, metadata)
            partial.replace(path)
    except SafetensorError as error:  # for instance a full disk
        raise RunError(f"cannot write {path}: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def _find(path: Path | None) -> Path:
    if path is None:
        try:
            path = folder_to_resume(None)
        except RunError as error:
            raise RunError(
                f"there is no run under {RUNS}: train one, or give --weights."
            ) from error
    if path.is_dir():
        path /= CHECKPOINT
    if not path.is_file():
        raise RunError(
            f"there is no {path}: weights are in a run's folder, its {CHECKPOINT}, a .safetensors "
            "file of convert.py or a .pth.tar of the released code."
        )
    return path


def _read_safetensors(path: Path) -> Network:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"cannot read {path}: {error}.") from error
    if not metadata.keys() >= {"settings", "classes", "origin"}:
        raise RunError(f"{path} does not say which network it is of: write it with convert.py.")
    config = _settings(path, json.loads(metadata["settings"]))
    return _network(path, config, int(metadata["classes"]), state, metadata["origin"])


def _read_checkpoint(path: Path) -> Network:
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RunError(f"cannot read {path}: {reason}") from error
    keys = found.keys() if isinstance(found, dict) else set()
    if keys >= {"config", "classes", "model"}:
        return _of_our_run(path, found)
    if "state_dict" in keys:
        return _of_the_released_code(path, found)
    content = ", ".join(map(str, keys)) or f"a {type(found).__name__}"
    raise RunError(
        f"{path} is no checkpoint of train_imagenet.py, nor of the released code, which would have "
        f"a state_dict: it holds {content}."
    )


def _of_our_run(path: Path, found: Mapping[str, Any]) -> Network:
    config = _settings(path, found["config"])
    origin = f"{path}: {config.preset}, epochs trained: {found['epoch']}"
    return _network(path, config, found["classes"], found["model"], origin)


def _of_the_released_code(path: Path, found: Mapping[str, Any]) -> Network:
    state = {key.removeprefix("module."): value for key, value in found["state_dict"].items()}
    classes = len(state.get("linear.bias", [0]))
    preset = min(RELEASED, key=lambda name: _distance(name, classes, state))
    # In floating point, as it was trained: nothing kept its states in the range of exact sums.
    config = replace(RECIPES[preset], quantum=None)
    model = build_model(config, classes)
    try:
        load_released(model, state)
    except ValueError as error:
        raise RunError(f"{path} is nearest to {preset} of the released code. {error}") from error
    return Network(model, config, classes, f"{path}: {preset} of the released code")


def _distance(preset: str, classes: int, state: Mapping[str, Tensor]) -> int:
    """In how many weights a state differs from what the released code has for a preset."""
    with torch.device("meta"):
        model = PRESETS[preset](classes)
    own = model.state_dict()
    expected = {key: own[name] for key, name in released_names(model).items()}
    return sum(map(len, find_faults(expected, state).values()))


def _settings(path: Path, values: Mapping[str, Any]) -> Config:
    try:
        return Config.from_dict(values)
    except TypeError as error:
        raise RunError(f"{path} has settings of another version: {error}.") from error


def _network(
    path: Path, config: Config, classes: int, state: dict[str, Tensor], origin: str
) -> Network:
    model = build_model(config, classes)
    own = model.state_dict()
    faults = find_faults(own, state)
    if faults:
        raise RunError(f"{path} does not fit --preset {config.preset}: {describe(faults)}.")
    model.load_state_dict(own | state)
    return Network(model, config, classes, origin)


def _numpy_scalars() -> list[Callable[..., Any]]:
    """What a file may call besides what makes tensors: accuracies were numpy's numbers at times."""
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    types = {type(np.dtype(name)) for name in ("float32", "float64", "int32", "int64")}
    return [*map(_scalar_of, modules), np.dtype, *types]


def _scalar_of(module: str) -> Callable[..., Any]:
    def scalar(dtype: np.dtype[Any], data: bytes) -> Any:
        return np.frombuffer(data, dtype)[0]

    # The name by which a file calls it.
    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar
