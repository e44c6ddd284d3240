"""What is new of a job, of one that goes back among them."""

from __future__ import annotations

from typing import Any

import pytest

from steepest import follow
from steepest.errors import ServiceUnavailableError
from steepest.jobs import Checkpoint, Evaluation


class Told:
    """A job as its handle tells of it: one reading after another."""

    def __init__(self, *readings: dict[str, Any]) -> None:
        self.readings = list(readings)
        self.now: dict[str, Any] = {}

    def get(self) -> Any:
        self.now = self.readings.pop(0)
        if self.now.get("away"):
            raise ServiceUnavailableError("away")

        class Info:
            incarnation = self.now["incarnation"]
            began_at_step = self.now.get("began", 0)
            has_ended = not self.readings

        return Info

    def history(self, first: int) -> list[dict[str, Any]]:
        return [{"step": step, "of": self.now["incarnation"]} for step in range(self.now["steps"]) if step >= first]

    def evaluations(self, after: int) -> list[Evaluation]:
        return [Evaluation(step, {}) for step in self.now.get("evaluations", ()) if step > after]

    def checkpoints(self, after: int) -> list[Checkpoint]:
        found = [step for step in self.now.get("checkpoints", ()) if step > after]
        return [Checkpoint(step, 0, 0.0, "", "", False, "") for step in reversed(found)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "FOLLOW_SECONDS", 0.0)


def _all(job: Any) -> list[follow.News]:
    return list(follow.news_of(job, True, True, True))


def test_every_record_evaluation_and_checkpoint_comes_once_and_in_order() -> None:
    news = _all(
        Told(
            {"incarnation": 1, "steps": 3, "evaluations": [2]},
            {"incarnation": 1, "steps": 3, "evaluations": [2], "checkpoints": [2]},
            {"incarnation": 1, "steps": 6, "evaluations": [2, 4, 6], "checkpoints": [2, 4, 6]},
        )
    )
    assert [[r["step"] for r in each.records] for each in news] == [[0, 1, 2], [], [3, 4, 5]]
    assert [[e.step for e in each.evaluations] for each in news] == [[2], [], [4, 6]]
    assert [[c.step for c in each.checkpoints] for each in news] == [[], [2], [4, 6]]


def test_what_is_done_again_comes_again_though_the_job_has_gone_farther_since() -> None:
    """At the second reading it had gone back to step 4 and was beyond what was told."""
    first, second = _all(
        Told(
            {"incarnation": 1, "steps": 6, "evaluations": [3, 6], "checkpoints": [4, 6]},
            {"incarnation": 2, "began": 4, "steps": 9, "evaluations": [3, 6, 9], "checkpoints": [4, 8]},
        )
    )
    assert [r["step"] for r in first.records] == [0, 1, 2, 3, 4, 5]
    assert [(r["step"], r["of"]) for r in second.records] == [(step, 2) for step in range(4, 9)]
    assert [e.step for e in second.evaluations] == [6, 9]
    assert [c.step for c in second.checkpoints] == [8]


def test_a_service_that_is_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    away = {"incarnation": 1, "away": True}
    [only] = _all(Told(away, away, {"incarnation": 1, "steps": 2}))
    assert len(only.records) == 2
    monkeypatch.setattr(follow, "AWAY_SECONDS", 0.0)
    with pytest.raises(ServiceUnavailableError):
        _all(Told(away, {"incarnation": 1, "steps": 2}))
