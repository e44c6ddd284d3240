"""A tensor's bytes."""

from __future__ import annotations

import torch


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements, little-endian, in C order; no copy of a contiguous tensor in the host's memory."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
