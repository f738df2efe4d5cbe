"""The settings of a run."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from errors import RunError, at_least
from experiment.folder import folder_to_resume, read_settings
from presets import IMAGENET, PAPER, PRESETS


def _power_of_two(values: list[str]) -> float | None:
    [text] = values
    if text.lower() == "none":
        return None
    base, _, exponent = text.partition("**")
    if base != "2":
        raise ValueError(f"expected a power of two such as 2**-16, or none, got {text}")
    return 2.0 ** int(exponent)


def _how_to_resume(values: list[str]) -> str:
    if values not in ([], ["auto"]):
        raise ValueError(f"expected nothing more or auto, got {' '.join(values)}")
    return "auto" if values else "yes"


Quantum = Annotated[
    float | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="2**N|none",
        instance_from_str=_power_of_two,
        is_instance=lambda value: value is None or isinstance(value, float),
        str_from_instance=lambda q: ["none" if q is None else f"2**{math.frexp(q)[1] - 1}"],
    ),
]
Resume = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[auto]",
        instance_from_str=_how_to_resume,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value],
    ),
]
PresetName = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(PRESETS) + "}",
        choices=tuple(PRESETS),
        instance_from_str=lambda values: values[0],
        is_instance=lambda value: value in PRESETS,
        str_from_instance=lambda value: [value],
    ),
]


@dataclass(frozen=True)
class Config:
    """One run. Flags that are not given have the values of the preset's recipe."""

    # Images

    # Images to train and test on: a folder with train/<class>/<image> and val/<class>/<image>,
    # CIFAR-10 as downloaded (cifar-10-python.tar.gz or the folder in it), a folder of
    # train*.parquet and test*.parquet or val*.parquet, or OWNER/NAME of a data set on the Hugging
    # Face hub. Without it, scikit-learn's handwritten digits
    data: str | None = None
    image_size: int = 224  # Side of the square images in pixels
    # Mean of each channel, white being 1. One channel means grey images
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    # Standard deviation of each channel, white being 1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    # Training images are random crops of the files, 8 to 100 % of the area at sides of 3:4 to 4:3;
    # or all images are resized once, kept in memory and shifted by up to --padding
    augmentation: Literal["resized-crop", "shift"] = "resized-crop"
    padding: int = 4  # Largest shift in pixels, black moving in
    flip: bool = True  # Mirror every other training image
    # How much the colours of training images vary: brightness, contrast, saturation, hue (at most
    # 0.5); 0 leaves each as it is
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    workers: int = 2  # Processes that read image files; 0 reads them in the main one

    # Network

    # Network and recipe: b if --data is given, else digits. Those named resnet and revnet are what
    # i-RevNets are compared with
    preset: PresetName = "b"
    # Weights to begin with, as other scripts take them; the classifier is new where the number of
    # classes is another
    weights: Path | None = None
    blocks: tuple[int, ...] | None = None  # Blocks in each stage, instead of the preset's
    # Grid of the states of an i-RevNet or RevNet, on which their sums are exact; none computes in
    # floating point, where rebuilt activations are off by rounding, and those of networks that pad
    # with zeros (a, cifar10) are stored as far as the zeros reach
    quantum: Quantum = 2**-16
    # Rebuild the activations of an i-RevNet or RevNet in the backward pass instead of storing them
    checkpoint: bool = True

    # Optimisation

    # For ImageNet: 128 epochs and a tenth of the learning rate every 32, as in the released code;
    # or 600,000 steps and a tenth every 160,000, as in the paper
    recipe: Literal["code", "paper"] = "code"
    epochs: int = 128  # Passes over the training images
    # Steps to train, instead of --epochs. --milestones and --warmup then count steps too
    iterations: int | None = None
    # Images in a step, all processes and parts together; what is left over at the end of an epoch
    # is left out
    batch_size: int = 256
    lr: float = 0.1  # Learning rate, the highest one
    # How the learning rate falls behind the warm-up: at the milestones, in half a cosine to 0, or
    # in a line to 0
    schedule: Literal["steps", "cosine", "one-cycle"] = "steps"
    # Epochs after which --schedule steps multiplies the learning rate by --lr-factor
    milestones: tuple[int, ...] = (32, 64, 96)
    lr_factor: float = 0.1  # What each milestone multiplies the learning rate by, 0 to 1
    warmup: int = 0  # Epochs in which the learning rate first rises from 0 in a line
    # SGD, or AdamW, which takes a far lower --lr, about 0.001
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # Momentum of SGD, 0 to 1
    weight_decay: float = 1e-4  # Weight decay, per step and learning rate
    # Decay norms and biases, too, as the paper does, not only the weights of convolutions and of
    # the classifier
    decay_norms: bool = True
    # Largest norm of all gradients together: larger ones are scaled down to it; 0 leaves all
    clip_norm: float = 0.0
    # Decay of a moving average of the weights, such as 0.999, which is tested and kept in their
    # stead; 0 keeps the weights themselves
    ema: float = 0.0
    # Trains on pairs of images, mixed in shares drawn from Beta(mixup, mixup); 0 mixes none
    mixup: float = 0.0
    # Share of a label that is spread over all classes in training, 0 to 1
    label_smoothing: float = 0.0
    # Parts in which the batch of a step passes through the network, one after the other, to save
    # memory. Batch statistics are those of a part
    accumulate: int = 1
    seed: int = 0  # Seed of weights, order and augmentation

    # Machine

    # cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else cpu. Under torchrun, cuda is
    # the process's own GPU
    device: str = "auto"
    threads: int = 0  # CPU threads that compute; 0 leaves the choice to torch
    # Of convolutions, under autocast; auto is bfloat16 on a GPU, float32 on the CPU
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False  # Compile the blocks with torch.compile: slow at first, faster then
    # What processes started by torchrun share: the gradients (DistributedDataParallel), or the
    # weights as well (fully_shard)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    # Take batch statistics over the images of all processes instead of each its own. On GPUs
    sync_batch_norm: bool = False

    # Folder

    # Folder of the run, a new one. By default the next free of runs/irevnet/1, 2, ..
    out: Path | None = None
    # Go on with the run in --out, or the latest numbered one, from its checkpoint. Its settings are
    # those of the run. With auto the same command begins the run in --out or goes on with it
    resume: Resume = "no"
    log_every: int = 50  # Steps between lines of the log; a line has the loss of each step
    # Minutes between checkpoints within an epoch. One follows each epoch in any case
    save_every: float = 15.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            for number in value if isinstance(value, tuple) else (value,):
                finite = not isinstance(number, float) or math.isfinite(number)
                self._require(field.name, finite, "must be finite")
        counts = ("epochs", "iterations", "batch_size", "image_size", "accumulate", "log_every")
        at_least(1, **{name: getattr(self, name) for name in counts})
        amounts = ("lr", "weight_decay", "padding", "workers", "threads", "warmup", "save_every")
        for name in (*amounts, "clip_norm", "mixup"):
            self._require(name, getattr(self, name) >= 0, "cannot be negative")
        for name in ("lr_factor", "momentum", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) <= 1, "is 0 to 1")
        self._require("ema", 0 <= self.ema < 1, "is 0 to below 1")
        self._require("seed", -(2**63) <= self.seed < 2**64, "takes 64 bits")
        self._require("warmup", self.warmup < self.end, f"must be below the {self.end} of the run")
        self._require("jitter", min(self.jitter) >= 0, "cannot be negative")
        self._require("jitter", self.jitter[3] <= 0.5, "takes a hue of at most 0.5")
        if not (len(self.mean) == len(self.std) in (1, 3) and min(self.std) > 0):
            raise RunError(
                "--mean and --std take one number a channel, 1 or 3, deviations above 0."
            )

    def _require(self, name: str, condition: bool, what: str) -> None:
        if not condition:
            raise RunError(f"{_flag(name)} {what}, got {getattr(self, name)}.")

    @property
    def end(self) -> int:
        """Length of the run: iterations if they are given, else epochs."""
        return self.iterations or self.epochs

    def learning_rate(self, iteration: int, steps: int) -> float:
        """The learning rate of a step."""
        unit = 1 if self.iterations else steps  # in which the schedule counts
        position = iteration / unit
        if position < self.warmup:
            return self.lr * (iteration + 1) / (self.warmup * unit)
        if self.schedule == "steps":
            passed = sum(milestone <= position for milestone in self.milestones)
            return self.lr * self.lr_factor**passed
        done = (position - self.warmup) / (self.end - self.warmup)
        left = 1 - done if self.schedule == "one-cycle" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * left

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """The settings in which a saved run differs, of those that a resumed one must keep."""
        # With the other schedules the length changes the learning rate of every step.
        free = FREE | {"epochs"} if self.schedule == "steps" else FREE
        saved = Config().as_dict() | dict(saved)  # a setting may be newer than the run
        return [
            f"{_flag(name)} was {saved[name]}, is {value}"
            for name, value in self.as_dict().items()
            if name not in free and saved[name] != value
        ]

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The settings that :meth:`as_dict` gave, also if they went through JSON."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        for name in ("out", "weights"):
            values[name] = None if values.get(name) is None else Path(values[name])
        return cls(**values | {"resume": "no"})


# What may change when a run is resumed: where and how it computes, not what; and what is advised
# where a run has diverged.
FREE = {
    *("data", "workers"),
    *("lr", "clip_norm"),
    *("device", "threads", "compile", "parallel"),
    *("out", "resume", "log_every", "save_every"),
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def recipe(preset: str, name: str = "code") -> Config:
    """The settings with which a preset is trained."""
    found = PRESETS[preset].recipe
    if name != "paper":
        return Config(preset=preset, **found)
    if found is not IMAGENET:
        raise RunError(f"--recipe paper is for the networks for ImageNet, not for {preset}.")
    return Config(preset=preset, recipe="paper", **found, **PAPER)


def parse(arguments: Sequence[str], *, prints: bool = True) -> Config:
    """Reads the flags; what they leave open has the run that is resumed, or else the recipe."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--data", "--preset", "--recipe", "--epochs", "--out"):
        first_look.add_argument(flag, nargs="?")
    first_look.add_argument("--resume", nargs="?", const="yes", default="no")
    seen, _ = first_look.parse_known_args(arguments)
    if seen.resume == "auto" and seen.out is None:
        raise RunError("--resume auto needs --out, to find the run again.")
    # How often torchrun has started this command again.
    if seen.resume == "no" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        seen.resume = "auto"
    default = _of_the_run(seen) or _of_the_recipe(seen)
    config = tyro.cli(Config, default=default, args=arguments, console_outputs=prints)
    if seen.epochs and config.iterations:
        raise RunError(
            f"--epochs and the {config.iterations} --iterations exclude each other: give one."
        )
    data = config.data
    if data is not None and Path(data).exists():  # found from other folders, too
        data = str(Path(data).absolute())
    return replace(config, resume=seen.resume, data=data)


def _of_the_run(seen: argparse.Namespace) -> Config | None:
    """The settings of the run that is resumed, if one is."""
    if seen.resume == "no":
        return None
    folder = folder_to_resume(seen.out and Path(seen.out), needed=seen.resume == "yes")
    if folder is None:
        return None
    try:
        return replace(Config.from_dict(read_settings(folder)), out=folder)
    except TypeError as error:
        raise RunError(f"{folder} has settings of another version: {error}.") from error


def _of_the_recipe(seen: argparse.Namespace) -> Config:
    preset = seen.preset or ("b" if seen.data else "digits")
    # An unknown name is left to tyro, which lists those that there are.
    return recipe(preset, seen.recipe or "code") if preset in PRESETS else Config()
