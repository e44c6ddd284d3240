"""What is decided about the things that happen to a job. Decides only: `services.jobs.controller` acts.

Every function is pure but for `Patience`, which counts deaths.
"""

from __future__ import annotations

from dataclasses import dataclass

from ps.step.effects import Phase
from services.cluster.processes import Exit, ExitKind
from services.jobs.blame import some
from services.jobs.health import LASTING_STEPS
from services.jobs.team import WorkerState
from services.store.lifecycle import ENDED, JobState
from steepest.change_spec import ChangeSpec
from steepest.jobs import Finding
from steepest.spec import HealthSpec


@dataclass(frozen=True, slots=True)
class Move:
    """Change the job's state."""

    state: JobState
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """End the job."""

    state: JobState
    reason: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class GiveBack:
    """The job has stopped at a step boundary, with a checkpoint, to give its room back; it waits in this state."""

    state: JobState


Decision = Move | End | GiveBack


@dataclass(frozen=True, slots=True)
class Recover:
    """Start all processes again from the last checkpoint. change: what is done otherwise from there on."""

    reason: str
    change: ChangeSpec | None = None


@dataclass(frozen=True, slots=True)
class Replace:
    """Start another worker in place of the one that died."""

    note: str


@dataclass(frozen=True, slots=True)
class LetGo:
    """Nothing is wrong: the worker was to leave. frees_room: whether its room is given back."""

    frees_room: bool


class Patience:
    """Counts deaths since the last progress. limit: placement.max_worker_restarts."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.deaths = 0
        self._step = -1

    def is_exhausted_by_death_at(self, step: int) -> bool:
        """Count a death. Whether the job has had too many without a step in between."""
        if step > self._step:
            self.deaths = 0
        self._step = max(self._step, step)
        self.deaths += 1
        return self.deaths > self.limit

    def describe(self) -> str:
        """For an error."""
        return f"{self.deaths} deaths without progress; placement.max_worker_restarts = {self.limit}"


def on_server_loss(
    patience: Patience, what_happened: str, step: int, checkpoint_step: int | None, *, cancelling: bool
) -> Recover | End:
    """The servers of this incarnation are gone.

    step: how far the job is. checkpoint_step: of the newest valid checkpoint, None without one.
    """
    if cancelling:
        return End(JobState.CANCELLED, "cancelled")
    if patience.is_exhausted_by_death_at(step):
        return End(JobState.FAILED, "its servers keep dying", f"{what_happened} ({patience.describe()})")
    if checkpoint_step is None:
        return Recover(f"{what_happened}; there is no checkpoint, starting again from step 0")
    return Recover(f"{what_happened}; returning to the checkpoint of step {checkpoint_step}")


def on_worker_exit(patience: Patience, who: str, state: WorkerState, end: Exit, step: int) -> Replace | LetGo | End:
    """A worker has ended. who: its name, with pid and host where they are known."""
    if end.kind == ExitKind.REFUSED:
        return End(JobState.FAILED, f"the task cannot be run on {who}", f"{end.message}\n{end.traceback}".strip())
    if state == WorkerState.RETIRING:
        return LetGo(frees_room=True)
    if end.kind == ExitKind.DONE:
        return LetGo(frees_room=False)  # dismissed at the end of the job, which the leader reports
    if patience.is_exhausted_by_death_at(step):
        name = who.split(" ", 1)[0]
        return End(
            JobState.FAILED, f"{name} keeps dying", f"{who} {end.message} at step {step} ({patience.describe()})"
        )
    return Replace(f"{who} {end.message}; a new process takes its place, and no step is lost")


def made_room(room_for: str, step: int, state: JobState) -> str:
    """Why a job waits in this state: it has given its room back after so many steps. room_for: whom for, if known."""
    why = f" for {room_for}" if room_for else ""
    then = "resume it" if state == JobState.PAUSED else "it goes on from there when there is room for it"
    return f"made room{why} at step {step}; {then}"


def on_no_step(seconds: float) -> End:
    """A cancelled job has not come to the end of its step in so many seconds."""
    return End(JobState.CANCELLED, f"cancelled; no step ended within {seconds:g} s, so the unfinished one is lost")


def on_rollback(done: int, health: HealthSpec, finding: Finding, checkpoint_step: int | None) -> Recover | End:
    """A health rule wants the job to go back. done: rollbacks so far. checkpoint_step: of the one to go back to."""
    what_happened = finding.message
    if done >= health.max_rollbacks:
        problem = f"{what_happened} (after {done} rollbacks; health.max_rollbacks = {health.max_rollbacks})"
        return End(JobState.FAILED, "rollbacks have not helped", problem)
    where = "starting again from step 0" if checkpoint_step is None else f"returning to step {checkpoint_step}"
    step = checkpoint_step or 0
    if finding.samples:
        without = f"without samples {some(finding.samples)}" if len(finding.samples) > 1 else "without that sample"
        return Recover(f"{what_happened}; {where} {without}", ChangeSpec(step=step, skip_samples=finding.samples))
    scale = health.rollback_factor
    reason = f"{what_happened}; {where} with {scale:g} times the learning rate"
    return Recover(reason, ChangeSpec(step=step, lr_scale=scale))


def suspect_step(finding: Finding) -> int:
    """The first step that may have gone wrong: that of the samples to blame, or where what has lasted began."""
    return finding.step if finding.samples else max(0, finding.step - LASTING_STEPS)


def on_finding(rule: str, message: str, action: str, state: JobState) -> Move | None:
    """A health rule has found something. action: of the job's spec for that rule. state: of the job."""
    wanted = {"pause": (JobState.RUNNING, JobState.PAUSING), "cancel": (state, JobState.CANCELLING)}.get(action)
    if wanted is None or state != wanted[0] or state in (JobState.CANCELLING, *ENDED):
        return None
    return Move(wanted[1], f"{action} asked for by the rule {rule} (health.actions.{rule}): {message}")


def on_phase(
    phase: str, reason: str, traceback: str, state: JobState, *, pause_wanted: bool
) -> list[Move | End | GiveBack]:
    """The leader is in another phase. state: of the job so far."""
    pausing = Move(JobState.PAUSING, "pausing again: the pause was requested before")
    match phase:
        case Phase.WORKING:
            moves: list[Decision] = []
            if state in (JobState.STARTING, JobState.RECOVERING, JobState.PAUSED):
                moves.append(Move(JobState.RUNNING, reason))
            if pause_wanted and state == JobState.RECOVERING:
                moves.append(pausing)
            return moves
        case Phase.PAUSED:
            if state == JobState.PAUSING:
                return [Move(JobState.PAUSED, reason)]
            if state == JobState.RUNNING and pause_wanted:
                return [pausing, Move(JobState.PAUSED, reason)]
            return []
        case Phase.FINISHED:
            return [End(JobState.SUCCEEDED, reason)]
        case Phase.CANCELLED if state in (JobState.RUNNING, JobState.PAUSING):  # nobody has cancelled the job
            return [GiveBack(JobState.PAUSED if state == JobState.PAUSING else JobState.RECOVERING)]
        case Phase.CANCELLED:
            return [End(JobState.CANCELLED, reason)]
        case Phase.FAILED:
            return [End(JobState.FAILED, reason, f"{reason}\n{traceback}".strip())]
    return []
