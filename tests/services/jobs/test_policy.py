from __future__ import annotations

import pytest

from ps.step.effects import Phase
from services.cluster.processes import Exit, ExitKind, Started, explain_status, named
from services.jobs.policy import (
    End,
    GiveBack,
    LetGo,
    Move,
    Patience,
    Recover,
    Replace,
    on_finding,
    on_phase,
    on_server_loss,
    on_worker_exit,
)
from services.jobs.team import Team, WorkerState
from services.store.lifecycle import JobState
from tests.support.documented import is_documented

DIED = Exit(ExitKind.DIED, "was killed by signal 9 (SIGKILL)")


def test_deaths_count_until_a_step_is_made() -> None:
    patience = Patience(2)
    assert [patience.is_exhausted_by_death_at(5) for _ in range(3)] == [False, False, True]
    assert not patience.is_exhausted_by_death_at(6)
    assert not patience.is_exhausted_by_death_at(4)  # after a return to a checkpoint, older steps are no progress
    assert patience.is_exhausted_by_death_at(6)


@pytest.mark.parametrize(
    ("action", "state", "becomes"),
    [
        ("record", JobState.RUNNING, None),
        ("pause", JobState.RUNNING, JobState.PAUSING),
        ("pause", JobState.PAUSING, None),
        ("pause", JobState.RECOVERING, None),
        ("cancel", JobState.RUNNING, JobState.CANCELLING),
        ("cancel", JobState.PAUSED, JobState.CANCELLING),
        ("cancel", JobState.CANCELLING, None),
        ("cancel", JobState.SUCCEEDED, None),
    ],
)
def test_a_finding_does_what_the_spec_asks(action: str, state: JobState, becomes: JobState | None) -> None:
    move = on_finding("diverging", "the loss is 3 times what it was", action, state)
    assert (move and move.state) == becomes
    if move is not None:
        assert move.reason.startswith(f"{action} asked for by the rule diverging (health.actions.diverging): the loss")


def test_a_lost_server_takes_the_job_back_to_its_checkpoint() -> None:
    def decide(checkpoint: int | None, *, limit: int = 3, cancelling: bool = False) -> Recover | End:
        return on_server_loss(Patience(limit), "server-0 was killed", 7, checkpoint, cancelling=cancelling)

    assert decide(5) == Recover("server-0 was killed; returning to the checkpoint of step 5")
    again = decide(None)
    assert again == Recover("server-0 was killed; there is no checkpoint, starting again from step 0")
    assert is_documented("a server is killed before there is a checkpoint", again.reason)
    assert decide(5, cancelling=True) == End(JobState.CANCELLED, "cancelled")
    end = decide(5, limit=0)
    assert isinstance(end, End)
    assert (end.state, end.reason) == (JobState.FAILED, "its servers keep dying")
    assert end.error == "server-0 was killed (1 deaths without progress; placement.max_worker_restarts = 0)"


@pytest.mark.parametrize(
    ("state", "end", "decision"),
    [
        (WorkerState.RUNNING, DIED, Replace),
        (WorkerState.STARTING, DIED, Replace),
        (WorkerState.RETIRING, DIED, LetGo(frees_room=True)),
        (WorkerState.RETIRING, Exit(ExitKind.DONE), LetGo(frees_room=True)),
        (WorkerState.RUNNING, Exit(ExitKind.DONE), LetGo(frees_room=False)),
    ],
)
def test_a_worker_that_ends(state: WorkerState, end: Exit, decision: object) -> None:
    decided = on_worker_exit(Patience(3), "worker-0 (pid 7 on a)", state, end, 4)
    if decision is Replace:
        assert decided == Replace(
            "worker-0 (pid 7 on a) was killed by signal 9 (SIGKILL); a new process takes its place, and no step is lost"
        )
    else:
        assert decided == decision


def test_a_task_that_cannot_be_loaded_is_not_tried_again() -> None:
    refused = Exit(ExitKind.REFUSED, "there is no module 'x'", "Traceback")
    decided = on_worker_exit(Patience(3), "worker-0", WorkerState.STARTING, refused, 0)
    assert decided == End(JobState.FAILED, "the task cannot be run on worker-0", "there is no module 'x'\nTraceback")
    assert is_documented("the task cannot be run on a host", decided.reason)


def test_a_worker_that_keeps_dying_ends_the_job() -> None:
    decided = on_worker_exit(Patience(0), "worker-0 (pid 7 on a)", WorkerState.RUNNING, DIED, 4)
    assert isinstance(decided, End)
    assert decided.reason == "worker-0 keeps dying"
    assert decided.error.startswith("worker-0 (pid 7 on a) was killed by signal 9 (SIGKILL) at step 4 (1 deaths")


@pytest.mark.parametrize(
    ("phase", "state", "pause_wanted", "states"),
    [
        (Phase.WORKING, JobState.STARTING, False, [JobState.RUNNING]),
        (Phase.WORKING, JobState.PAUSED, False, [JobState.RUNNING]),
        (Phase.WORKING, JobState.RUNNING, False, []),
        (Phase.WORKING, JobState.PAUSING, True, []),
        (Phase.WORKING, JobState.RECOVERING, False, [JobState.RUNNING]),
        (Phase.WORKING, JobState.RECOVERING, True, [JobState.RUNNING, JobState.PAUSING]),
        (Phase.PAUSED, JobState.PAUSING, True, [JobState.PAUSED]),
        (Phase.PAUSED, JobState.RUNNING, True, [JobState.PAUSING, JobState.PAUSED]),
        (Phase.PAUSED, JobState.RUNNING, False, []),
        (Phase.PAUSED, JobState.CANCELLING, True, []),
        (Phase.FINISHED, JobState.CANCELLING, False, [JobState.SUCCEEDED]),
        (Phase.CANCELLED, JobState.CANCELLING, False, [JobState.CANCELLED]),
        # It has stopped, and nobody has cancelled it: it makes room.
        (Phase.CANCELLED, JobState.RUNNING, False, [JobState.RECOVERING]),
        (Phase.CANCELLED, JobState.PAUSING, True, [JobState.PAUSED]),
        (Phase.FAILED, JobState.RUNNING, False, [JobState.FAILED]),
        (Phase.SAVING, JobState.RUNNING, False, []),
    ],
)
def test_a_phase_of_the_leader(phase: Phase, state: JobState, pause_wanted: bool, states: list[JobState]) -> None:
    decided = on_phase(phase, "because", "Traceback", state, pause_wanted=pause_wanted)
    assert [d.state for d in decided] == states
    ends = [JobState.SUCCEEDED, JobState.CANCELLED, JobState.FAILED]
    kind = GiveBack if phase == Phase.CANCELLED else Move
    assert all(isinstance(d, End if d.state in ends else kind) for d in decided)
    assert [d.error for d in decided if isinstance(d, End) and d.state == JobState.FAILED] in (
        [],
        ["because\nTraceback"],
    )


def test_a_team_grows_with_the_lowest_free_names_and_shrinks_from_the_newest() -> None:
    team = Team(3)
    for name in team.missing():
        team.add(name)
    assert list(team) == ["worker-0", "worker-1", "worker-2"]
    del team["worker-1"]
    assert team.missing() == ["worker-1"]
    assert team.add("worker-1").generation == 3
    assert team.current("worker-1", 3) is team["worker-1"]
    assert team.current("worker-1", 1) is None
    team.wanted = 1
    assert team.surplus(lambda name: False) == ["worker-1", "worker-2"]
    assert team.surplus(lambda name: name == "worker-1") == ["worker-2", "worker-0"]
    team["worker-1"].state = WorkerState.RETIRING
    assert team.surplus(lambda name: False) == ["worker-2"]
    assert team.missing() == []


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (9, "was killed by signal 9 (SIGKILL)"),
        (11 | 0x80, "was killed by signal 11 (SIGSEGV)"),
        (64, "was killed by signal 64 (SIGRTMAX)"),
        (50, "was killed by signal 50"),
        (3 << 8, "exited with status 3"),
        (None, "ended without saying why: it was killed, ran out of memory, or its host is gone"),
    ],
)
def test_how_a_process_ended(status: int | None, said: str) -> None:
    assert explain_status(status) == said


def test_how_a_process_is_called() -> None:
    assert named("server-1", Started(12, "node-a")) == "server-1 (pid 12 on node-a)"
    assert named("server-1", None) == "server-1"
