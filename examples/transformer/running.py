"""What both programs do around their training: processes, rates, checkpoints, records."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def processes(name: str) -> Iterator[tuple[torch.device, int, int]]:
    """The device, the number of this process and how many there are, as torchrun started them."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        yield torch.device(name), 0, 1
        return
    if name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(name)
    distributed.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    try:
        yield torch.device(name), distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


def learning_rate(step: int, steps: int, highest: float, warmup: int) -> float:
    """Rises in a line, and falls in half a cosine to a tenth."""
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return highest * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


class Run:
    """One network in training, from the beginning or from a checkpoint.

    What a step trains on and draws depends on its number only, so that a resumed run is the
    unbroken one.

    Args:
        config: The program's settings.
        name: Of the checkpoint in the folder.
        network: It returns the loss of a batch.
        optimizer: Its optimizer.
    """

    def __init__(
        self, config: Any, name: str, network: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config, self.name = config, name
        self.network, self.optimizer = network, optimizer
        self.path = config.out / f"{name}.pt"
        self.step = 0
        self.losses: list[Tensor] = []
        if config.resume:
            self._resume()

    def train(
        self,
        batch_of: Callable[[int], tuple[Tensor, ...]],
        device: torch.device,
        rank: int,
        ranks: int,
    ) -> list[float]:
        """Trains to the last step; returns the loss of each."""
        config, began, first = self.config, time.perf_counter(), self.step
        net = DistributedDataParallel(self.network) if ranks > 1 else self.network
        self.network.train()
        while self.step < config.steps:
            torch.manual_seed((config.seed * 1_000_003 + self.step) * ranks + rank)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config.steps, config.lr, config.warmup)
            batch = batch_of(self.step)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss = net(*batch)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            self.losses.append(loss.detach().float().cpu())
            if rank == 0:
                self._tell((time.perf_counter() - began) / (self.step - first))
                if self.step % config.save_every == 0 or self.step == config.steps:
                    self._save()
        return torch.stack(self.losses).tolist()

    def _tell(self, pace: float) -> None:
        steps = self.config.steps
        if self.step % max(1, steps // 20) == 0 or self.step in (1, steps):
            mean = torch.stack(self.losses[-20:]).mean().item()
            left = pace * (steps - self.step)
            print(
                f"{self.name}: step {self.step:6}/{steps}  loss {mean:.3f}  "
                f"{1e3 * pace:.0f} ms a step, {left:.0f} s left",
                flush=True,
            )

    def _save(self) -> None:
        """Writes beside the path, then renames: a killed run keeps its previous checkpoint."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
            "config": _lasting(self.config),
        }
        torch.save(state, self.path.with_suffix(".partial"))
        self.path.with_suffix(".partial").replace(self.path)

    def _resume(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=next(self.network.parameters()).device)
        require_same(state["config"], _lasting(self.config))
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]


def require_same(was: dict[str, str], now: dict[str, str]) -> None:
    """Ends the program if a run is to be resumed with other settings."""
    others = [name for name in now if was.get(name) != now[name]]
    flags = [f"--{name.replace('_', '-')} {was.get(name)}, not {now[name]}" for name in others]
    if flags:
        raise SystemExit(f"error: --resume takes the settings of the run: {'; '.join(flags)}.")


def _lasting(config: Any) -> dict[str, str]:
    """The settings that a resumed run shares with the one before."""
    free = ("out", "resume", "device", "checkpoint", "compare", "save_every")
    return {name: str(value) for name, value in asdict(config).items() if name not in free}


def write_record(config: Any, **found: Any) -> None:
    """Writes ``record.json``, with the settings, the versions and the machine."""
    record = {
        **found,
        "settings": {name: str(value) for name, value in asdict(config).items()},
        "torch": torch.__version__,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    (config.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def draw(
    path: Path, losses: dict[str, list[float]], memory: dict[str, list[float]], unit: str
) -> None:
    """Loss curves, and memory against depth."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, values in losses.items():
        left.plot(smooth(values), label=name)
    left.set(xlabel="step", ylabel=f"loss, {unit}", title="training")
    left.legend()
    for way, style in (("stored", "o--"), ("rebuilt", "o-")):
        right.plot(memory["layers"], memory[way], style, label=f"activations {way}")
    right.set(xlabel="layers", ylabel="MiB", title="held between forward and backward")
    right.set_ylim(bottom=0)
    right.legend()
    figure.savefig(path, dpi=150)


def smooth(losses: list[float], window: int = 20) -> list[float]:
    """Means of the last losses."""
    return [
        sum(part) / len(part)
        for part in (losses[max(0, i - window + 1) : i + 1] for i in range(len(losses)))
    ]


def require_new(out: Path, resume: bool, *names: str) -> None:
    """Makes the folder; an earlier run in it is gone on with, and never overwritten."""
    there = [name for name in names if (out / f"{name}.pt").exists()]
    if there and not resume:
        raise SystemExit(f"error: {out} has a run already: --resume goes on with it.")
    if resume and not there:
        raise SystemExit(f"error: there is no run in {out} to resume.")
    out.mkdir(parents=True, exist_ok=True)
