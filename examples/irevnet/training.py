"""A network in training: what moves, and what an epoch does to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from batches import Data, Normalise
from irevnet import PRESETS, IRevNet
from runs import RunError
from settings import Config


class Training:
    """A network in training: everything that a checkpoint keeps, and what an epoch does to it.

    The learning rate is a function of the epoch, so that it needs no state of its own.
    """

    def __init__(self, config: Config, data: Data, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.data = data
        self.device = device
        self.normalise = Normalise(config.mean, config.std, device)
        self.model = build_model(config, data.classes).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.epoch = 0  # how many are done

    def state(self) -> dict[str, Any]:
        """What :meth:`restore` needs to go on as if never stopped."""
        return {
            "config": self.config.as_dict(),
            "classes": self.data.classes,
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over a state that was saved under the same settings."""
        differences = self.config.differences(state["config"])
        if state["classes"] != self.data.classes:
            differences.append(f"classes were {state['classes']}, are {self.data.classes}")
        if differences:
            raise RunError(f"the run to resume has other settings: {'; '.join(differences)}.")
        self.epoch = state["epoch"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def train_epoch(self, after_step: Callable[[Tally], None]) -> Tally:
        """One pass over the training images."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.epoch)
        self.model.train()
        tally = Tally(self.device)
        for pixels, labels in self.data.train:
            logits = self._logits(pixels)
            loss = F.cross_entropy(logits, labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            tally.add(loss, logits, labels)
            after_step(tally)
        self.epoch += 1
        return tally

    @torch.no_grad()
    def test(self) -> Tally:
        """One pass over the test images."""
        self.model.eval()
        tally = Tally(self.device)
        for pixels, labels in self.data.test:
            logits = self._logits(pixels)
            tally.add(F.cross_entropy(logits, labels), logits, labels)
        return tally

    def _logits(self, pixels: Tensor) -> Tensor:
        try:
            logits: Tensor = self.model(self.normalise(pixels))
        except ValueError as error:  # features beyond the range of exact sums
            raise RunError(
                f"training stops after {self.epoch} whole epochs: {error} Try a lower --lr."
            ) from error
        return logits


def build_model(config: Config, classes: int) -> IRevNet:
    """The network of the preset, for these images."""
    changes: dict[str, Any] = {"in_channels": len(config.mean)}
    if config.blocks is not None:
        changes["blocks"] = config.blocks
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


class Tally:
    """Loss, accuracy and speed since it was made, summed up on the device.

    Reading them waits for the device, so that it is better not done after every step.
    """

    def __init__(self, device: torch.device) -> None:
        self.began = time.perf_counter()
        self.images = 0
        self.sums = torch.zeros(2, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch with its mean loss."""
        correct = (logits.argmax(1) == labels).sum()
        self.sums += torch.stack([loss.detach() * len(labels), correct])
        self.images += len(labels)

    def read(self) -> tuple[float, float]:
        """Mean loss and accuracy."""
        loss, accuracy = (self.sums / self.images).tolist()
        return loss, accuracy

    def seconds(self) -> float:
        """Time since it was made."""
        return time.perf_counter() - self.began

    def speed(self) -> float:
        """Images per second."""
        return self.images / self.seconds()
