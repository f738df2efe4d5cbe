"""What moves the weights: the optimizer, the precision of gradients, and an average over steps."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from errors import RunError
from invertible import InvertibleSequential
from networks import resnet
from networks.revnet import StoredUnit

if TYPE_CHECKING:  # so that benchmarks can compile blocks without tyro
    from experiment.settings import Config


def build_optimizer(model: nn.Module, config: "Config", *, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of all weights, norms and biases apart where they do not decay."""
    every = list(model.parameters())
    groups = [{"params": every, "weight_decay": config.weight_decay}]
    if not config.decay_norms:
        groups[0]["params"] = [p for p in every if p.dim() > 1]
        groups.append({"params": [p for p in every if p.dim() <= 1], "weight_decay": 0.0})
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, config.lr, fused=fused)
    return torch.optim.SGD(groups, config.lr, config.momentum, fused=fused)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Runs convolutions in a type; weights, statistics, sums and exact states stay float32."""
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    if precision == "float16" and device.type == "cpu":
        raise RunError(
            "--precision float16 is for GPUs, a hundred times slower than float32 on a CPU: "
            "take float32."
        )
    return torch.autocast(device.type, getattr(torch, precision), enabled=precision != "float32")


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """Takes a step's weights and buffers into their average, the steps being counted from 1."""
    share = 1 - min(decay, step / (step + 9))
    for kind in (nn.Module.parameters, nn.Module.buffers):  # of which the former may be sharded
        old, new = ([x for x in kind(each) if x.is_floating_point()] for each in (average, model))
        torch._foreach_lerp_(old, new, share)


def compile_blocks(model: nn.Module) -> None:
    """Compiles the blocks in place, each by itself; names of parameters stay as they are."""
    # Blocks share their code, but not their shapes: each shape is compiled, up to this limit.
    # With dynamic shapes instead, which torch tries by itself, torch 2.13 fails.
    torch._dynamo.config.cache_size_limit = 64
    for part in model.modules():
        if isinstance(part, InvertibleSequential):
            part.compile_subnetworks(dynamic=False)
        elif isinstance(part, resnet.Bottleneck | StoredUnit):
            part.compile(dynamic=False)
