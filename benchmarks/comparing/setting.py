"""Where and how networks are run."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """Holds for all sides of a comparison."""

    device: str = "cpu"
    autocast: torch.dtype | None = None
    channels_last: bool = False
    compiled: bool = False
    clock: Literal["wall", "cpu"] = "wall"  # "cpu" leaves out what other processes take

    def now(self) -> float:
        """Seconds on the clock."""
        return time.process_time() if self.clock == "cpu" else time.perf_counter()

    def wait(self) -> None:
        """Returns when the device is done."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def module(self, module: M) -> M:
        """The module, moved."""
        return module.to(self.device, memory_format=self._memory_format)

    def images(self, *shape: int) -> Tensor:
        """Random images, the same on every device; from the 65th on they repeat."""
        count, *rest = shape
        drawn = torch.randn(min(count, 64), *rest).to(self.device)  # thousands would take seconds
        images = drawn.repeat(-(-count // 64), 1, 1, 1)[:count]
        return images.to(memory_format=self._memory_format)

    def compile(self, sub_networks: Iterable[nn.Module]) -> None:
        """Compiles each where it is, if that is asked for."""
        if not self.compiled:
            return
        torch.compiler.reset()  # or versions for other sizes count towards torch's limit of 8
        for sub_network in sub_networks:
            # Module.compile() passes over an nn.Sequential in silence (seen with torch 2.13).
            sub_network.forward = torch.compile(sub_network.forward, dynamic=False)

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def keep_heap() -> None:
    """Lets the C library keep the memory that is freed, for all sides alike.

    glibc gives large blocks back to the system and asks for them anew in the next step. Plain
    training, which holds the most, then spends the most on page faults, more or less of them
    depending on what ran before: saving memory would seem to cost next to no time.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
