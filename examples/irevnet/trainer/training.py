"""A network in training: what moves, and what a step does to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiment.folder import RunError
from experiment.settings import Config
from images.batches import Data, Normalise
from invertible import RebuildError
from networks.presets import PRESETS
from trainer.distributed import Team
from trainer.parallel import (
    compile_blocks,
    load_model,
    load_optimizer,
    sharing_gradients,
    spread,
    whole,
)
from trainer.precision import Precision

TOP5_CLASSES = 10  # from how many on the share of images whose class is among five is told


class Training:
    """A network in training: everything that a checkpoint keeps, and what moves it on.

    The learning rate and the images are functions of the step, so that they need no state.
    """

    def __init__(self, config: Config, data: Data, team: Team) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.data = data
        self.team = team
        self.device = team.device
        self.parts = _parts(config, team)
        self.sharded = team.joined and config.parallel == "fsdp"
        self.precision = Precision(config.precision, self.device)
        if self.sharded and self.precision.type is torch.float16:
            raise RunError("--parallel fsdp does not take --precision float16: take bfloat16.")
        self.normalise = Normalise(config.mean, config.std, self.device)
        self.model = build_model(config, data.classes).to(
            self.device,
            # 15 to 30 % less time on a CPU. fully_shard refuses weights in this layout.
            memory_format=torch.contiguous_format if self.sharded else torch.channels_last,
        )
        if config.sync_batch_norm:
            self.model = _with_shared_statistics(self.model, self.device)
        if config.compile:
            compile_blocks(self.model)
        self.net = spread(self.model, config.parallel, team)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda") and not self.sharded,
        )
        if team.rank:  # dropout differs from process to process
            torch.manual_seed(config.seed + team.rank)
        self.epoch = 0  # how many are done
        self.step = 0  # how many are done of the next epoch
        self.best_accuracy = 0.0
        self.tally = Tally(self.device, data.classes)
        self.losses: list[Tensor] = []  # of the steps since they were taken last

    @property
    def steps(self) -> int:
        """Steps in a whole epoch."""
        return len(self.data.train)

    @property
    def iteration(self) -> int:
        """How many steps are done in the whole run."""
        return self.epoch * self.steps + self.step

    @property
    def iterations(self) -> int:
        """Steps in the whole run."""
        return self.config.iterations or self.config.epochs * self.steps

    @property
    def epochs(self) -> int:
        """Epochs in the whole run, of which the last may be cut short."""
        return math.ceil(self.iterations / self.steps)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on as if never stopped; all processes must call it."""
        return {
            "config": self.config.as_dict(),
            "classes": self.data.classes,
            "epoch": self.epoch,
            "step": self.step,
            "model": whole(self.model.state_dict(), self.team),
            "optimizer": whole(self.optimizer.state_dict(), self.team),
            "scaler": self.precision.scaler.state_dict(),
            "best_accuracy": self.best_accuracy,
            "tally": self.tally.state(self.team),
            "losses": self.mean_losses(),
            "rng": self.team.gather(_rng_state(self.device)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a state that was saved under the same settings."""
        differences = self.config.differences(state["config"])
        if state["classes"] != self.data.classes:
            differences.append(f"classes were {state['classes']}, are {self.data.classes}")
        if differences:
            raise RunError(f"the run to resume has other settings: {'; '.join(differences)}.")
        self.epoch, self.step = state["epoch"], state["step"]
        load_model(self.model, state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])
        self.best_accuracy = state["best_accuracy"]
        self.tally.restore(state["tally"], self.team)
        self.losses = list(torch.tensor(state["losses"], device=self.device))
        if self.team.rank < len(state["rng"]):
            _set_rng_state(state["rng"][self.team.rank], self.device)

    def train(self) -> Iterator[Tally]:
        """Trains to the end of the epoch, giving the tally of it after each step."""
        self.net.train()
        if self.step == 0:
            self.tally = Tally(self.device, self.data.classes)
        batches = self.data.train.epoch(self.epoch, self.step)
        while self.step < self.steps and self.iteration < self.iterations:
            asked = time.perf_counter()
            pixels, labels = next(batches)
            self.tally.waited += time.perf_counter() - asked
            self._train_on(pixels, labels)
            self.step += 1
            yield self.tally

    def _train_on(self, pixels: Tensor, labels: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.iteration)
        self.optimizer.zero_grad()
        parts = zip(self._images(pixels).chunk(self.parts), labels.chunk(self.parts), strict=True)
        losses = [
            self._backward(x, y, last=number == self.parts)
            for number, (x, y) in enumerate(parts, start=1)
        ]
        self.precision.step(self.optimizer)
        self.losses.append(torch.stack(losses).sum())

    def _backward(self, x: Tensor, labels: Tensor, last: bool) -> Tensor:
        """Adds the gradients of a part of a step; returns what it adds to the mean loss."""
        with sharing_gradients(self.net, last):
            with self.precision.autocast():
                logits = self._logits(self.net, x)
                loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            try:
                self.precision.backward(loss / self.parts)
            except RebuildError as error:
                raise RunError(
                    f"activations can't be rebuilt in epoch {self.epoch + 1}: lower --lr, or take "
                    f"a --quantum or --no-checkpoint. {error}"
                ) from error
        self.tally.add(loss.detach() * len(labels), logits.detach(), labels)
        return loss.detach() / self.parts

    def _images(self, pixels: Tensor) -> Tensor:
        return self.normalise(pixels).contiguous(memory_format=torch.channels_last)

    def _logits(self, net: nn.Module, x: Tensor) -> Tensor:
        try:
            logits: Tensor = net(x).float()
        except ValueError as error:  # features beyond the range of exact sums
            raise RunError(
                f"training stops after {self.epoch} whole epochs: {error} Try a lower --lr or "
                "another --quantum."
            ) from error
        return logits

    def test(self, after_batch: Callable[[], object]) -> Tally:
        """Goes through the test images; what a call after each batch raises ends it."""
        self.team.follow(self.model.buffers())
        self.net.eval()
        tally = Tally(self.device, self.data.classes)
        for pixels, labels in self.data.test.epoch():
            with torch.no_grad(), self.precision.autocast():
                logits = self._logits(self.model, self._images(pixels))
                tally.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
            after_batch()
        return tally

    def end_epoch(self, accuracy: float) -> bool:
        """Turns to the next epoch; whether the accuracy is the best so far."""
        self.epoch, self.step = self.epoch + 1, 0
        best = accuracy > self.best_accuracy
        self.best_accuracy = max(accuracy, self.best_accuracy)
        return best

    def whole_model(self) -> nn.Module:
        """The model, not sharded, in the process that leads; all processes must call it."""
        if not self.sharded:
            return self.model
        state = whole(self.model.state_dict(), self.team)
        if not self.team.leads:
            return self.model
        model = build_model(self.config, self.data.classes).to(self.device)
        model.load_state_dict(state)
        return model

    def learning_rate(self, iteration: int) -> float:
        """The learning rate of a step of the run, counted from 0."""
        return self.config.learning_rate(iteration, self.steps)

    def mean_losses(self) -> list[float]:
        """The loss of each step since :meth:`take_losses`; it waits for the device."""
        if not self.losses:
            return []
        losses = self.team.total(torch.stack(self.losses)) / self.team.ranks
        found: list[float] = losses.tolist()
        if not all(map(math.isfinite, found)):
            raise RunError(
                f"the loss is no longer finite in epoch {self.epoch + 1}: lower --lr. The "
                "checkpoint holds the state before."
            )
        return found

    def take_losses(self) -> list[float]:
        """The loss of each step since they were taken last; it waits for the device."""
        losses, self.losses = self.mean_losses(), []
        return losses


def _parts(config: Config, team: Team) -> int:
    """In how many parts this process runs its images of a step."""
    if config.batch_size % (team.ranks * config.accumulate):
        raise RunError(
            f"--batch-size must be a multiple of {team.ranks} processes times --accumulate "
            f"{config.accumulate}, got {config.batch_size}."
        )
    return config.accumulate


def build_model(config: Config, classes: int) -> nn.Module:
    """The network of the preset, for these images."""
    changes: dict[str, Any] = {"in_channels": len(config.mean)}
    if config.blocks is not None:
        changes["blocks"] = config.blocks
    if not config.preset.startswith("resnet"):  # which adds nothing that could be undone
        changes |= {"checkpoint": config.checkpoint, "quantum": config.quantum}
    try:
        model = PRESETS[config.preset](classes, **changes)
    except ValueError as error:
        raise RunError(str(error)) from error
    if config.image_size % model.stride:
        raise RunError(
            f"--image-size must be a multiple of {model.stride} for --preset {config.preset}, got "
            f"{config.image_size}."
        )
    return model


def _with_shared_statistics(model: nn.Module, device: torch.device) -> nn.Module:
    if device.type != "cuda":
        raise RunError(f"--sync-batch-norm is for NVIDIA GPUs only, got --device {device.type}.")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def _rng_state(device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if on_gpu else None,
    }


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


class Tally:
    """Loss, accuracy and speed of an epoch, summed up on the device.

    Reading waits for the device, so that it is better not done after every step.

    Args:
        device: Where the sums are kept.
        classes: Among how many the images are told apart.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        self.names = ["loss", "accuracy"] + ["top5_accuracy"] * (classes >= TOP5_CLASSES)
        self.sums = torch.zeros(len(self.names), device=device)
        self.images = 0  # of this process
        self.waited = 0.0  # seconds for images
        self.before = 0.0  # seconds until the run was interrupted
        self.began = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds images with the sum of their losses."""
        guesses = logits.topk(5 if len(self.names) > 2 else 1).indices == labels[:, None]
        sums = [loss, guesses[:, 0].sum(), guesses.any(1).sum()]
        self.sums += torch.stack(sums[: len(self.names)])
        self.images += len(labels)

    def read(self, team: Team | None = None) -> dict[str, float]:
        """The means: over the images of this process, or of all of a team."""
        sums = torch.cat([self.sums, self.sums.new_tensor([self.images])])
        *found, images = (team.total(sums) if team else sums).tolist()
        return {name: value / images for name, value in zip(self.names, found, strict=True)}

    def seconds(self) -> float:
        """Time that the epoch has taken."""
        return self.before + time.perf_counter() - self.began

    def speed(self) -> float:
        """Images of this process per second."""
        return self.images / self.seconds()

    def state(self, team: Team) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "sums": team.total(self.sums),
            "images": self.images * team.ranks,
            "waited": self.waited,
            "seconds": self.seconds(),
        }

    def restore(self, state: dict[str, Any], team: Team) -> None:
        """Goes on from a state."""
        if team.leads:  # the sums are those of all processes
            self.sums.copy_(state["sums"])
        self.images = state["images"] // team.ranks
        self.waited = state["waited"]
        self.before = state["seconds"]
        self.began = time.perf_counter()
