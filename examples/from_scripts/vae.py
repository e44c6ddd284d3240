"""A variational autoencoder (Kingma and Welling 2014). `main` is the script, `task` the job.

`steepest train examples/from_scripts/vae.py:task --epochs 5`
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import steepest

ROWS, PIXELS, LATENT = 512, 64, 8


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, 64), nn.ReLU(), nn.Linear(64, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 64), nn.ReLU(), nn.Linear(64, PIXELS))

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(latent), mean, log_variance


def negative_elbo(model, x):
    """Of each sample."""
    logits, mean, log_variance = model(x)
    reconstruction = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
    return reconstruction + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def images():
    generator = torch.Generator().manual_seed(0)
    pattern = torch.rand(ROWS, 4, generator=generator) @ torch.rand(4, PIXELS, generator=generator)
    return (pattern > pattern.mean()).float()


def main():
    model = VAE()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for x in DataLoader(images(), batch_size=64, shuffle=True):
        loss = negative_elbo(model, x).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(loss.item())


def task():
    return steepest.Task(model=VAE(), batch_loss=negative_elbo, train_data=steepest.ArrayData(images()))


if __name__ == "__main__":
    main()
