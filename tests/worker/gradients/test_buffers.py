from __future__ import annotations

import torch

from worker.gradients.buffers import together


def test_tensors_move_together_and_keep_their_forms() -> None:
    tensors = [torch.ones(2, 3), torch.tensor(4), torch.zeros(0), torch.arange(5).t(), torch.ones(3, 2).t()]
    moved = together(tensors, torch.device("meta"))
    assert [(t.shape, t.dtype, t.device.type) for t in moved] == [(t.shape, t.dtype, "meta") for t in tensors]
    assert len({t.untyped_storage()._cdata for t in moved}) == 2  # one copy for each type


def test_tensors_that_are_there_stay() -> None:
    tensors = [torch.ones(2), torch.tensor(4)]
    assert together(tensors, torch.device("cpu")) is tensors
    assert together([], torch.device("meta")) == []
