"""What compression gains on a slow link: two hosts (network namespaces), on each a server and a worker of one job.

`python -m benchmarks.compression` (as root; needs iproute2). Whole jobs of ten million parameters take turns; the time
of a step is the median over a job's steps, and the bytes are those that the first host's interface sent and received.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pair import median_step
from benchmarks.report import RESULTS, write_report
from harness.hosts import Host, hosts

WIDTH, LAYERS = 1800, 4  # 9.9 million parameters
COMPRESSIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {"name": "bf16"},
    "topk 1 %": {"name": "topk", "ratio": 0.01},
    "powersgd 16": {"name": "powersgd", "rank": 16},
    "powersgd 32": {"name": "powersgd", "rank": 32},
    "twobit": {"name": "twobit"},
}


def measure(pair: Sequence[Host], compression: dict[str, Any], steps: int) -> float:
    """Median seconds of a step."""
    return median_step(pair, width=WIDTH, layers=LAYERS, batch=16, steps=steps, compression=compression)


def bytes_per_step(pair: Sequence[Host], compression: dict[str, Any]) -> float:
    """From jobs of different lengths, so that start and end cancel out: the median of five differences."""

    def megabytes(steps: int) -> float:
        before = sum(pair[0].traffic()) / 1e6
        measure(pair, compression, steps)
        return sum(pair[0].traffic()) / 1e6 - before

    return statistics.median((megabytes(8) - megabytes(2)) / 6 for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", default="100mbit", help="of the link, in tc's words [100mbit]")
    parser.add_argument("--round-trip", type=float, default=0.0, help="between the hosts, besides, in ms [0]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="of each job, after the first two")
    parser.add_argument("--only", nargs="*", default=list(COMPRESSIONS), choices=list(COMPRESSIONS))
    parser.add_argument("--json", type=Path, default=RESULTS / "compression.json")
    options = parser.parse_args()
    if os.geteuid():
        sys.exit("network namespaces need root")
    times: dict[str, list[float]] = {name: [] for name in options.only}
    with hosts(2, options.round_trip / 1e3) as pair:
        traffic = {name: bytes_per_step(pair, COMPRESSIONS[name]) for name in options.only}
        for host in pair:
            host.limit(options.limit)
        for number in range(options.rounds):
            for name in options.only:
                times[name].append(measure(pair, COMPRESSIONS[name], options.steps))
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    baseline = times[options.only[0]]
    print(f"link: {options.limit}, round trip {options.round_trip:g} ms")
    print("| compression | MB a step | s a step | times as fast (range) |\n|---|---|---|---|")
    results = []
    for name, seconds in times.items():
        gains = [whole / own for whole, own in zip(baseline, seconds, strict=True)]
        gain, least, most = statistics.median(gains), min(gains), max(gains)
        results.append({"compression": name, "seconds": seconds, "gain": gain, "megabytes": traffic[name]})
        middle = statistics.median(seconds)
        print(f"| {name} | {traffic[name]:.2f} | {middle:.3f} | {gain:.1f} ({least:.1f} to {most:.1f}) |")
    write_report(options.json, limit=options.limit, round_trip_ms=options.round_trip, results=results)


if __name__ == "__main__":
    main()
