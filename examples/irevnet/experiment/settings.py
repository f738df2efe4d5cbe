"""The settings of a run."""

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from errors import RunError, at_least, flag, meaning
from experiment.folder import CHECKPOINT, latest_run, read_settings
from presets import IMAGENET, PAPER, PRESETS


def _number_or_none(words: list[str]) -> float | None:
    base, _, exponent = words[0].partition("**")
    return None if base == "none" else float(base) ** float(exponent or 1)


Quantum = Annotated[
    float | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="2**N|none",
        instance_from_str=_number_or_none,
        is_instance=lambda value: value is None or isinstance(value, float),
        str_from_instance=lambda q: ["none" if q is None else f"2**{math.log2(q):g}"],
    ),
]
if TYPE_CHECKING:
    PresetName = str
else:
    PresetName = tyro.extras.literal_type_from_choices(PRESETS)


@dataclass(frozen=True)
class Config:
    """One run. Flags that are not given have the values of the preset's recipe."""

    # Images

    # A folder with train/<class>/<image> and val/<class>/<image>, CIFAR-10 as downloaded
    # (cifar-10-python.tar.gz or the folder in it), a folder of train*.parquet and test*.parquet or
    # val*.parquet, or OWNER/NAME of a data set on the Hugging Face hub. Without it, scikit-learn's
    # handwritten digits
    data: str | None = None
    image_size: int = 224  # Side of the square images in pixels
    # Mean of each channel, white being 1. One channel means grey images
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # Standard deviation of each channel
    # Training images are random crops of the files, 8 to 100 % of the area at sides of 3:4 to 4:3;
    # or images are resized whole and shifted by up to --padding
    augmentation: Literal["resized-crop", "shift"] = "resized-crop"
    padding: int = 4  # Largest shift in pixels, black moving in
    flip: bool = True  # Mirror every other training image
    # How much the colours of training images vary: brightness, contrast, saturation, hue (at most
    # 0.5); 0 leaves each as it is
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    workers: int = 2  # Processes that read images; 0 reads them in the main one

    # Network

    # Network and recipe: b if --data is given, else digits. Those named resnet and revnet are what
    # i-RevNets are compared with
    preset: PresetName = "b"
    # Weights to begin with, as other scripts take them; the classifier is new where the classes are
    # others
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
    # How the learning rate falls: at the milestones, in half a cosine to 0, or in a line to 0
    schedule: Literal["steps", "cosine", "one-cycle"] = "steps"
    milestones: tuple[int, ...] = (32, 64, 96)  # Epochs of --schedule steps
    lr_factor: float = 0.1  # What each milestone multiplies the learning rate by, 0 to 1
    warmup: int = 0  # Epochs in which the learning rate first rises from 0 in a line
    # SGD, or AdamW, which takes a far lower --lr, about 0.001
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # Momentum of SGD, 0 to 1
    weight_decay: float = 1e-4  # Weight decay, per step and learning rate
    decay_norms: bool = True  # Decay norms and biases too, as the paper does
    clip_norm: float = 0.0  # Largest norm of all gradients together; 0 leaves them as they are
    # Decay of a moving average of the weights, such as 0.999, which is tested and kept in their
    # stead; 0 keeps the weights themselves
    ema: float = 0.0
    mixup: float = 0.0  # Mix pairs of images, in shares drawn from Beta(mixup, mixup); 0 mixes none
    label_smoothing: float = 0.0  # Share of a label that is spread over all classes, 0 to 1
    # Parts in which the batch of a step passes through the network, one after the other, to save
    # memory. Batch statistics are those of a part
    accumulate: int = 1
    seed: int = 0  # Seed of weights, order and augmentation

    # Machine

    # cpu, cuda, cuda:1, mps, ...; auto is cuda if there is one. Under torchrun, cuda is the
    # process's own GPU
    device: str = "auto"
    threads: int = 0  # CPU threads that compute; 0 leaves the choice to torch
    # Of convolutions, under autocast; auto is bfloat16 on a GPU, float32 on the CPU
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile: bool = False  # Compile the blocks with torch.compile: slow at first, faster then
    # What processes started by torchrun share: the gradients (DistributedDataParallel), or the
    # weights as well (fully_shard)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    sync_batch_norm: bool = False  # Take batch statistics over all processes. On GPUs

    # Folder

    # Folder of the run, a new one. By default the next free of runs/irevnet/1, 2, ..
    out: Path | None = None
    # Go on with the run in --out, or the latest numbered one, with its settings. Alone it means
    # yes; with auto the same command begins the run in --out or goes on with it
    resume: Literal["no", "yes", "auto"] = "no"
    log_every: int = 50  # Steps between lines of the log; a line has the loss of each step
    save_every: float = 15.0  # Minutes between checkpoints within an epoch; one follows each epoch

    def __post_init__(self) -> None:
        for names, (least, most) in RANGES.items():
            at_least(least, most=most, **{name: getattr(self, name) for name in names.split()})
        at_least(0, most=self.end - 1, warmup=self.warmup)
        if self.jitter[3] > 0.5:
            raise RunError(f"--jitter takes a hue of at most 0.5, got {self.jitter[3]}.")
        if not (len(self.mean) == len(self.std) in (1, 3) and min(self.std) > 0):
            raise RunError(
                "--mean and --std take one number a channel, 1 or 3, deviations above 0."
            )

    @property
    def end(self) -> int:
        """Length of the run: iterations if they are given, else epochs."""
        return self.iterations or self.epochs

    def learning_rate(self, iteration: int, steps: int) -> float:
        """The learning rate of a step of a run whose epochs have so many steps."""
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
            f"{flag(name)} was {saved[name]}, is {value}"
            for name, value in self.as_dict().items()
            if name not in free and saved[name] != value
        ]

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: Path) -> Self:
        """The settings that :meth:`as_dict` gave, also if they went through JSON."""
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        paths = {k: v and Path(v) for k, v in values.items() if k in ("out", "weights")}
        with meaning(f"{origin} has settings of another version", TypeError):
            return cls(**values | paths | {"resume": "no"})


# The least and the highest value of each number; nothing is infinite.
MOST = 1e38
RANGES = {
    "epochs iterations batch_size image_size accumulate log_every": (1, MOST),
    "lr weight_decay clip_norm mixup jitter padding workers threads save_every": (0, MOST),
    "mean std": (-MOST, MOST),
    "lr_factor momentum label_smoothing": (0, 1),
    "ema": (0, 0.999999),
    "seed": (0, 2**63 - 1),
}
# What may change when a run is resumed: where and how it computes, not what; and what is advised
# where a run has diverged.
FREE = {"data", "workers", "device", "threads", "compile", "parallel", "out", "resume"}
FREE |= {"log_every", "save_every", "lr", "clip_norm"}


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
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument(
        "--resume", nargs="?", const="yes", default="auto" if restarted else "no"
    )
    seen, words = first_look.parse_known_args(arguments)
    for name in ("--data", "--preset", "--recipe", "--epochs", "--out"):
        first_look.add_argument(name, nargs="?")
    first_look.parse_known_args(words, seen)
    if seen.resume == "auto" and seen.out is None and not restarted:
        raise RunError("--resume auto needs --out, to find the run again.")
    folder = Path(seen.out) if seen.out else latest_run()
    preset = seen.preset or ("b" if seen.data else "digits")
    if seen.resume != "no" and (folder / CHECKPOINT).is_file():
        default = replace(Config.from_dict(read_settings(folder), folder), out=folder)
    elif seen.resume == "yes":
        raise RunError(f"there is no checkpoint in {folder} to resume: start without --resume.")
    else:  # An unknown name is left to tyro, which lists those that there are.
        default = recipe(preset, seen.recipe or "code") if preset in PRESETS else Config()
    words += ["--resume", seen.resume]
    config = tyro.cli(Config, default=default, args=words, console_outputs=prints)
    if seen.epochs and config.iterations:
        raise RunError(
            f"--epochs and the {config.iterations} --iterations exclude each other: give one."
        )
    if config.data is None or not Path(config.data).exists():
        return config
    return replace(config, data=str(Path(config.data).absolute()))  # found from other folders, too
