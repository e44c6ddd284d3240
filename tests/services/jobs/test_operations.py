"""What is refused of a job before anything starts, without a cluster."""

from __future__ import annotations

import pytest

from ps.parameters.description import ModelDescription, TensorDescription
from services.jobs.operations import _check_messages
from services.jobs.task_probe import TaskDescription
from steepest.errors import SpecError


def _described(**tensors: int) -> TaskDescription:
    """numel of one tensor for each field of the model."""
    fields = {name: (TensorDescription("t", (numel,), "float32"),) for name, numel in tensors.items()}
    one = TensorDescription("p", (1,), "float32")
    model = ModelDescription((one,), fields.get("buffers", ()), (), fields.get("constants", ()))
    return TaskDescription(model, 1, 0, ())


@pytest.mark.parametrize(("field", "what"), [("constants", "frozen parameters"), ("buffers", "buffers")])
def test_what_does_not_fit_a_message_is_refused(field: str, what: str) -> None:
    _check_messages(_described(**{field: 250 << 20}))
    with pytest.raises(SpecError, match=rf"its {what} are 1\.2 GiB; at most 1 GiB"):
        _check_messages(_described(**{field: 300 << 20}))
