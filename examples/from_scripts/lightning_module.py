"""A module of Lightning, as it is. `main` is the script, `task` the job.

`self.log` outside of Lightning's Trainer warns once and does nothing: return `{"loss": loss, ...}` to have numbers
recorded. `steepest train examples/from_scripts/lightning_module.py:task --epochs 5`
"""

from __future__ import annotations

import lightning
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import steepest

ROWS = 512


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))

    def training_step(self, batch, batch_index):
        inputs, targets = batch
        return functional.cross_entropy(self.network(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def data():
    inputs = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=64, shuffle=True)


def main():
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.fit(Classifier(), data())


def task():
    return steepest.Task(
        model=Classifier(), batch_loss=lambda model, batch: model.training_step(batch, 0), train_data=data()
    )


if __name__ == "__main__":
    main()
