"""A vision transformer of reversible blocks.

For instance::

    python examples/transformer/vit.py
    python examples/transformer/vit.py --compare
    python examples/transformer/vit.py --data cifar10 --patch 4 --width 192 --layers 9 --steps 20000
    torchrun --nproc-per-node 8 examples/transformer/vit.py --data cifar10 --amp

Without ``--data`` the images are scikit-learn's handwritten digits. The network has the parameters
of an ordinary vision transformer, which ``--compare`` trains beside it. As in the Reversible Vision
Transformer (Mangalam et al., 2022, section 3.2), attention changes one stream and the feed-forward
network the other; both have the full width.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from blocks import memory_by_depth, optimizer_for, transformer
from running import Run, draw, processes, require_new, write_record

DEPTHS = 2, 6, 12, 24, 48  # of which memory is measured
Images = tuple[Tensor, Tensor]  # (N, C, H, W) between 0 and 1, and labels (N,)


@dataclass(frozen=True)
class Config:
    """A vision transformer of reversible blocks."""

    out: Path = Path("runs/vit")  # Folder of record.json, the picture and checkpoints
    # CIFAR-10: the folder of its archive for Python, or one of train*.parquet and test*.parquet,
    # with columns image or img (of bytes) and label; by default scikit-learn's handwritten digits
    data: Path | None = None
    compare: bool = False  # Train the ordinary transformer of the same size as well
    steps: int = 1500  # Of training
    layers: int = 6
    width: int = 64  # Features of a patch
    heads: int = 4  # Of attention
    patch: int = 2  # Pixels along a side
    batch_size: int = 64  # Images in a step, over all processes
    lr: float = 4e-3  # Learning rate: rises for --warmup steps, then falls to a tenth
    warmup: int = 100
    weight_decay: float = 0.05
    dropout: float = 0.0
    shift: int = 1  # Training images move by up to so many pixels
    flip: bool = False  # Mirror every other training image
    checkpoint: bool = True  # Rebuild activations in the backward pass instead of storing them
    amp: bool = False  # Run the sub-networks in bfloat16
    device: str = "auto"  # cpu, cuda, ...; auto is cuda if there is one
    resume: bool = False  # Go on from the checkpoint in --out, with the settings that it had
    save_every: int = 200  # Steps
    seed: int = 0


class ViT(nn.Module):
    """Classifies images ``(N, C, H, W)``; given labels, it returns the mean loss."""

    def __init__(self, config: Config, shape: torch.Size, classes: int, reversible: bool) -> None:
        super().__init__()
        channels, height, width = shape
        if height % config.patch or width % config.patch:
            raise SystemExit(
                f"error: images of {height}x{width} have no patches of {config.patch}."
            )
        count = (height // config.patch) * (width // config.patch)
        self.embed = nn.Conv2d(channels, config.width, config.patch, config.patch)
        self.places = nn.Parameter(0.02 * torch.randn(count, config.width))
        self.body = transformer(
            config.layers,
            config.width,
            config.heads,
            causal=False,
            dropout=config.dropout,
            reversible=reversible,
            checkpoint=config.checkpoint,
        )
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, classes))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        tokens = self.embed(2 * x - 1).flatten(2).transpose(1, 2) + self.places
        logits = self.head(self.body(tokens).mean(1))
        return logits if labels is None else F.cross_entropy(logits, labels)


def read_images(folder: Path | None) -> tuple[Images, Images]:
    """Images to train and to test on."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        return (x[order[360:]], y[order[360:]]), (x[order[:360]], y[order[:360]])
    if (folder / "data_batch_1").exists():
        return read_batches(folder, "data_batch_[1-5]"), read_batches(folder, "test_batch")
    return read_parquet(folder, "train"), read_parquet(folder, "test")


def read_batches(folder: Path, names: str) -> Images:
    """The images of some files of CIFAR-10's archive, which one has to trust: they are pickled."""
    parts = [
        pickle.loads(path.read_bytes(), encoding="bytes") for path in sorted(folder.glob(names))
    ]
    x = torch.from_numpy(np.concatenate([part[b"data"] for part in parts]))
    y = torch.tensor([label for part in parts for label in part[b"labels"]])
    return x.view(-1, 3, 32, 32), y


def read_parquet(folder: Path, part: str) -> Images:
    """The images of all files of a part."""
    from PIL import Image
    from pyarrow import parquet

    files = sorted(folder.glob(f"{part}*.parquet"))
    if not files:
        raise SystemExit(
            f"error: {folder} has neither {part}*.parquet nor CIFAR-10's data_batch_1."
        )
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    decoded = [
        np.array(Image.open(io.BytesIO(row.get("image", row.get("img"))["bytes"])).convert("RGB"))
        for row in rows
    ]
    x = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor([row["label"] for row in rows])


def as_numbers(x: Tensor) -> Tensor:
    """Pixels between 0 and 1."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def augment(x: Tensor, config: Config) -> Tensor:
    """Moves all images of a batch, zeros coming in, and mirrors some."""
    if config.flip:
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
    padded = F.pad(x, [config.shift] * 4)
    height, width = x.shape[2:]
    rows = torch.randint(2 * config.shift + 1, (len(x), 1)) + torch.arange(height)
    columns = torch.randint(2 * config.shift + 1, (len(x), 1)) + torch.arange(width)
    batch = torch.arange(len(x))[:, None, None]
    return padded.movedim(1, -1)[batch, rows[:, :, None], columns[:, None]].movedim(-1, 1)


@torch.no_grad()
def accuracy(network: ViT, images: Images, device: torch.device) -> float:
    """Share of the images that are classified rightly."""
    network.eval()
    x, y = images
    found = [network(as_numbers(part).to(device)).argmax(1).cpu() for part in x.split(500)]
    return (torch.cat(found) == y).float().mean().item()


def train(config: Config, name: str, images: tuple[Images, Images], where: Any) -> dict[str, Any]:
    """Trains one of the two networks; returns what was found."""
    device, rank, ranks = where
    (x, y), test = images
    torch.manual_seed(config.seed)
    network = ViT(config, x.shape[1:], int(y.max()) + 1, name == "reversible").to(device)
    run = Run(config, name, network, optimizer_for(network, config.lr, config.weight_decay))
    per_epoch = len(x) // config.batch_size

    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(config.seed + epoch))
        rows = order[place * config.batch_size : (place + 1) * config.batch_size][rank::ranks]
        return augment(as_numbers(x[rows]), config).to(device), y[rows].to(device)

    losses = run.train(batch_of, device, rank, ranks)
    found = {"losses": losses, "parameters": sum(p.numel() for p in network.parameters())}
    if rank == 0:
        found["test_accuracy"] = accuracy(network, test, device)
        print(f"{name}: {found['test_accuracy']:.2%} of {len(test[0]):,} test images are right.")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, tests and draws."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    names = ["reversible", "ordinary"] if config.compare else ["reversible"]
    images = read_images(config.data)
    (x, y), test = images
    with processes(config.device) as where:
        _, rank, ranks = where
        if config.batch_size % ranks or config.batch_size > len(x):
            raise SystemExit(
                f"error: --batch-size must be a multiple of {ranks} processes, and not more than "
                f"the {len(x)} images there are."
            )
        if rank == 0:
            require_new(config.out, config.resume, *names)
            print(f"{len(x):,} images to learn, {len(test[0]):,} to test.", flush=True)
        found = {name: train(config, name, images, where) for name in names}
        if rank == 0:
            shape, classes = x.shape[1:], int(y.max()) + 1
            memory = memory_by_depth(
                lambda depth: ViT(
                    replace(config, layers=depth, checkpoint=True), shape, classes, reversible=True
                ),
                DEPTHS,
                torch.zeros(config.batch_size, *shape),
            )
            curves = {name: result["losses"] for name, result in found.items()}
            draw(config.out / "vit.png", curves, memory, "nats")
            write_record(config, **found, memory=memory)
            print(f"Picture and numbers are in {config.out}.")


if __name__ == "__main__":
    main()
