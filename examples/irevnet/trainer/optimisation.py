"""What moves the weights: the optimizer, the precision of gradients, and an average over steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from errors import RunError
from experiment.settings import Config

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_optimizer(model: nn.Module, config: Config, *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of all weights, norms and biases apart where they do not decay."""
    every = list(model.parameters())
    groups = [{"params": every, "weight_decay": config.weight_decay}]
    if not config.decay_norms:
        groups[0]["params"] = [p for p in every if p.dim() > 1]
        groups.append({"params": [p for p in every if p.dim() <= 1], "weight_decay": 0.0})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, fused=fused)
    return torch.optim.SGD(groups, config.lr, config.momentum, fused=fused)


class Precision:
    """Runs convolutions in a type; weights, statistics, sums and exact states stay float32."""

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

    def step(self, optimizer: torch.optim.Optimizer, clip_norm: float = 0.0) -> None:
        """Changes the weights; not if scaled gradients have left the range of float16."""
        if clip_norm:
            self.scaler.unscale_(optimizer)
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(weights, clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()


class Average:
    """A moving average of a model's weights and buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.state = _copies(model)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes a step's weights in, the steps being counted from 1."""
        new = self.model.state_dict()
        names = [name for name, value in new.items() if value.is_floating_point()]
        share = 1 - min(self.decay, step / (step + 9))
        # Of sharded weights and whole buffers alike, each process moves what it has.
        old, now = ([_local(state[name]) for name in names] for state in (self.state, new))
        torch._foreach_lerp_(old, now, share)
        for name in new.keys() - set(names):  # counts
            self.state[name].copy_(new[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the model's place."""
        own = _copies(self.model)
        self._load(self.state)
        try:
            yield
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, state: dict[str, Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            value.copy_(state[name])


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
