"""The best evaluation: its checkpoint stays, and a job ends when there has long been no better one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.service import Service
from steepest.client import Job
from steepest.errors import ConflictError, SpecError
from tests.support.service import until

pytestmark = pytest.mark.cluster

# The learning rate grows until the loss does.
DIVERGING: dict[str, Any] = {
    "steps": 200,
    "data": {"global_batch": 24, "micro_batch": 12},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "schedule": {"name": "step", "step_size": 24, "gamma": 5.0},
    "eval_every": 4,
    "checkpoint_every": 2,
    "best": {"patience": 2},
}


def test_a_job_ends_when_it_gets_no_better_and_keeps_its_best(
    submit: Callable[..., Job], service: Service, tmp_path: Path
) -> None:
    job = submit("evaluated", arguments={"delay": 0.0}, **DIVERGING)
    info = job.wait()
    assert "2 evaluations in a row were no better than loss" in info.reason
    assert info.best_step is not None
    assert info.step == info.best_step + 2 * 4 < 200
    kept = sorted(path.name for path in service.settings.checkpoints_of(job.name.split("/")[1]).iterdir())
    assert kept[0] == f"step-{info.best_step:012d}"
    assert len(kept) == 4
    job.download(tmp_path / "best", best=True)
    manifest = json.loads((tmp_path / "best" / "manifest.json").read_text())
    assert manifest["step"] == manifest["best"]["step"] == info.best_step
    job.download(tmp_path / "last")
    assert json.loads((tmp_path / "last" / "manifest.json").read_text())["step"] == info.step
    job.download(tmp_path / "again", step=info.best_step)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("best", "again")]
    assert same[0] == same[1]
    with pytest.raises(ConflictError, match=rf"no checkpoint of step 1; there are .*{info.best_step}, .*{info.step}"):
        job.download(tmp_path / "none", step=1)
    # A server that dies changes neither the end nor the bits.
    other = submit("evaluated", arguments={"delay": 0.005}, placement={"workers": 2}, **DIVERGING)
    until(lambda: other.get().step >= info.best_step + 5)
    os.kill(other.get().servers[0].pid, signal.SIGKILL)
    end = other.wait()
    assert (end.step, end.best_step, end.state_sha256) == (info.step, info.best_step, info.state_sha256)
    assert end.reason == info.reason


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"best": {"metric": "acuracy"}, "eval_every": 1}, "best.metric", "there are: loss"),
        ({"best": {"patience": 2}}, "spec", "needs evaluations on the way"),
        ({"best": {"patience": 0}, "eval_every": 1}, "best.patience", "0"),
        ({"best": {"mode": "most"}, "eval_every": 1}, "best.mode", "most"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    submit: Callable[..., Job], spec: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(SpecError) as refused:
        submit("regression", steps=2, **spec)
    [violation] = refused.value.violations
    assert violation.field == field
    assert words in violation.problem
