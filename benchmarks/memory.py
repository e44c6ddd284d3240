"""Peak memory of a whole job against PyTorch DDP over gloo, with 2, 4 and 8 workers.

`python -m benchmarks.memory`. Both train the perceptron of 25 million parameters of `step_time.py` with AdamW and a
clip by global norm. Memory is PSS, which counts a page shared by n processes as 1/n in each, summed over all workers
and servers (or ranks) and sampled while they train; the fork server from which they started and its actor are in it.
The service, which a job shares with others, and Ray's own processes are not.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import Peer
from benchmarks.report import RESULTS, write_report
from benchmarks.step_time import Ours
from benchmarks.tasks import SIZES
from steepest.client import Client
from steepest.embedded import running_service

SAMPLE_SECONDS = 0.05
STEPS = 5


def pss(pid: int) -> int:
    """Bytes of one process."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


class Peak:
    """The largest sum over some processes while the block runs."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.nbytes = 0
        self._pids = pids
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, sum(map(pss, self._pids)))
            if self._over.wait(SAMPLE_SECONDS):
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="25M", help="10k 1M 25M 100M [25M]")
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--batch", type=int, default=16, help="samples of a worker's micro-batch [16]")
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    options = parser.parse_args()
    (size,) = (s for s in SIZES if s.name.replace(" ", "") == options.size)
    print("| workers | ours, GB | DDP, GB | ratio |\n|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as data, running_service(Path(data), grpc_port=0, http_port=0) as service:
        service.cluster.wait_ready()
        with Client(f"127.0.0.1:{service.grpc_port}") as client:
            for workers in options.workers:
                job = Ours(client, size, options.batch, workers, 1)
                with Peak([*job.pids(), *service.cluster.fork_servers.pids()]) as ours:
                    time.sleep(3.0)
                    job.pause()
                    job.round(0.0, STEPS)
                job.close()
                peer = Peer(size, options.batch, workers)
                peer.round(1)
                with Peak(peer.pids()) as theirs:
                    peer.round(STEPS)
                peer.close()
                ratio = ours.nbytes / theirs.nbytes
                results.append({"workers": workers, "ours": ours.nbytes, "ddp": theirs.nbytes, "ratio": ratio})
                print(f"| {workers} | {ours.nbytes / 1e9:.2f} | {theirs.nbytes / 1e9:.2f} | {ratio:.2f} |", flush=True)
    write_report(options.json, results=results)


if __name__ == "__main__":
    main()
