"""Processes that train one network together, started by torchrun; or a single one."""

import gc
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from errors import RunError, explained, meaning
from networks import irevnet, resnet


@dataclass(frozen=True)
class Team:
    """The processes that train together, as one of them sees them; all must call its methods."""

    device: torch.device  # this process's
    rank: int = 0  # this process, 0 to ``ranks - 1``
    ranks: int = 1  # how many there are
    joined: bool = False  # whether there is a process group, be it of one process

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def highest(self, number: int) -> int:
        """The highest of the processes' numbers. It does not wait for a GPU."""
        found = torch.tensor(number)
        if self.joined:
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' tensors."""
        found = x.clone()
        if self.joined:
            distributed.all_reduce(found)
        return found

    def gather(self, value: Any) -> list[Any]:
        """The processes' values in the order of their ranks, for the one that leads."""
        found: list[Any] = [value] * self.ranks
        if self.joined:
            distributed.gather_object(value, found if self.leads else None)
        return found

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites tensors with those of the process that leads."""
        for x in tensors if self.joined else ():
            distributed.broadcast(x, 0)

    def shard(self, model: nn.Module) -> None:
        """Leaves each process a share of the model's weights."""
        with meaning("--parallel fsdp needs torch 2.6 or newer, ddp does not", ImportError):
            from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(self.device.type, (self.ranks,))
        for part in model.modules():
            if isinstance(part, irevnet.Bottleneck | resnet.Bottleneck):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)


def sharing_gradients(net: Any, wanted: bool) -> AbstractContextManager[None]:
    """Whether a backward pass adds up the gradients of all processes, or only its own."""
    if isinstance(net, DistributedDataParallel) and not wanted:
        return net.no_sync()
    if hasattr(net, "set_requires_gradient_sync"):  # sharded
        net.set_requires_gradient_sync(wanted)
    return nullcontext()


@contextmanager
def join(device_name: str) -> Iterator[Team]:
    """Joins the other processes that torchrun has started, if it has.

    If one fails, its message is printed and all of them end.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield Team(find_device(device_name))
        return
    store, rank, ranks = next(iter(rendezvous("env://")))
    # The store of torchrun outlives a restart, and what was written into it before.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    try:
        device = own_device(find_device(device_name))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        yield Team(device, rank, ranks, joined=True)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        failures = 0
        with suppress(RuntimeError):  # as when the process that held the store has gone
            failures = store.add("failures", 1)
        if failures == 1 and not interrupted:  # else the failure of another is felt here
            line = explained(error) or traceback.format_exc()
            print(line, f"(process {rank})", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # At once: the others may be waiting in the middle of a sum, and the ordinary way out would
        # wait for them. They notice that this process has gone.
        os._exit(130 if interrupted else 1)
    gc.collect()  # else some processes abort at exit
    distributed.destroy_process_group()


def find_device(name: str) -> torch.device:
    """The device of that name, if it is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # It is an assertion that fails if torch has no CUDA.
    with meaning(f"--device {name} cannot be used", RuntimeError, AssertionError):
        return torch.zeros(0, device=name).device


def own_device(device: torch.device) -> torch.device:
    """One GPU for each process of a machine."""
    if device.type != "cuda":
        return device
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count:
        raise RunError(
            f"each process needs a GPU of its own, and there are {count}: start torchrun with "
            f"--nproc-per-node {count}, or train with --device cpu."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
