"""What is new of a job, again and again until it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from steepest.errors import ServiceUnavailableError
from steepest.jobs import Checkpoint, Evaluation, JobInfo

if TYPE_CHECKING:
    from steepest.client import Job

FOLLOW_SECONDS, AWAY_SECONDS = 1.0, 60.0


class News(NamedTuple):
    """What has come since the last of these. info: the job, as it was before the rest was read."""

    info: JobInfo
    records: list[dict[str, Any]]
    evaluations: list[Evaluation]
    checkpoints: list[Checkpoint]


def news_of(job: Job, records: bool, evaluations: bool = False, checkpoints: bool = False) -> Iterator[News]:
    """What is new of a job, about every second; the last is of its end, with all there is. Each kind if asked for.

    What the job does again, after a rollback say, comes again. Raises ServiceUnavailableError when the service is away
    for AWAY_SECONDS.
    """
    recorded = evaluated = saved = -1  # up to which step
    incarnation, seen = 0, time.monotonic()
    while True:
        try:
            info = job.get()  # first: all of a job that has ended is there
            if info.incarnation != incarnation:  # it went back
                recorded = min(recorded, info.began_at_step - 1)
                evaluated, saved = min(evaluated, info.began_at_step), min(saved, info.began_at_step)
            news = News(
                info,
                list(job.history(recorded + 1)) if records else [],
                job.evaluations(evaluated) if evaluations else [],
                job.checkpoints(saved)[::-1] if checkpoints else [],
            )
        except ServiceUnavailableError:
            if time.monotonic() - seen > AWAY_SECONDS:
                raise
            time.sleep(FOLLOW_SECONDS)
            continue
        incarnation, seen = info.incarnation, time.monotonic()
        recorded = news.records[-1]["step"] if news.records else recorded
        evaluated = news.evaluations[-1].step if news.evaluations else evaluated
        saved = news.checkpoints[-1].step if news.checkpoints else saved
        yield news
        if info.has_ended:
            return
        time.sleep(FOLLOW_SECONDS)
