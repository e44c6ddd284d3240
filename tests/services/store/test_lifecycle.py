from __future__ import annotations

import pytest

from services.store.lifecycle import ENDED, MOVES, VERBS, JobState, check_move, check_verb
from steepest.errors import ConflictError
from steepest.jobs import ENDED_STATES


def test_every_state_has_its_moves_and_ends_have_none() -> None:
    assert set(MOVES) == set(JobState)
    assert {state for state, following in MOVES.items() if not following} == ENDED
    assert {str(state) for state in ENDED} == ENDED_STATES


def test_every_state_can_be_reached_and_can_end() -> None:
    reached = {JobState.QUEUED}
    while True:
        more = reached | {following for state in reached for following in MOVES[state]}
        if more == reached:
            break
        reached = more
    assert reached == set(JobState)
    for state in set(JobState) - ENDED:
        assert JobState.CANCELLING in MOVES[state] or state == JobState.CANCELLING


def test_illegal_moves_and_verbs_say_what_is_legal() -> None:
    with pytest.raises(ConflictError, match="trainingJobs/a is SUCCEEDED; it cannot become RUNNING"):
        check_move("trainingJobs/a", JobState.SUCCEEDED, JobState.RUNNING)
    with pytest.raises(ConflictError, match="pause is possible in: RUNNING, PAUSING, PAUSED"):
        check_verb("trainingJobs/a", JobState.QUEUED, "pause")
    for verb, states in VERBS.items():
        for state in states:
            check_verb("trainingJobs/a", state, verb)
