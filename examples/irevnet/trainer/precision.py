"""The floating-point type of a training: autocast, and scaled gradients where it needs them."""

from __future__ import annotations

import torch
from torch import Tensor

from experiment.folder import RunError

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """Runs convolutions in a type; weights, statistics, sums and exact states stay float32.

    Args:
        name: As ``--precision``.
        device: Where it runs.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" else "float32"
        if name == "float16" and device.type == "cpu":
            raise RunError(
                "--precision float16 is for GPUs, a hundred times slower than float32 on a CPU: "
                "take float32."
            )
        self.device = device
        self.type = TYPES[name]
        # Gradients below 6e-8 would become 0 in float16; bfloat16 has the range of float32.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.type is torch.float16)

    def autocast(self) -> torch.autocast:
        """The context in which a network and its loss run."""
        return torch.autocast(self.device.type, self.type, enabled=self.type is not torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss to those of the weights."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Changes the weights; not if scaled gradients have left the range of float16."""
        self.scaler.step(optimizer)
        self.scaler.update()
