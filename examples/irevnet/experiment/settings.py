"""The settings of a run, and the recipe of each preset."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from experiment.folder import RunError


def _power_of_two(values: list[str]) -> float | None:
    [text] = values
    if text.lower() == "none":
        return None
    base, _, exponent = text.partition("**")
    if base != "2":
        raise ValueError(f"expected a power of two such as 2**-16, or none, got {text}")
    return 2.0 ** int(exponent)


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


@dataclass(frozen=True)
class Config:
    """One run. Flags that are not given have the values of the preset's recipe."""

    # Images

    data: str | None = None
    """Images to train and test on: a folder with train/<class>/<image> and val/<class>/<image>,
    CIFAR-10 as downloaded (cifar-10-python.tar.gz or the folder in it), a folder of train*.parquet
    and test*.parquet or val*.parquet, or OWNER/NAME of a data set on the Hugging Face hub. Without
    it, scikit-learn's handwritten digits."""

    image_size: int = 224
    """Side of the square images in pixels."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, white being 1. One channel means grey images."""

    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, white being 1."""

    augmentation: Literal["resized-crop", "shift"] = "resized-crop"
    """Training images are random crops of the files, 8 to 100 % of the area at sides of 3:4 to
    4:3; or all images are resized once, kept in memory and shifted by up to --padding."""

    padding: int = 4
    """Largest shift in pixels, black moving in."""

    flip: bool = True
    """Mirror every other training image."""

    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """How much the colours of training images vary: brightness, contrast, saturation, hue (at
    most 0.5); 0 leaves each as it is."""

    workers: int = 2
    """Processes that read image files; 0 reads them in the main one."""

    # Network

    preset: Literal[
        *("a", "b", "b-released", "cifar10", "cifar10-small", "digits"),
        *("resnet50", "resnet-cifar10", "resnet-digits"),
        *("revnet56", "revnet-cifar10", "revnet-digits"),
    ] = "b"
    """Network and recipe: b if --data is given, else digits. Those named resnet and revnet are
    what i-RevNets are compared with."""

    blocks: tuple[int, ...] | None = None
    """Blocks in each stage, instead of the preset's."""

    quantum: Quantum = 2**-16
    """Grid of the states of an i-RevNet or RevNet, on which their sums are exact; none computes in
    floating point."""

    checkpoint: bool = True
    """Rebuild the activations of an i-RevNet or RevNet in the backward pass instead of storing
    them."""

    # Optimisation

    recipe: Literal["code", "paper"] = "code"
    """For ImageNet: 128 epochs and a tenth of the learning rate every 32, as in the released code;
    or 600,000 steps and a tenth every 160,000, as in the paper."""

    epochs: int = 128
    """Passes over the training images."""

    iterations: int | None = None
    """Steps to train, instead of --epochs. --milestones and --warmup then count steps too."""

    batch_size: int = 256
    """Images in a step, all processes and parts together; what is left over at the end of an epoch
    is left out."""

    lr: float = 0.1
    """Learning rate, the highest one."""

    schedule: Literal["steps", "cosine", "one-cycle"] = "steps"
    """How the learning rate falls behind the warm-up: at the milestones, in half a cosine to 0, or
    in a line to 0."""

    milestones: tuple[int, ...] = (32, 64, 96)
    """Epochs after which --schedule steps multiplies the learning rate by --lr-factor."""

    lr_factor: float = 0.1
    """What each milestone multiplies the learning rate by, 0 to 1."""

    warmup: int = 0
    """Epochs in which the learning rate first rises from 0 in a line."""

    momentum: float = 0.9
    """Momentum of SGD, 0 to 1."""

    weight_decay: float = 1e-4
    """Weight decay of all parameters, per step and learning rate."""

    label_smoothing: float = 0.0
    """Share of a label that is spread over all classes in training, 0 to 1."""

    accumulate: int = 1
    """Parts in which the batch of a step passes through the network, one after the other, to save
    memory. Batch statistics are those of a part."""

    seed: int = 0
    """Seed of weights, order and augmentation."""

    # Machine

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else cpu. Under torchrun, cuda is
    the process's own GPU."""

    threads: int = 0
    """CPU threads that compute; 0 leaves the choice to torch."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of convolutions, under autocast; auto is bfloat16 on a GPU, float32 on the CPU."""

    compile: bool = False
    """Compile the blocks with torch.compile: slow at first, faster then."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What processes started by torchrun share: the gradients (DistributedDataParallel), or the
    weights as well (fully_shard)."""

    sync_batch_norm: bool = False
    """Take batch statistics over the images of all processes instead of each its own. On GPUs."""

    # Folder

    out: Path | None = None
    """Folder of the run, a new one. By default the next free of runs/irevnet/1, 2, ..."""

    resume: bool = False
    """Continue the run in --out, or the latest numbered one, from its checkpoint."""

    log_every: int = 50
    """Steps between lines of the log; a line has the loss of each step."""

    save_every: float = 15.0
    """Minutes between checkpoints within an epoch. One follows each epoch in any case."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size", "accumulate", "log_every"):
            self._require(name, getattr(self, name) >= 1, "must be at least 1")
        self._require(
            "iterations", self.iterations is None or self.iterations >= 1, "must be at least 1"
        )
        for name in ("lr", "weight_decay", "padding", "workers", "threads", "warmup", "save_every"):
            self._require(name, getattr(self, name) >= 0, "cannot be negative")
        for name in ("lr_factor", "momentum", "label_smoothing"):
            self._require(name, 0 <= getattr(self, name) <= 1, "is 0 to 1")
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
        """The learning rate of a step.

        Args:
            iteration: Number of the step in the whole run, counted from 0.
            steps: Steps in an epoch.
        """
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
        return [
            f"{_flag(name)} was {saved.get(name)}, is {value}"
            for name, value in self.as_dict().items()
            if name not in free and saved.get(name) != value
        ]

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The settings that :meth:`as_dict` gave, also if they went through JSON."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        out = values.get("out")
        return cls(**values | {"out": None if out is None else Path(out)})


# What may change when a run is resumed: where and how it computes, not what.
FREE = {
    *("data", "workers"),
    *("device", "threads", "compile", "parallel"),
    *("out", "resume", "log_every", "save_every"),
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# The released code's.
_IMAGENET = Config(jitter=(0.87, 0.5, 0.5, 0.2))
_CIFAR10 = Config(
    preset="cifar10",
    epochs=200,
    batch_size=128,
    milestones=(60, 120, 160),
    lr_factor=0.2,
    weight_decay=5e-4,
    image_size=32,
    augmentation="shift",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
)
# Ours, for few epochs.
_CIFAR10_SMALL = replace(_CIFAR10, epochs=30, schedule="one-cycle", warmup=5)
# 8x8 pixels are enlarged: a shift by 2 is one of theirs.
_DIGITS = Config(
    preset="digits",
    epochs=18,
    batch_size=64,
    schedule="cosine",
    weight_decay=5e-4,
    image_size=16,
    augmentation="shift",
    padding=2,
    flip=False,
    mean=(0.31,),
    std=(0.32,),
    # So small a network gains 7 % from a second thread, and with two it becomes 30 times slower
    # when another process takes one of two cores.
    threads=1,
)

RECIPES: dict[str, Config] = {
    **{name: replace(_IMAGENET, preset=name) for name in ("a", "b", "b-released")},
    **{name: replace(_IMAGENET, preset=name) for name in ("resnet50", "revnet56")},
    "cifar10": _CIFAR10,
    "cifar10-small": replace(_CIFAR10_SMALL, preset="cifar10-small"),
    "resnet-cifar10": replace(_CIFAR10_SMALL, preset="resnet-cifar10"),
    "revnet-cifar10": replace(_CIFAR10_SMALL, preset="revnet-cifar10"),
    "digits": _DIGITS,
    "resnet-digits": replace(_DIGITS, preset="resnet-digits"),
    "revnet-digits": replace(_DIGITS, preset="revnet-digits"),
}


def find_recipe(preset: str, name: str = "code") -> Config:
    """The settings with which a preset is trained."""
    recipe = RECIPES[preset]
    if name == "code":
        return recipe
    if recipe.image_size != _IMAGENET.image_size:
        raise RunError(f"--recipe {name} is for the networks for ImageNet, not for {preset}.")
    milestones = (160_000, 320_000, 480_000)
    return replace(recipe, recipe="paper", iterations=600_000, milestones=milestones)


def parse(arguments: Sequence[str], *, prints: bool = True) -> Config:
    """Reads the flags; what they leave open comes from the recipe that they choose.

    Args:
        arguments: The words of the command line.
        prints: Whether help and complaints are printed.
    """
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--data", "--preset", "--recipe", "--epochs"):
        first_look.add_argument(flag, nargs="?")
    seen, _ = first_look.parse_known_args(arguments)
    preset = seen.preset or ("b" if seen.data else "digits")
    # An unknown name is left to tyro, which lists those that there are.
    recipe = find_recipe(preset, seen.recipe or "code") if preset in RECIPES else Config()
    config = tyro.cli(Config, default=recipe, args=arguments, console_outputs=prints)
    if seen.epochs and config.iterations:
        raise RunError(
            f"--epochs and the {config.iterations} --iterations exclude each other: give one."
        )
    return config
