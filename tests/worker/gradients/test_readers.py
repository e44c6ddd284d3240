"""What readers send is what they read."""

from __future__ import annotations

from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from worker.gradients.readers import SMALL_BYTES, _send

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64, torch.uint8, torch.bool,
)  # fmt: skip


def _sent(value: Any) -> Any:
    ours, theirs = Pipe()
    _send(theirs, value)
    return ours.recv()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5)], ids=str)
def test_a_small_tensor_arrives_with_its_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    tensor = values.bool() if dtype == torch.bool else values.view(dtype)
    got = _sent({"x": (tensor, 3)})["x"]
    assert got[1] == 3
    assert (got[0].dtype, got[0].shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(got[0].view(torch.uint8), tensor.view(torch.uint8))
    got[0].zero_()  # it may be written to


def test_tensors_that_are_large_strided_or_conjugated_arrive() -> None:
    for tensor in (
        torch.arange(SMALL_BYTES, dtype=torch.float32),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.randn(3, dtype=torch.complex64).conj(),
    ):
        got = _sent(tensor)
        assert got.stride() == tensor.stride()
        assert torch.equal(got, tensor)
