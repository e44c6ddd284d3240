"""What the exporter counts of a job."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ps.step.messages import StepRecord
from services.jobs.histogram import Histogram
from steepest.bottleneck import COLUMNS, PARTS, step_parts


@dataclass
class Totals:
    """Counts since the service last began to run the job.

    every: the record of one step in so many comes; each stands for those up to the next. parts: seconds of steps, by
    part.
    """

    every: int = 1
    steps: int = 0
    samples: int = 0
    clipped: int = 0
    skipped: int = 0
    replaced_workers: int = 0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    step_seconds: Histogram = field(default_factory=Histogram)

    def count(self, records: list[StepRecord]) -> None:
        """Add the steps of some records. Every one that was skipped is among them."""
        self.skipped += sum(r.skipped for r in records)
        usual = [record for record in records if record.step % self.every == 0]
        self.steps += self.every * len(usual)
        self.samples += self.every * sum(r.samples for r in usual)
        self.clipped += self.every * sum(r.clipped for r in usual)
        if usual:
            columns = {name: np.array([getattr(record, name) for record in usual]) for name in COLUMNS}
            for part, seconds in step_parts(columns).items():
                self.parts[part] += self.every * float(seconds.sum())
        for record in usual:
            self.step_seconds.observe(record.step_seconds)
