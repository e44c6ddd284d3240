"""What people who look on cost: many jobs train, with and without many pages open on them.

`python -m benchmarks.viewers [--jobs 50] [--viewers 500]`. Each job has one worker, whose steps take a quarter of a
second on some other device (they sleep), so that processors are left for the pages; a tenth of the pages show all jobs,
the others one each. The pages are streams of a process of their own. Rounds with and without them take turns; a figure
is the steps of all jobs in a second, a ratio the median over pairs of rounds.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector

import numpy as np
import psutil

import steepest
from benchmarks.report import RESULTS, write_report
from services.store.history import JobHistory
from steepest.client import Job
from steepest.embedded import running_service


def _look(port: int, paths: Sequence[str], pipe: Connection) -> None:
    """Read all these streams until told to end, then say how many bytes came, and in how many streams."""
    selector = DefaultSelector()
    received: dict[socket.socket, int] = {}
    for path in paths:
        stream = socket.create_connection(("127.0.0.1", port))
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        received[stream] = 0
        selector.register(stream, EVENT_READ)
    while not pipe.poll():
        for key, _ in selector.select(0.1):
            assert isinstance(key.fileobj, socket.socket)
            received[key.fileobj] += len(key.fileobj.recv(1 << 16))
    pipe.send((sum(received.values()), sum(count > 1000 for count in received.values())))


def _paths(jobs: Sequence[Job], num_viewers: int) -> list[str]:
    """What the streams ask for: as a page does, which has asked for what was before in fewer points."""
    own = [f"/api/{job.name.replace('trainingJobs', 'jobs')}/live?cursor={job.get().step}:0:0" for job in jobs]
    return ["/api/live" if number % 10 == 0 else own[number % len(own)] for number in range(num_viewers)]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--viewers", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5, help="of each side [5]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round [10]")
    parser.add_argument("--json", type=Path, default=RESULTS / "viewers.json")
    options = parser.parse_args()
    directory = tempfile.TemporaryDirectory()
    with directory as data, running_service(Path(data), grpc_port=0, http_port=0, num_cpus=2 * options.jobs) as service:
        service.cluster.wait_ready()
        with steepest.Client(f"127.0.0.1:{service.grpc_port}") as client:
            spec = {"steps": 1_000_000, "data": {"global_batch": 16, "micro_batch": 16}}
            jobs = [client.submit("benchmarks/tasks.py:waiting", **spec) for _ in range(options.jobs)]
            ids = [job.name.removeprefix("trainingJobs/") for job in jobs]
            while not all(info.step > 5 for info in client.list("state = RUNNING")) or len(
                list(client.list("state = RUNNING"))
            ) < len(jobs):
                time.sleep(0.5)
            me = psutil.Process()
            spans: dict[str, list[tuple[float, float]]] = {"alone": [], "watched": []}
            used: dict[str, list[float]] = {"alone": [], "watched": []}
            streams, num_bytes = 0, 0
            for number in range(options.rounds):
                for side in list(spans)[:: 1 if number % 2 else -1]:
                    ours, theirs = multiprocessing.Pipe()
                    paths = _paths(jobs, options.viewers)
                    viewer = multiprocessing.get_context("spawn").Process(
                        target=_look, args=(service.http_port, paths, theirs)
                    )
                    if side == "watched":
                        viewer.start()
                        time.sleep(5.0)  # all pages have caught up
                    began = time.time()
                    cpu = sum(me.cpu_times()[:2])
                    time.sleep(options.seconds)
                    spans[side].append((began, time.time()))
                    used[side].append((sum(me.cpu_times()[:2]) - cpu) / (time.time() - began))
                    if side == "watched":
                        ours.send("end")
                        num_bytes, streams = ours.recv()
                        viewer.join()
            memory = me.memory_info().rss
            histories = [JobHistory(service.settings.history_of(name)) for name in ids]
            last = max(ended for own in spans.values() for _, ended in own)
            while any(history.columns(["time"])["time"][-1] < last for history in histories):
                time.sleep(0.5)  # steps are reported a while after they were made
            ends = np.concatenate([history.columns(["time"])["time"] for history in histories])
            rates = {
                side: [float(((ends > began) & (ends <= ended)).sum() / (ended - began)) for began, ended in own]
                for side, own in spans.items()
            }
            for job in jobs:
                job.cancel()
    ratio = statistics.median(w / a for w, a in zip(rates["watched"], rates["alone"], strict=True))
    print("| | steps of all jobs in a second | cores that the service takes |\n|---|---|---|")
    for side, own in rates.items():
        print(f"| {side} | {statistics.median(own):.1f} | {statistics.median(used[side]):.2f} |")
    print(f"ratio {ratio:.3f}; {streams} streams were served, {num_bytes / 1e6:.1f} MB; resident {memory >> 20} MiB")
    shape = {"jobs": options.jobs, "viewers": options.viewers, "streams": streams}
    write_report(options.json, **shape, rates=rates, cores=used, ratio=ratio, resident=memory)


if __name__ == "__main__":
    main()
