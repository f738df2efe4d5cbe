"""Glow: a flow of images at several scales, trained in memory that is flat in depth.

For instance::

    python examples/densities/glow.py --out runs/glow
    python examples/densities/glow.py --out runs/glow --resume
    python examples/densities/glow.py --out runs/cifar --data cifar-10-python.tar.gz --levels 3
    torchrun --nproc-per-node 8 examples/densities/glow.py --out runs/cifar --data DIR --amp

Without ``--data`` the images are scikit-learn's handwritten digits. ``record.json`` has the bits
per dimension of the test images. What a step draws depends on its number only, so that a resumed
run is the unbroken one, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from invertible import Flow
from multiscale import make_flow
from small_images import read_images, save_grid
from vectors import write_record


@dataclass(frozen=True)
class Config:
    """Glow: a flow of images at several scales, trained in memory that is flat in depth."""

    out: Path  # Folder of record.json, the pictures and checkpoint.pt
    # CIFAR-10: its archive, the folder in it, or a folder of train*.parquet and test*.parquet; by
    # default scikit-learn's handwritten digits
    data: Path | None = None
    levels: int = 2  # Scales, each of half the height and width
    depth: int = 8  # Steps of the flow at each of them
    width: int = 64  # Channels of the couplings' networks
    steps: int = 1200  # Of training
    batch_size: int = 64  # Images a step, over all processes
    lr: float = 1e-3  # Learning rate of Adam: rises for --warmup steps, then falls to 0
    warmup: int = 100
    flip: bool = False  # Mirror every other image
    temperature: float = 0.7  # Of the second half of the samples
    checkpoint: bool = True  # Rebuild activations in the backward pass instead of storing them
    amp: bool = False  # Run the networks in bfloat16
    device: str = "auto"  # cpu, cuda, ...; auto is cuda if there is one
    resume: bool = False  # Go on from the checkpoint in --out, with the settings that it had
    save_every: int = 250  # Steps
    seed: int = 0


class Loss(nn.Module):
    """Bits per dimension of a batch, as a module for DistributedDataParallel."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> Tensor:
        return self.flow.bits_per_dim(x).mean()


@contextmanager
def processes(config: Config) -> Iterator[tuple[torch.device, int, int]]:
    """The device, the number of this process and how many there are, as torchrun started them."""
    name = config.device
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


def batch_of(images: Tensor, step: int, config: Config, rank: int, ranks: int) -> Tensor:
    """The images of a step for this process; seeds what is drawn in it."""
    epoch, place = divmod(step, len(images) // config.batch_size)
    order = torch.randperm(
        len(images), generator=torch.Generator().manual_seed(config.seed + epoch)
    )
    rows = order[place * config.batch_size : (place + 1) * config.batch_size][rank::ranks]
    torch.manual_seed((config.seed * 1_000_003 + step) * ranks + rank)
    x = images[rows]
    mirrored = torch.rand(len(x), 1, 1, 1) < (0.5 if config.flip else 0.0)
    return torch.where(mirrored, x.flip(-1), x)


def learning_rate(step: int, config: Config) -> float:
    """Rises in a line, and falls in half a cosine."""
    rising = min(1.0, (step + 1) / max(1, config.warmup))
    return config.lr * rising * (1 + math.cos(math.pi * step / config.steps)) / 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes beside the path, then renames: a killed run keeps its previous checkpoint."""
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def comparable(config: Config) -> dict[str, str]:
    """The settings that a resumed run shares with the one before."""
    return {name: str(x) for name, x in asdict(replace(config, out=Path(), resume=False)).items()}


def require_same(was: dict[str, str], now: dict[str, str]) -> None:
    """Ends the program if a run is to be resumed with other settings."""
    others = [name for name in now if was.get(name) != now[name]]
    flags = [f"--{name.replace('_', '-')} {was.get(name)}, not {now[name]}" for name in others]
    if flags:
        raise SystemExit(f"error: --resume takes the settings of the run: {'; '.join(flags)}.")


def train(
    flow: Flow, images: Tensor, config: Config, device: torch.device, rank: int, ranks: int
) -> Tensor:
    """Trains, from the checkpoint if asked; returns bits per dimension by step."""
    path = config.out / "checkpoint.pt"
    optimizer = torch.optim.Adam(flow.parameters(), lr=config.lr)
    begin, history = 0, []
    if config.resume:
        if not path.exists():
            raise SystemExit(f"error: there is no {path} to resume.")
        state = torch.load(path, map_location=device)
        require_same(state["config"], comparable(config))
        flow.load_state_dict(state["flow"])
        optimizer.load_state_dict(state["optimizer"])
        begin, history = state["step"], state["history"]
    else:  # ActNorm begins with the first batch, before all processes share their parameters
        with torch.no_grad():
            flow.log_prob(batch_of(images, 0, config, rank, ranks).to(device))
    loss_of = Loss(flow)
    model = DistributedDataParallel(loss_of) if ranks > 1 else loss_of
    started = time.perf_counter()
    for step in range(begin, config.steps):
        x = batch_of(images, step, config, rank, ranks).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 50.0)
        optimizer.step()
        done = step + 1
        history.append(loss.detach().float().cpu())
        if rank == 0 and (done % max(1, config.steps // 20) == 0 or done == config.steps):
            pace = (time.perf_counter() - started) / (done - begin)
            mean = torch.stack(history[-50:]).mean().item()
            print(
                f"step {done:6}/{config.steps}  {mean:.3f} bits/dim  {pace:.3f} s/step", flush=True
            )
        if rank == 0 and (done % config.save_every == 0 or done == config.steps):
            state = {"flow": flow.state_dict(), "optimizer": optimizer.state_dict(), "step": done}
            save(path, state | {"history": history, "config": comparable(config)})
    return torch.stack(history)


@torch.no_grad()
def measure(flow: Flow, images: Tensor, device: torch.device) -> Tensor:
    """Bits per dimension of each image."""
    torch.manual_seed(0)
    return torch.cat([flow.bits_per_dim(x.to(device)).cpu() for x in images.split(256)])


@torch.no_grad()
def draw(flow: Flow, images: Tensor, shades: int, config: Config, device: torch.device) -> int:
    """Samples, images that went there and back, and ways between images; returns wrong pixels."""
    torch.manual_seed(0)
    rows = [flow.sample((12,), temperature=t).cpu() for t in [1.0] * 3 + [config.temperature] * 3]
    save_grid(rows, shades, config.out / "samples.png")
    half = min(6, len(images) // 2)
    x = images[: 2 * half].to(device)
    z = flow.layer(x)
    back = flow.layer.inverse(z)
    save_grid([x.cpu(), back.cpu()], shades, config.out / "reconstructions.png")
    angles = torch.linspace(0, math.pi / 2, 12, device=device).view(-1, 1, 1, 1)
    ways = [
        flow.layer.inverse(
            tuple(part[i] * angles.cos() + part[i + half] * angles.sin() for part in z)
        )
        for i in range(half)
    ]
    save_grid([way.cpu() for way in ways], shades, config.out / "interpolation.png")
    return int((back != x).sum())


def draw_curve(history: Tensor, out: Path) -> None:
    """Bits per dimension by step."""
    figure = Figure(figsize=(5, 3), layout="constrained")
    ax = figure.subplots()
    ax.plot(history.numpy(), linewidth=0.7)
    ax.set(xlabel="step", ylabel="bits per dimension of a batch")
    ax.set_ylim(history.min().item() - 0.1, history.quantile(0.99).item() + 0.1)
    figure.savefig(out / "curve.png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, measures the test images, and draws."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    begin = time.perf_counter()
    images, test, shades = read_images(config.data)
    if config.batch_size > len(images):
        raise SystemExit(f"error: --batch-size is more than the {len(images)} images there are.")
    with processes(config) as (device, rank, ranks):
        torch.manual_seed(config.seed)
        sizes = config.levels, config.depth, config.width
        flow = make_flow(images.shape[1:], shades, *sizes, config.checkpoint).to(device)
        config.out.mkdir(parents=True, exist_ok=True)
        history = train(flow, images, config, device, rank, ranks)
        if rank == 0:
            flow.eval()
            found = measure(flow, test, device)
            wrong = draw(flow, test, shades, config, device)
            draw_curve(history, config.out)
            write_record(
                config.out,
                config,
                time.perf_counter() - begin,
                bits_per_dim=found.mean().item(),
                standard_error=found.std().item() / len(found) ** 0.5,
                wrong_pixels_of_reconstructions=wrong,
            )


if __name__ == "__main__":
    main()
