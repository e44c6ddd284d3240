"""What the exporter counts of a job."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ps.step.messages import StepRecord
from services.jobs.histogram import Histogram
from steepest.bottleneck import COLUMNS, PARTS, step_parts


@dataclass
class Totals:
    """Counts since the service last began to run the job. parts: seconds of steps, by part."""

    steps: int = 0
    samples: int = 0
    clipped: int = 0
    skipped: int = 0
    replaced_workers: int = 0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    step_seconds: Histogram = field(default_factory=Histogram)

    def count(self, records: list[StepRecord]) -> None:
        """Add the steps of some records."""
        self.steps += len(records)
        self.samples += sum(r.samples for r in records)
        self.clipped += sum(r.clipped for r in records)
        self.skipped += sum(r.skipped for r in records)
        if records:
            columns = {name: np.array([getattr(record, name) for record in records]) for name in COLUMNS}
            for part, seconds in step_parts(columns).items():
                self.parts[part] += float(seconds.sum())
        for record in records:
            self.step_seconds.observe(record.step_seconds)
