"""Processes that train one network together, started by torchrun; or a single one."""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from errors import RunError


@dataclass(frozen=True)
class Team:
    """The processes that train together, as one of them sees them.

    What they share, all of them must call.
    """

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
        if not self.joined:
            return number
        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def total(self, x: Tensor) -> Tensor:
        """The sum of the processes' tensors."""
        if not self.joined:
            return x
        found = x.clone()
        distributed.all_reduce(found)
        return found

    def gather(self, value: Any) -> list[Any]:
        """The processes' values in the order of their ranks, for the one that leads."""
        if not self.joined:
            return [value]
        found: list[Any] = [None] * self.ranks
        distributed.gather_object(value, found if self.leads else None)
        return found

    def follow(self, tensors: Iterator[Tensor]) -> None:
        """Overwrites tensors with those of the process that leads."""
        if self.joined:
            for x in tensors:
                distributed.broadcast(x, 0)


@contextmanager
def join(device_name: str) -> Iterator[Team]:
    """Joins the other processes that torchrun has started, if it has.

    If one fails, its message is printed and all of them end.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield Team(find_device(device_name))
        return
    # A store of ours, which tells who failed first. That of torchrun outlives a restart, and what
    # the processes before have written into it.
    shared, rank, ranks = next(iter(rendezvous("env://")))
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", shared)
    try:
        device = own_device(find_device(device_name))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(
            backend, store=PrefixStore("group", store), rank=rank, world_size=ranks
        )
        yield Team(device, rank, ranks, joined=True)
    except BaseException as error:
        if _fails_first(store):  # else it is the failure of another that is felt here
            _explain(error, rank)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: the others may be waiting in the middle of a sum, and the ordinary way out would
        # wait for them. They notice that this process has gone.
        os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)
    gc.collect()  # else some processes abort at exit
    distributed.destroy_process_group()


def _fails_first(store: Store) -> bool:
    try:
        return store.add("failures", 1) == 1
    except RuntimeError:  # the process that held the store has gone
        return False


def _explain(error: BaseException, rank: int) -> None:
    if isinstance(error, RunError):
        print(f"error: {error} (process {rank})", file=sys.stderr)
    elif not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)


def find_device(name: str) -> torch.device:
    """The device of that name, if it is there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # an assertion if torch has no CUDA
        raise RunError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error


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
