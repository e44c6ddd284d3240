"""What it gains to send gradients while they are computed: two network namespaces, each with a server and a worker.

`python -m benchmarks.overlap` (as root; needs iproute2). Whole jobs of 25 million parameters take turns, with the
buckets of worker/gradients/buckets.py and with one bucket, which leaves when backward is over. The time of a step is
the median over a job's steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pair import median_step
from benchmarks.report import RESULTS, write_report
from harness.hosts import hosts
from harness.local_job import work
from worker.gradients import buckets as overlap

WIDTH, LAYERS = 1024, 24  # 25 million parameters


def work_whole(*arguments: Any) -> None:
    """A worker that pushes sums as a whole."""
    overlap.BUCKET_BYTES = 1 << 62
    work(*arguments)


WAYS: dict[str, Callable[..., None]] = {"whole": work_whole, "in buckets": work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", nargs="*", default=["2gbit", "1gbit"], help="of the link, in tc's words")
    parser.add_argument("--batch", type=int, default=256, help="samples a worker [256]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of each job, after the first two")
    parser.add_argument("--transport", nargs="*", default=["auto", "inline"])
    parser.add_argument("--json", type=Path, default=RESULTS / "overlap.json")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("network namespaces need root")
    results = []
    print("| link | transport | whole, ms | in buckets, ms | ratio | rounds |\n|---|---|---|---|---|---|")
    with hosts(2) as pair:
        for limit in options.limit:
            for host in pair:
                host.limit(limit)
            for transport in options.transport:
                times: dict[str, list[float]] = {way: [] for way in WAYS}
                for _ in range(options.rounds):
                    for way, seconds in times.items():
                        seconds.append(
                            median_step(
                                pair,
                                width=WIDTH,
                                layers=LAYERS,
                                batch=options.batch,
                                steps=options.steps,
                                placement={"transport": transport},
                                work=WAYS[way],
                            )
                        )
                ratios = [cut / whole for whole, cut in zip(*times.values(), strict=True)]
                whole, cut = (1000 * statistics.median(seconds) for seconds in times.values())
                ratio = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f}"
                print(f"| {limit} | {transport} | {whole:.0f} | {cut:.0f} | {ratio} |", flush=True)
                results.append({"limit": limit, "transport": transport, "seconds": times, "ratios": ratios})
    write_report(options.json, batch=options.batch, results=results)


if __name__ == "__main__":
    main()
