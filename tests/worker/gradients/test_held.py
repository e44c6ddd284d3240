from __future__ import annotations

import torch

from worker.gradients.held import Held, as_real


def test_each_type_lies_over_the_layout_in_its_own_way() -> None:
    flat = torch.arange(10.0)
    views = [flat[:2], flat[2:6].view(2, 2), flat[6:10]]
    held = Held([torch.float32, torch.complex64, torch.bfloat16])
    plain, numbers, rounded = held.over(views)
    assert plain is views[0]
    assert numbers.tolist() == [2 + 3j, 4 + 5j]
    assert rounded.dtype == torch.bfloat16
    flat += 1
    assert numbers.tolist() == [3 + 4j, 5 + 6j]
    assert rounded.tolist() == [6.0, 7.0, 8.0, 9.0]
    held.refresh()
    assert rounded.tolist() == [7.0, 8.0, 9.0, 10.0]


def test_complex_gradients_are_pairs() -> None:
    assert as_real(torch.tensor([1 + 2j]).conj()).tolist() == [[1.0, -2.0]]
    real = torch.ones(2)
    assert as_real(real) is real
