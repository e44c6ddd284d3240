"""Signals of segments against float64 on the same numbers, on the CPU and in operations of PyTorch."""

import numpy as np
import pytest
import torch

from ps.numerics.signals import CpuSignals, DeviceSignals, Signals
from ps.numerics.threads import Threads, split
from ps.parameters.description import ModelDescription, TensorDescription
from ps.parameters.layout import Layout, Shard, build_layout, shards

SIZES = {"big": (300, 500), "odd": (7, 11), "one": (1,), "scalar": ()}


def layout(dtype: str = "float32") -> Layout:
    tensors = tuple(TensorDescription(name, shape, dtype) for name, shape in SIZES.items())
    return build_layout(ModelDescription(tensors, (), tuple((n, n) for n in SIZES)))


def signals(shard: Shard, kind: str) -> Signals:
    if kind == "device":
        return DeviceSignals(shard, torch.device("cpu"))
    ranges = split(shard, 2)
    return CpuSignals(shard, Threads(len(ranges)), ranges)


def numbers(of: Layout, seed: int) -> torch.Tensor:
    """With some zeros, and padding that is zero."""
    flat = torch.zeros(of.numel, dtype=of.dtype)
    generator = torch.Generator().manual_seed(seed)
    for view in of.views(flat):
        view.copy_(torch.randn(view.shape, generator=generator).mul_(torch.rand(view.shape, generator=generator) > 0.2))
    return flat


@pytest.mark.parametrize("kind", ["cpu", "device"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_of_each_parameter_as_in_float64(kind: str, dtype: str) -> None:
    whole = layout(dtype)
    gradient, before, after = numbers(whole, 1), numbers(whole, 2), numbers(whole, 3)
    [shard] = shards(whole, 1)
    measured, update = signals(shard, kind).of_gradient(gradient), signals(shard, kind).of_update(before, after)
    rel = 1e-6 if (kind, dtype) == ("device", "float32") else 1e-12
    views = zip(*(whole.views(flat.double()) for flat in (gradient, before, after)), strict=True)
    for index, (own, old, new) in enumerate(views):
        rows = whole.segment_owners == index
        assert measured[rows, 0].sum() == pytest.approx(float(own.abs().sum()), rel=rel)
        assert measured[rows, 1].max() == float(own.abs().max())
        assert measured[rows, 2].sum() == float((own == 0).sum())
        assert update[rows, 0].sum() == pytest.approx(float(((new - old) ** 2).sum()), rel=rel)
        assert update[rows, 1].sum() == pytest.approx(float((old**2).sum()), rel=rel)


@pytest.mark.parametrize("kind", ["cpu", "device"])
def test_the_bits_do_not_depend_on_the_number_of_shards(kind: str) -> None:
    whole = layout()
    gradient, after = numbers(whole, 1), numbers(whole, 2)

    def measured(count: int) -> tuple[bytes, bytes]:
        parts = [(signals(s, kind), s) for s in shards(whole, count)]
        gradients = [own.of_gradient(gradient[s.start : s.stop]) for own, s in parts]
        updates = [own.of_update(gradient[s.start : s.stop], after[s.start : s.stop]) for own, s in parts]
        return np.concatenate(gradients).tobytes(), np.concatenate(updates).tobytes()

    assert len({measured(count) for count in (1, 2, 3)}) == 1
