"""A reversible model whose activations the Trainer of Hugging Face's transformers has rebuilt."""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split


def residual(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())


class Stack(nn.Module):
    """Reversible blocks, with the switch that transformers looks for."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        blocks = [ReversibleBlock(residual(width), residual(width)) for _ in range(depth)]
        self.layers = InvertibleSequential(Split(dim=-1), *blocks, Merge(dim=-1))

    @property
    def gradient_checkpointing(self) -> bool:
        return bool(self.layers.checkpoint)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.layers.checkpoint = enable

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Config(PretrainedConfig):
    model_type = "reversible"

    def __init__(self, width: int = 8, depth: int = 4, **others: object) -> None:
        self.width = width
        self.depth = depth
        super().__init__(**others)


class Model(PreTrainedModel):
    config_class = Config
    supports_gradient_checkpointing = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.stack = Stack(config.width, config.depth)
        self.head = nn.Linear(2 * config.width, 3)
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.stack(x).mean(1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


if __name__ == "__main__":
    from transformers import Trainer, TrainingArguments

    data = [{"x": torch.randn(10, 16), "labels": i % 3} for i in range(32)]
    settings = TrainingArguments(
        "runs/transformers", gradient_checkpointing=True, max_steps=4, save_strategy="no"
    )
    trainer = Trainer(Model(Config()), settings, train_dataset=data)
    trainer.train()
    assert trainer.model.stack.layers.checkpoint
