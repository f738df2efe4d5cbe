"""Trains a reversible network with Lightning."""

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from invertible import InvertibleSequential, Merge, ReversibleBlock, Split


def residual() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))


class Classifier(lightning.LightningModule):
    def __init__(self, checkpoint: bool = True) -> None:
        super().__init__()
        blocks = [ReversibleBlock(residual(), residual()) for _ in range(4)]
        self.network = InvertibleSequential(Split(), *blocks, Merge(), checkpoint=checkpoint)
        self.head = nn.Linear(16, 3)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, label = batch
        return nn.functional.cross_entropy(self.head(self.network(x)), label)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(model: Classifier, **settings: object) -> None:
    data = TensorDataset(torch.randn(64, 16), torch.randint(3, (64,)))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, **settings
    )
    trainer.fit(model, DataLoader(data, batch_size=16))


if __name__ == "__main__":
    train(Classifier(), precision="bf16-mixed", gradient_clip_val=1.0)
