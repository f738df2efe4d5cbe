"""A GPT of reversible blocks that learns to write, byte by byte.

For instance::

    python examples/transformer/gpt.py
    python examples/transformer/gpt.py --compare
    python examples/transformer/gpt.py --data input.txt --out runs/shakespeare --steps 5000
    python examples/transformer/gpt.py --resume
    torchrun --nproc-per-node 8 examples/transformer/gpt.py --data input.txt --out DIR --amp

Without ``--data`` it reads the topics of Python's own documentation, which come with Python. The
network has the parameters of an ordinary GPT; ``--compare`` trains that one beside it, on the same
bytes. Activations are rebuilt in the backward pass, so that memory does not grow with ``--layers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from blocks import memory_by_depth, optimizer_for, transformer
from running import Run, draw, processes, require_new, write_record

BYTES = 256
DEPTHS = 2, 6, 12, 24, 48  # of which memory is measured


@dataclass(frozen=True)
class Config:
    """A GPT of reversible blocks that learns to write, byte by byte."""

    out: Path = Path("runs/gpt")  # Folder of record.json, the picture, sample.txt and checkpoints
    # Any text; by default the topics of Python's documentation that come with Python
    data: Path | None = None
    compare: bool = False  # Train the ordinary GPT of the same size as well
    steps: int = 1000  # Of training
    layers: int = 4
    width: int = 128  # Features of a token
    heads: int = 4  # Of attention
    length: int = 64  # Bytes that it looks at
    batch_size: int = 16  # Pieces of that length in a step, over all processes
    lr: float = 3e-3  # Learning rate: rises for --warmup steps, then falls to a tenth
    warmup: int = 50
    weight_decay: float = 0.1
    dropout: float = 0.0
    checkpoint: bool = True  # Rebuild activations in the backward pass instead of storing them
    amp: bool = False  # Run the sub-networks in bfloat16
    device: str = "auto"  # cpu, cuda, ...; auto is cuda if there is one
    resume: bool = False  # Go on from the checkpoint in --out, with the settings that it had
    save_every: int = 200  # Steps
    seed: int = 0


class GPT(nn.Module):
    """Returns the mean loss of predicting each next byte of ``(N, T + 1)``, in nats."""

    def __init__(self, config: Config, reversible: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(BYTES, config.width)
        self.places = nn.Embedding(config.length, config.width)
        self.body = transformer(
            config.layers,
            config.width,
            config.heads,
            causal=True,
            dropout=config.dropout,
            reversible=reversible,
            checkpoint=config.checkpoint,
        )
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def logits(self, x: Tensor) -> Tensor:
        """Of the byte behind each of ``(N, T)``; the embedding turns features back to bytes."""
        places = self.places(torch.arange(x.shape[1], device=x.device))
        features = self.norm(self.body(self.tokens(x) + places))
        return F.linear(features, self.tokens.weight)

    def forward(self, text: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    @torch.no_grad()
    def write(self, begin: bytes, count: int, temperature: float = 0.8) -> bytes:
        """Goes on with a text."""
        text = torch.tensor([*begin], device=self.tokens.weight.device)[None]
        for _ in range(count):
            logits = self.logits(text[:, -self.places.num_embeddings :])[:, -1]
            drawn = torch.multinomial((logits / temperature).softmax(-1), 1)
            text = torch.cat([text, drawn], 1)
        return bytes(text[0].tolist())


def read_text(path: Path | None, length: int) -> tuple[Tensor, Tensor]:
    """All bytes, the last tenth of them to test on."""
    if path is None:
        from pydoc_data.topics import topics

        content = "\n\n".join(topics.values()).encode()
    else:
        if not path.is_file():
            raise SystemExit(f"error: there is no file {path}.")
        content = path.read_bytes()
    place = len(content) * 9 // 10
    if len(content) - place <= length:
        raise SystemExit(
            f"error: the text has {len(content)} bytes, too few for --length {length}."
        )
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return data[:place], data[place:]


def pieces(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """Pieces of a text and the byte behind each, ``(N, T + 1)``."""
    return data[starts[:, None] + torch.arange(length + 1)].long()


def test_loss(network: GPT, data: Tensor, config: Config, device: torch.device) -> float:
    """Nats a byte on up to 100 pieces, evenly spread."""
    network.eval()
    starts = torch.linspace(0, len(data) - config.length - 1, 100).long()
    with torch.no_grad():
        losses = [
            network(pieces(data, part, config.length).to(device)) for part in starts.split(10)
        ]
    return torch.stack(losses).mean().item()


def train(config: Config, name: str, data: tuple[Tensor, Tensor], where: Any) -> dict[str, Any]:
    """Trains one of the two networks; returns what was found."""
    device, rank, ranks = where
    torch.manual_seed(config.seed)
    network = GPT(config, reversible=name == "reversible").to(device)
    run = Run(config, name, network, optimizer_for(network, config.lr, config.weight_decay))
    part = slice(rank, None, ranks)

    def batch_of(step: int) -> tuple[Tensor]:
        chosen = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        last = len(data[0]) - config.length
        starts = torch.randint(last, (config.batch_size,), generator=chosen)
        return (pieces(data[0], starts[part], config.length).to(device),)

    losses = run.train(batch_of, device, rank, ranks)
    found = {"losses": losses, "parameters": sum(p.numel() for p in network.parameters())}
    if rank == 0:
        found["test_loss"] = test_loss(network, data[1], config, device)
        torch.manual_seed(config.seed)
        sample = network.write(b"\n", 500).decode(errors="replace")
        (config.out / f"sample-{name}.txt").write_text(sample)
        print(f"{name}: {found['test_loss']:.3f} nats a byte on text that it has not seen.")
        print(f"It writes:\n{sample.strip()}\n")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, tests, writes and draws."""
    config = tyro.cli(Config, args=arguments, description=__doc__)
    names = ["reversible", "ordinary"] if config.compare else ["reversible"]
    data = read_text(config.data, config.length)
    with processes(config.device) as where:
        _, rank, ranks = where
        if config.batch_size % ranks:
            raise SystemExit(f"error: --batch-size must be a multiple of {ranks} processes.")
        if rank == 0:
            require_new(config.out, config.resume, *names)
            print(f"{len(data[0]):,} bytes to learn, {len(data[1]):,} to test.", flush=True)
        found = {name: train(config, name, data, where) for name in names}
        if rank == 0:
            text = torch.zeros(config.batch_size, config.length + 1, dtype=torch.long)
            memory = memory_by_depth(
                lambda depth: GPT(replace(config, layers=depth, checkpoint=True)), DEPTHS, text
            )
            curves = {name: result["losses"] for name, result in found.items()}
            draw(config.out / "gpt.png", curves, memory, "nats a byte")
            write_record(config, **found, memory=memory)
            print(f"Pictures and numbers are in {config.out}.")


if __name__ == "__main__":
    main()
