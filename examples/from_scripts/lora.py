"""LoRA adapters (Hu et al. 2022) of peft on a frozen network. `main` is the script, `task` the job.

The frozen weights travel to each process once, and no step touches them. `steepest train
examples/from_scripts/lora.py:task --epochs 5`
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import steepest

ROWS = 512


def adapted():
    pretrained = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 3))
    return get_peft_model(pretrained, LoraConfig(r=4, target_modules=["0", "2"], modules_to_save=["4"]))


def data():
    inputs = torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def main():
    model, loss = adapted(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for inputs, targets in DataLoader(data(), batch_size=64, shuffle=True):
        value = loss(model(inputs), targets)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(value.item())


def task():
    return steepest.Task(model=adapted(), loss=nn.CrossEntropyLoss(), train_data=data())


if __name__ == "__main__":
    main()
