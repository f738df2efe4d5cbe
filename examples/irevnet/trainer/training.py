"""A network in training: what moves, and what a step does to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from errors import RunError, first_line
from experiment.settings import Config
from images.batches import Batches, Normalise
from images.dataset import MIX
from invertible import RebuildError
from trainer.distributed import Team
from trainer.optimisation import Average, Precision, build_optimizer
from trainer.parallel import (
    compile_blocks,
    like,
    load_model,
    load_optimizer,
    sharing_gradients,
    spread,
    whole,
)
from trainer.tally import Tally
from trainer.weights import begin_with, build_model


class DivergedError(RunError):
    """What was computed has left all bounds."""


class Training:
    """A network in training: everything that a checkpoint keeps, and what moves it on.

    The learning rate and the images are functions of the step, so that they need no state.
    """

    def __init__(self, config: Config, data: tuple[Batches, Batches], team: Team) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.team = team
        self.device = team.device
        self.parts = _parts(config, team)
        self.sharded = team.joined and config.parallel == "fsdp"
        self.precision = Precision(config.precision, self.device)
        if self.sharded and self.precision.type is torch.float16:
            raise RunError("--parallel fsdp does not take --precision float16: take bfloat16.")
        self.train_batches, self.test_batches = data
        self.classes = self.train_batches.images.classes
        self.normalise = Normalise(config.mean, config.std, self.device)
        self.model: nn.Module = build_model(config, len(self.classes))
        self.model = self.model.to(
            self.device,
            # 15 to 30 % less time on a CPU. fully_shard refuses weights in this layout.
            memory_format=torch.contiguous_format if self.sharded else torch.channels_last,
        )  # type: ignore[call-overload]
        if config.sync_batch_norm:
            self.model = _with_shared_statistics(self.model, self.device)
        if config.compile:
            compile_blocks(self.model)
        self.net = spread(self.model, config.parallel, team)
        fused = self.device.type in ("cpu", "cuda") and not self.sharded
        self.optimizer = build_optimizer(self.model, config, fused=fused)
        self.average = Average(self.model, config.ema) if config.ema else None
        if team.rank:  # dropout differs from process to process
            torch.manual_seed((config.seed + team.rank) % 2**64)
        self.epoch = 0  # how many are done
        self.step = 0  # how many are done of the next epoch
        self.best_accuracy, self.best_epoch = 0.0, 0
        self.tally = self.new_tally()
        self.losses: list[Tensor] = []  # of the steps since they were taken last

    def new_tally(self) -> Tally:
        """Counts from 0."""
        return Tally(self.device, len(self.classes))

    @property
    def steps(self) -> int:
        """Steps in a whole epoch."""
        return len(self.train_batches)

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

    def begin(self) -> None:
        """Takes over the weights to begin with, if there are any; all processes must call it."""
        if self.config.weights is None:
            return
        model = build_model(self.config, len(self.classes))
        begin_with(self.config.weights, model, self.config, self.classes)
        load_model(self.model, model.state_dict())
        if self.average is not None:
            self.average = Average(self.model, self.config.ema)

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on as if never stopped; all processes must call it."""
        average = self.average and whole(self.average.state, self.team)
        return {
            "config": self.config.as_dict(),
            "classes": list(self.classes),
            "images": self._images_of_the_run(),
            "epoch": self.epoch,
            "step": self.step,
            "model": whole(self.model.state_dict(), self.team),
            "average": average,
            "optimizer": whole(self.optimizer.state_dict(), self.team),
            "scaler": self.precision.scaler.state_dict(),
            "best_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "tally": self.tally.state(self.team),
            "losses": self.mean_losses(),
            "rng": self.team.gather(_rng_state(self.device)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a state that was saved under the same settings and on the same images."""
        try:
            self._check(state)
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            load_model(self.model, state["model"])
            if self.average is not None:
                own = self.average.state
                self.average.state = {
                    name: like(value, own[name]).to(self.device)
                    for name, value in state["average"].items()
                }
            load_optimizer(self.optimizer, state["optimizer"])
            self.precision.scaler.load_state_dict(state["scaler"])
            self.best_accuracy, self.best_epoch = state["best_accuracy"], state["best_epoch"]
            self.tally.restore(state["tally"], self.team)
            self.losses = list(torch.tensor(state["losses"], device=self.device))
            if self.team.rank < max(1, len(state["rng"])):
                _set_rng_state(state["rng"][self.team.rank], self.device)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise RunError(
                f"the checkpoint is not whole, or of another version: {first_line(error)} "
                f"({type(error).__name__})."
            ) from error

    def _check(self, state: dict[str, Any]) -> None:
        differences = self.config.differences(state["config"])
        if differences:
            raise RunError(f"the run to resume has other settings: {'; '.join(differences)}.")
        changes = [
            f"class {number} was {old!r}, is {new!r}"
            for number, (old, new) in enumerate(zip(state["classes"], self.classes, strict=False))
            if old != new
        ][:1]
        if len(state["classes"]) != len(self.classes):
            changes.append(f"classes were {len(state['classes'])}, are {len(self.classes)}")
        for part, (count, print_) in self._images_of_the_run().items():
            old_count, old_print = state["images"][part]
            if old_count != count:
                changes.append(f"{part} images were {old_count:,}, are {count:,}")
            elif old_print != print_:
                changes.append(f"{part} images have other names or classes")
        if changes:
            raise RunError(
                f"the run was on other images: {'; '.join(changes)}. Give it the same again; or "
                "begin a new one on these, with --weights of this one."
            )

    def _images_of_the_run(self) -> dict[str, tuple[int, int]]:
        parts = {"train": self.train_batches, "test": self.test_batches}
        return {part: (len(b.images), b.images.fingerprint()) for part, b in parts.items()}

    def train(self) -> Iterator[Tally]:
        """Trains to the end of the epoch, giving the tally of it after each step."""
        self.net.train()
        if self.step == 0:
            self.tally = self.new_tally()
        batches = self.train_batches.epoch(self.epoch, self.step)
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
        share = self._share()
        parts = zip(self._images(pixels).chunk(self.parts), labels.chunk(self.parts), strict=True)
        losses = [
            self._backward(x, y, share, last=number == self.parts)
            for number, (x, y) in enumerate(parts, start=1)
        ]
        self.precision.step(self.optimizer, self.config.clip_norm)
        if self.average is not None:
            self.average.update(self.iteration + 1)
        self.losses.append(torch.stack(losses).sum())

    def _share(self) -> float:
        """What each image keeps of itself when it is mixed with another."""
        if not self.config.mixup:
            return 1.0
        rng = self.train_batches.order.generator(MIX, self.epoch, self.step)
        return float(rng.beta(self.config.mixup, self.config.mixup))

    def _backward(self, x: Tensor, labels: Tensor, share: float, *, last: bool) -> Tensor:
        """Adds the gradients of a part of a step; returns what it adds to the mean loss."""
        if share < 1:
            x = torch.lerp(x.flip(0), x, share)
        with sharing_gradients(self.net, last):
            with self.precision.autocast():
                logits = self._logits(self.net, x)
                loss = self._loss(logits, labels)
                if share < 1:
                    loss = torch.lerp(self._loss(logits, labels.flip(0)), loss, share)
            try:
                self.precision.backward(loss / self.parts)
            except RebuildError as error:
                raise DivergedError(
                    f"activations can't be rebuilt in epoch {self.epoch + 1}, as they can with a "
                    f"--quantum or --no-checkpoint. {error}"
                ) from error
        self.tally.add(loss.detach() * len(labels), logits.detach(), labels)
        return loss.detach() / self.parts

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def _images(self, pixels: Tensor) -> Tensor:
        return self.normalise(pixels).contiguous(memory_format=torch.channels_last)

    def _logits(self, net: nn.Module, x: Tensor) -> Tensor:
        try:
            logits: Tensor = net(x).float()
        except ValueError as error:
            if str(error).startswith("Expected more than 1 value per channel"):
                raise RunError(
                    f"a part of {len(x)} image leaves batch statistics one value to a channel, of "
                    "which there is no deviation: give each process and part more images by a "
                    "larger --batch-size or a smaller --accumulate, or take a larger --image-size."
                ) from error
            # Features beyond the range of exact sums.
            raise DivergedError(
                f"training stops after {self.epoch} whole epochs: {error}"
            ) from error
        return logits

    def test(self, after_batch: Callable[[], object]) -> Tally:
        """Goes through the test images; what a call after each batch raises ends it."""
        self.net.eval()
        tally = self.new_tally()
        with self.average.in_place() if self.average else nullcontext(), torch.no_grad():
            self.team.follow(self.model.buffers())
            for pixels, labels in self.test_batches.epoch():
                with self.precision.autocast():
                    logits = self._logits(self.model, self._images(pixels))
                    tally.add(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
                after_batch()
        return tally

    def end_epoch(self, accuracy: float) -> bool:
        """Turns to the next epoch; whether the accuracy is the best so far."""
        self.epoch, self.step = self.epoch + 1, 0
        if accuracy <= self.best_accuracy:
            return False
        self.best_accuracy, self.best_epoch = accuracy, self.epoch
        return True

    def whole_model(self) -> nn.Module:
        """The model, not sharded, in the process that leads; all processes must call it."""
        if not self.sharded and not self.average:
            return self.model
        state = self.average.state if self.average else self.model.state_dict()
        state = whole(state, self.team)
        if not self.team.leads:
            return self.model
        model = build_model(self.config, len(self.classes)).to(self.device)
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
            raise DivergedError(f"the loss is no longer finite in epoch {self.epoch + 1}.")
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
