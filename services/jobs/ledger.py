"""What is known of a running job, and its way into the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ps.step.messages import StepRecord
from services.store.lifecycle import ENDED, JobState
from services.store.store import JobRow, Store
from steepest.errors import ConflictError

log = logging.getLogger(__name__)

PERSIST_SECONDS = 1.0


class Ledger:
    """Keeps one job's result and writes it down. num_samples, global_batch: of the job's data."""

    def __init__(self, store: Store, row: JobRow, num_samples: int, global_batch: int) -> None:
        self.job = row.id
        self.name = row.name
        self.result = row.result
        self.record: StepRecord | None = None
        self._store = store
        self._num_samples = num_samples
        self._global_batch = global_batch
        self._written = 0.0

    @property
    def state(self) -> JobState:
        """The job's state, as users see it."""
        return self._store.get(self.job).state

    @property
    def has_ended(self) -> bool:
        """Whether the job is over."""
        return self.state in ENDED

    def note_result(self, **changes: Any) -> None:
        """Change fields of the result."""
        self.result = replace(self.result, **changes)

    def note_step(self, step: int) -> None:
        """So many steps are done."""
        per_epoch = -(-self._num_samples // self._global_batch)
        epochs, rest = divmod(step, per_epoch)
        in_epoch = min(rest * self._global_batch, self._num_samples)
        self.note_result(step=step, samples=epochs * self._num_samples + in_epoch)

    def begin_life(self, incarnation: int, step: int, records: Iterable[StepRecord], of_incarnation: int) -> None:
        """Begin an incarnation at `step`. records: of the one before, which had no time to report them."""
        self._store.update(self.job, incarnation=incarnation)
        self._store.fill_history(self.job, of_incarnation, list(records))
        self._store.rewind(self.job, step)
        self.note_step(step)

    def append(self, incarnation: int, records: list[StepRecord], newest: StepRecord | None) -> None:
        """Steps are done. records: those that go to the history."""
        if records:
            self._store.append_history(self.job, incarnation, records)
        if newest is not None:
            self.record = newest
            self.note_step(newest.step + 1)
            self.note_result(loss=newest.loss)

    def publish(self, members: Iterable[tuple[str, str, int, str, str]]) -> None:
        """Write the result down. members: (role, id, pid, host, state)."""
        self.note_result(members=tuple(members))
        self._store.update(self.job, result=self.result)
        self._written = time.time()

    @property
    def is_stale(self) -> bool:
        """Whether the result was last written a while ago."""
        return time.time() - self._written > PERSIST_SECONDS

    def say(self, text: str) -> None:
        """An event without a change of state."""
        self._store.note(self.job, text, time.time())

    def move(self, state: JobState, reason: str) -> None:
        """Change the state, unless a user's cancel came first."""
        try:
            self._store.move(self.job, state, reason, time.time())
        except ConflictError:
            log.info("%s cannot become %s", self.name, state)

    def end(self, state: JobState, reason: str) -> None:
        """Change the state for the last time."""
        if state == JobState.CANCELLED:
            self.move(JobState.CANCELLING, reason)
        self.move(state, reason)
