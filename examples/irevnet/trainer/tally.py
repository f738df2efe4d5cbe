"""Loss, accuracy and speed, summed up on the device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import Team

TOP5_CLASSES = 10  # from how many on the share of images whose class is among five is told


class Tally:
    """Loss, accuracy and speed of an epoch.

    Reading waits for the device, so that it is better not done after every step.
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
