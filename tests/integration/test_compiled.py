"""Jobs whose model is compiled by torch.compile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import steepest
from harness.local_job import hashes, run_here, run_processes
from tests.support.submission import RefusedError, rehearsed, spec_of, submitted
from worker.data.sources import source_of
from worker.gradients.compiled import compile_model
from worker.gradients.losses import loss_of
from worker.task.load import load_task

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::ResourceWarning"),
]

TASK = "tests.support.tasks:slow"


def _config(directory: Path, **raw: Any) -> Any:
    # The last step of an epoch of 101 samples is short, so there are several shapes.
    spec = {"steps": 9, "optimizer": {"name": "momentum", "lr": 0.01}, "data": {"global_batch": 32}, **raw}
    return submitted(directory, TASK, arguments={"delay": 0.0}, **spec)


def test_a_compiled_model_is_trained_as_it_is_and_at_any_placement(tmp_path: Path) -> None:
    expected = run_here(_config(tmp_path / "eager"))
    one = run_processes(_config(tmp_path / "one", compile=True), 1, seconds=300)
    three = run_processes(_config(tmp_path / "three", compile=True), 3, seconds=300)
    assert hashes(one) == hashes(three)
    for name, value in expected.model.items():
        torch.testing.assert_close(one.model[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", [TASK, "examples.from_scripts.digits:task", "examples.charlm:transformer"])
def test_the_whole_model_is_one_graph(task: str) -> None:
    from torch._dynamo.utils import counters

    model = load_task(spec_of(task, steps=1).task, None, 0)
    assert isinstance(model, steepest.Task)
    torch._dynamo.reset()
    counters.clear()
    compile_model(model.model)
    loss_of(model)(source_of(model.train_data).batch(np.arange(4)), 4).value.backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(RefusedError, match="no model for torch"):
        rehearsed("tests.support.tasks:least_squares", steps=2, compile=True)


def test_curvature_of_a_compiled_model_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"(?s)cannot be differentiated twice.*leave it out") as refused:
        rehearsed(TASK, arguments={"delay": 0.0}, steps=2, compile=True, telemetry={"curvature_every": 2})
    assert refused.value.field == "telemetry.curvature_every"
