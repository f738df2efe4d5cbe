"""The settings of a run, and the recipe of each preset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from runs import RunError


@dataclass(frozen=True)
class Config:
    """One run. Flags that are not given have the values of the preset's recipe."""

    data: Path | None = None
    """Folder with train/<class>/<image> and val/<class>/<image>. Without it, scikit-learn's
    handwritten digits."""

    preset: Literal["a", "b", "b-released", "cifar10", "digits"] = "b"
    """Network and recipe: b if --data is given, else digits."""

    blocks: tuple[int, ...] | None = None
    """Blocks in each stage, instead of the preset's."""

    out: Path | None = None
    """Folder of the run, a new one. By default the next free of runs/irevnet/1, 2, ..."""

    resume: bool = False
    """Continue the run in --out, or the latest numbered one, from its checkpoint."""

    epochs: int = 128
    """Passes over the training images."""

    batch_size: int = 256
    """Images in a step; what is left over at the end of an epoch is left out."""

    lr: float = 0.1
    """Learning rate before the first milestone."""

    milestones: tuple[int, ...] = (32, 64, 96)
    """Epochs after which the learning rate is multiplied by lr_factor."""

    lr_factor: float = 0.1
    """What each milestone multiplies the learning rate by, 0 to 1."""

    momentum: float = 0.9
    """Momentum of SGD, 0 to 1."""

    weight_decay: float = 1e-4
    """Weight decay of all parameters, per step and learning rate."""

    image_size: int = 224
    """Side of the square images in pixels."""

    augmentation: Literal["resized-crop", "shift"] = "resized-crop"
    """Training images are random crops of the files, 8 to 100 % of the area at sides of 3:4 to
    4:3; or all images are resized once, kept in memory and shifted by up to --padding."""

    padding: int = 4
    """Largest shift in pixels, black moving in."""

    flip: bool = True
    """Mirror every other training image."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean of each channel, white being 1. One channel means grey images."""

    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, white being 1."""

    seed: int = 0
    """Seed of weights, order and augmentation."""

    workers: int = 2
    """Processes that read image files; 0 reads them in the main one."""

    threads: int = 0
    """CPU threads that compute; 0 leaves the choice to torch."""

    device: str = "auto"
    """cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one, else cpu."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "image_size"):
            _require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} must be at least 1")
        for name in ("lr", "weight_decay", "padding", "workers", "threads"):
            _require(getattr(self, name) >= 0, f"--{name.replace('_', '-')} cannot be negative")
        for name in ("lr_factor", "momentum"):
            _require(0 <= getattr(self, name) <= 1, f"--{name.replace('_', '-')} is 0 to 1")
        _require(
            len(self.mean) == len(self.std) in (1, 3) and min(self.std) > 0,
            "--mean and --std take one number a channel, 1 or 3, deviations above 0",
        )

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        passed = sum(milestone <= epoch for milestone in self.milestones)
        return self.lr * self.lr_factor**passed

    def differences(self, saved: dict[str, Any]) -> list[str]:
        """The settings in which a saved run differs, of those that a resumed one must keep."""
        return [
            f"--{name.replace('_', '-')} was {saved.get(name)}, is {value}"
            for name, value in self.as_dict().items()
            if name not in FREE and saved.get(name) != value
        ]

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


# What may change when a run is resumed: where and how far it runs, not what it computes.
FREE = {"data", "out", "resume", "epochs", "workers", "device"}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RunError(message + ".")


RECIPES = {
    # The released code's for ImageNet, without its colour jitter.
    "a": Config(preset="a"),
    "b": Config(preset="b"),
    "b-released": Config(preset="b-released"),
    # The released code's for CIFAR-10.
    "cifar10": Config(
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
    ),
    # 8x8 pixels are enlarged: a shift by 2 is one of theirs.
    "digits": Config(
        preset="digits",
        epochs=30,
        batch_size=64,
        milestones=(15, 25),
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
    ),
}


def parse(arguments: Sequence[str]) -> Config:
    """Reads the flags; what they leave open comes from the recipe that they choose."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--data", nargs="?")
    first_look.add_argument("--preset", nargs="?")
    seen, _ = first_look.parse_known_args(arguments)
    recipe = RECIPES.get(seen.preset or ("b" if seen.data else "digits"), Config())
    return tyro.cli(Config, default=recipe, args=arguments)
