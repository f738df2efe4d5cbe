"""A network spread over the processes of a distributed run, and its state put together again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from errors import RunError
from invertible import InvertibleSequential
from networks import irevnet, resnet
from networks.revnet import StoredUnit
from trainer.distributed import Team


def spread(model: nn.Module, parallel: str, team: Team) -> nn.Module:
    """What stands for the model in training."""
    if not team.joined:
        return model
    if parallel == "fsdp":
        return _shard(model, team)
    index = [team.device] if team.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=index)


def _shard(model: nn.Module, team: Team) -> nn.Module:
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError as error:
        raise RunError("--parallel fsdp needs torch 2.6 or newer: take ddp.") from error
    mesh = init_device_mesh(team.device.type, (team.ranks,))
    for part in model.modules():
        if isinstance(part, irevnet.Bottleneck | resnet.Bottleneck):
            fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def sharing_gradients(net: Any, wanted: bool) -> AbstractContextManager[None]:
    """Whether a backward pass adds up the gradients of all processes, or only its own."""
    if isinstance(net, DistributedDataParallel) and not wanted:
        return net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):  # sharded
        net.set_requires_gradient_sync(wanted)
    return nullcontext()


def whole(state: Any, team: Team) -> Any:
    """A state with sharded tensors put together, for the process that leads; all must call it."""
    if isinstance(state, dict):
        return {key: whole(value, team) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, team) for value in state]
    if isinstance(state, DTensor):
        found = state.full_tensor()
        return found.cpu() if team.leads else None
    return state


def like(x: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, sharded as another one is."""
    if not isinstance(other, DTensor):
        return x
    return distribute_tensor(x.to(other.device), other.device_mesh, other.placements)


def load_model(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads a whole state, whether the model is sharded or not."""
    own = model.state_dict()
    if state.keys() != own.keys():
        raise RunError("the checkpoint is of another network.")
    model.load_state_dict({name: like(state[name], own[name]) for name in own})


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Loads a whole state, whether the optimizer's weights are sharded or not.

    Its settings stay: which implementation fits depends on where the run goes on.
    """
    weights: Iterable[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        index: {
            # AdamW also has a count.
            name: like(value, weight) if getattr(value, "shape", None) == weight.shape else value
            for name, value in state["state"][index].items()
        }
        for index, weight in enumerate(weights)
        if index in state["state"]
    }
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": sharded, "param_groups": settings})


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
