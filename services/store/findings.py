"""What was found of a job's health."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """Something that is wrong, or soon will be. layer, worker, micro_batch, samples: where they apply.

    severity: warning or critical. message: the evidence, and what to try.
    """

    rule: str
    severity: str
    step: int
    message: str
    layer: str | None = None
    worker: str | None = None
    micro_batch: int | None = None
    samples: tuple[int, ...] | None = None
