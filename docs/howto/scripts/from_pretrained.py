"""Makes the blocks of a GPT-2 of Hugging Face's transformers reversible, and trains on.

The model is trained first for a while, in place of one that others have trained.
"""

import argparse
import copy
import pydoc_data.topics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from invertible import InvertibleSequential, Leapfrog, Momentum, Rebuild, measure_memory


class Step(nn.Module):
    """What a block adds to its input, computed in float32."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, context: tuple[tuple, dict]) -> Tensor:
        args, kwargs = context
        x = x.float()
        return self.block(x, *args, **kwargs) - x


class WithMomentum(nn.Module):
    """Pretrained blocks as steps with momentum, in place of a block."""

    def __init__(
        self, blocks: Iterable[nn.Module], gamma: float, checkpoint: bool | Rebuild = True
    ) -> None:
        super().__init__()
        steps = (Momentum(Step(block), gamma, conditional=True) for block in blocks)
        self.steps = InvertibleSequential(*steps, checkpoint=checkpoint)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        start = x.double()
        y, _ = self.steps((start, torch.zeros_like(start)), (args, kwargs))
        return y.to(x.dtype)


class Midpoint(nn.Module):
    """Pretrained blocks as leapfrog steps, in place of a block."""

    def __init__(self, blocks: Iterable[nn.Module], checkpoint: bool | Rebuild = True) -> None:
        super().__init__()
        steps = (Leapfrog(Step(block), conditional=True) for block in blocks)
        self.steps = InvertibleSequential(*steps, checkpoint=checkpoint)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y1, y2 = self.steps((x, x), (args, kwargs))
        return (y1 + y2) / 2


def make_reversible(model: nn.Module, stack: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """A copy of a GPT-2 with the same parameters, and one reversible block in place of all."""
    model = copy.deepcopy(model)
    model.config.use_cache = False  # which would be filled twice
    model.transformer.h = nn.ModuleList([stack(model.transformer.h, **options)])
    return model


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def batches(text: bytes, seed: int, size: int = 16, length: int = 128) -> Iterable[Tensor]:
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - length, (size,), generator=generator)
        yield torch.stack([data[start : start + length] for start in starts.tolist()])


def train(model: nn.Module, text: bytes, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for _, tokens in zip(range(steps), batches(text, seed=0), strict=False):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, text: bytes, count: int = 8) -> float:
    found = [loss_of(model, x) for _, x in zip(range(count), batches(text, 1), strict=False)]
    return torch.stack(found).mean().item()


def pretrained(layers: int, width: int, steps: int, text: bytes) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"vocab_size": 256, "n_positions": 128, "n_embd": width, "n_layer": layers, "n_head": 4}
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    config = GPT2Config(**size, **rates, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = GPT2LMHeadModel(config)
    train(model, text, steps, lr=1e-3)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pretrain", type=int, default=300, help="steps before")
    parser.add_argument("--steps", type=int, default=50, help="steps after")
    args = parser.parse_args()

    topics = "\n".join(pydoc_data.topics.topics.values()).encode()
    half = len(topics) // 2
    old, new = topics[:half], topics[half:]
    original = pretrained(args.layers, args.width, args.pretrain, old)
    tokens = next(iter(batches(new, seed=2)))
    with torch.no_grad():
        expected = original(tokens).logits
    print(f"standard deviation of logits {expected.std():.2f}")
    print("model                   logits off, worst    mean     loss   after  held MiB  peak MiB")
    models = {"original": original}
    checkpointed = copy.deepcopy(original)
    checkpointed.gradient_checkpointing_enable()
    models["each block checkpointed"] = checkpointed.train()
    for gamma, anchor in ((0.003, 8), (0.03, 12), (0.3, None)):
        models[f"gamma={gamma}, anchors={anchor}"] = make_reversible(
            original, WithMomentum, gamma=gamma, checkpoint=Rebuild(anchor_every=anchor)
        )
    models["midpoint"] = make_reversible(original, Midpoint)
    for name, model in models.items():
        with torch.no_grad():
            off = (model(tokens).logits - expected).abs()
        memory = measure_memory(Logits(model), tokens).as_set
        before = evaluate(model, new)
        tuned = copy.deepcopy(model)
        train(tuned, new, args.steps, lr=3e-4)
        print(
            f"{name:24} {off.max():15.1e} {off.square().mean().sqrt():8.1e} {before:8.3f} "
            f"{evaluate(tuned, new):7.3f} {memory.held / 2**20:9.1f} {memory.peak / 2**20:9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
