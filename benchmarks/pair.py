"""Jobs on two hosts (network namespaces), on each a server and a worker."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from harness.hosts import Host  # the repository is not a package that can be installed
from harness.local_job import job_config, running, work
from ps.checkpoint.files import checkpoints, read_records

WARM_UP = 2
MAX_SECONDS = 1800.0


def median_step(
    pair: Sequence[Host],
    *,
    width: int,
    layers: int,
    batch: int,
    steps: int,
    placement: dict[str, Any] | None = None,
    work: Callable[..., None] = work,
    **raw: Any,
) -> float:
    """Median seconds of a step of a whole job, over `steps` after the first two.

    batch: samples a worker. placement, raw: of the spec. work: what a worker's process does.
    """
    with tempfile.TemporaryDirectory() as directory:
        config = job_config(
            Path(directory),
            "benchmarks.tasks:mlp",
            arguments={"width": width, "layers": layers},
            steps=steps + WARM_UP,
            data={"global_batch": 2 * batch, "micro_batch": batch},
            clip={"norm": 1.0},
            placement={"servers": 2, **(placement or {})},
            **raw,
        )
        with running(config, 2, servers_on=pair, workers_on=pair, work=work) as job:
            job.finish(MAX_SECONDS)
        _, records = read_records(checkpoints(Path(directory))[0])
    times = [record.time for record in records][WARM_UP - 1 :]
    return statistics.median(after - before for before, after in pairwise(times))
