"""What a job asks for and its task cannot give is refused."""

from __future__ import annotations

import pytest

from ps.parameters.description import ModelDescription, TensorDescription
from services.jobs.agreement import check_agreement
from services.jobs.task_probe import TaskDescription
from steepest.errors import SpecError
from steepest.spec import spec_from_dict


def _described(**tensors: int) -> TaskDescription:
    """numel of one tensor for each field of the model."""
    fields = {name: (TensorDescription("t", (numel,), "float32"),) for name, numel in tensors.items()}
    one = TensorDescription("p", (1,), "float32")
    model = ModelDescription((one,), fields.get("buffers", ()), (), fields.get("constants", ()))
    return TaskDescription(model, 1, 0, ())


SPEC = spec_from_dict({"task": {"module": "t", "function": "f"}, "steps": 1, "optimizer": {"name": "newton_cg"}})


def test_a_direction_that_does_not_fit_a_message_is_refused() -> None:
    model = ModelDescription((TensorDescription("p", (300 << 20,), "float32"),), (), (), ())
    check_agreement(SPEC, TaskDescription(model, 1, 0, (), products="differences"))
    with pytest.raises(SpecError, match=r"a direction, with buffers, has 1\.2 GiB; at most 1 GiB.*take lbfgs"):
        check_agreement(SPEC, TaskDescription(model, 1, 0, (), products="hessian"))


@pytest.mark.parametrize(("field", "what"), [("constants", "frozen parameters"), ("buffers", "buffers")])
def test_what_does_not_fit_a_message_is_refused(field: str, what: str) -> None:
    check_agreement(SPEC, _described(**{field: 250 << 20}))
    with pytest.raises(SpecError, match=rf"its {what} are 1\.2 GiB; at most 1 GiB"):
        check_agreement(SPEC, _described(**{field: 300 << 20}))
