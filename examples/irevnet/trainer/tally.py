"""Loss, accuracy and speed, summed up on the device."""

import time

import torch
from torch import Tensor

from trainer.distributed import Team


class Tally:
    """Loss, accuracy and speed of an epoch, or of what is left of it when a run is resumed.

    Reading waits for the device, so that it is better not done after every step.
    """

    def __init__(self, device: torch.device, classes: int) -> None:
        # Of few classes most are among five.
        self.names = ["loss", "accuracy"] + ["top5_accuracy"] * (classes >= 10)
        self.sums = torch.zeros(len(self.names) + 1, device=device)  # and the number of images
        self.images = 0  # of this process, since it began
        self.waited = 0.0  # seconds for images
        self.began = time.perf_counter()

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds images with their mean loss."""
        images = len(labels)
        guesses = logits.topk(5 if "top5_accuracy" in self.names else 1).indices == labels[:, None]
        sums = [loss * images, guesses[:, 0].sum(), guesses.any(1).sum()][: len(self.names)]
        self.sums += torch.stack([*sums, loss.new_full((), images)])
        self.images += images

    def read(self, team: Team | None = None) -> dict[str, float]:
        """The means: over the images of this process, or of all of a team."""
        *sums, images = (team.total(self.sums) if team else self.sums).tolist()
        return {name: value / images for name, value in zip(self.names, sums, strict=True)}
