"""A service under load: many jobs to list, many who watch one, many who create at once while it is killed.

`python -m benchmarks.service_load [--jobs 10000] [--watchers 500] [--creates 1000] [--database-url URL] [--json FILE]`.

- Lists: so many jobs are in the store; eight clients list pages of 50 with filters, one call after another.
- Watchers: streams of another process watch one job that trains; each must get every event, in order. Rounds with and
  without them take turns, and the speed of the job is compared.
- Creates: 32 clients create jobs, ask again at random with the same request_id, and try again when they get no answer,
  while the service is killed by SIGKILL and started again. Afterwards there must be exactly as many jobs.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import contextlib
import multiprocessing
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import psutil
import sqlalchemy as sa

import steepest
from benchmarks.report import RESULTS, write_report
from services.store.lifecycle import JobState
from services.store.store import Store
from steepest.errors import ServiceUnavailableError
from steepest.v1 import training_jobs_pb2 as pb
from steepest.v1 import training_jobs_pb2_grpc as pb_grpc

PORT, HTTP_PORT = 15973, 15974  # below those that the system takes for callers
ADDRESS = f"127.0.0.1:{PORT}"
CLIENTS = 32
TASK, SMALL = "benchmarks/tasks.py:waiting", "benchmarks/tasks.py:wide"
SPEC: dict[str, Any] = {  # of jobs that wait for ever: the cluster has one CPU
    "arguments": {"count": 1}, "steps": 1, "placement": {"workers": 64, "max_workers": 64},
    "data": {"global_batch": 64}, "labels": {"from": "load"},
}  # fmt: skip
FILTERS = (
    "", "state = SUCCEEDED", 'owner = "ci-3" AND state = FAILED', "labels.team = vision AND priority >= 3",
    "labels.team != vision AND state = CANCELLED", "create_time > 2026-01-01T00:00:00Z OR priority = 1",
)  # fmt: skip


def _start(directory: Path, database: str) -> subprocess.Popen[str]:
    where = ["--database-url", database] if database else []
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("steepest")), "serve", "--port", str(PORT),
            "--http-port", str(HTTP_PORT), "--cpus", "1", "--data-dir", str(directory), *where,
        ],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    said = [process.stderr.readline(), process.stderr.readline()]
    if said[1] != "ready\n":
        raise SystemExit("".join(said) + process.stderr.read())
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process


@contextlib.contextmanager
def _serving(directory: Path, database: str) -> Iterator[subprocess.Popen[str]]:
    process = _start(directory, database)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _fill(url: str, template: Any, count: int) -> None:
    """Jobs as a service that has run for long has them, after that of a real one."""
    draw, store = random.Random(0), Store(url)
    if url.startswith("sqlite"):  # without waiting for the disk 10,000 times
        sa.event.listen(store._engine, "checkout", lambda own, *_: own.execute("PRAGMA synchronous=OFF"))
    states = [JobState.SUCCEEDED] * 7 + [JobState.FAILED, JobState.CANCELLED]
    for number in range(count):
        created = 1.75e9 + 60.0 * number
        row = replace(
            template, id=f"old-{number}", request_id=f"old-{number}", state=draw.choice(states), created=created,
            ended=created + 50.0, owner=f"ci-{number % 7}", priority=number % 5,
        )  # fmt: skip
        store.create(row, (), {"team": draw.choice(("vision", "speech", "text"))})
    store.close()


def _list(seconds: float) -> list[float]:
    """Seconds of every call."""
    taken: list[float] = []

    def ask(seed: int) -> None:
        draw = random.Random(seed)
        with grpc.insecure_channel(ADDRESS) as channel:
            stub = pb_grpc.TrainingJobServiceStub(channel)  # type: ignore[no-untyped-call]
            stub.ListTrainingJobs(pb.ListTrainingJobsRequest())
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                request = pb.ListTrainingJobsRequest(filter=draw.choice(FILTERS), page_size=50)
                began = time.perf_counter()
                found = stub.ListTrainingJobs(request)
                taken.append(time.perf_counter() - began)
                assert found.training_jobs
                time.sleep(draw.random() * 0.1)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def _watch(name: str, count: int, pipe: Connection) -> None:
    """Watch a job so many times until told to end; then say how many events came to each stream, and how many steps."""
    import asyncio

    async def one(stub: Any, seen: list[int], steps: list[int]) -> None:
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            async for update in stub.WatchTrainingJob(pb.WatchTrainingJobRequest(name=name)):
                if update.WhichOneof("update") == "event":
                    assert update.event.sequence == len(seen) + 1
                    seen.append(update.event.sequence)
                elif update.WhichOneof("update") == "progress":
                    steps.append(update.progress.step)

    async def run() -> None:
        channels = [grpc.aio.insecure_channel(ADDRESS, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(8)]
        stubs = [pb_grpc.TrainingJobServiceStub(channel) for channel in channels]  # type: ignore[no-untyped-call]
        events: list[list[int]] = [[] for _ in range(count)]
        steps: list[list[int]] = [[] for _ in range(count)]
        tasks = [asyncio.create_task(one(stubs[i % 8], events[i], steps[i])) for i in range(count)]
        while not pipe.poll():
            await asyncio.sleep(0.1)
        await asyncio.sleep(3.0)  # what is under way
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks)
        pipe.send(([len(own) for own in events], [len(own) for own in steps]))

    asyncio.run(run())


@contextlib.contextmanager
def _watched(name: str, count: int, into: list[Any]) -> Iterator[None]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_watch, args=(name, count, theirs))
    process.start()
    yield
    ours.send("end")
    into.append(ours.recv())
    process.join()


def _speed(job: steepest.Job, seconds: float) -> float:
    """Steps a second."""
    first, began = job.get().step, time.perf_counter()
    time.sleep(seconds)
    return (job.get().step - first) / (time.perf_counter() - began)


def _create(count: int, directory: Path, database: str, kills: int) -> dict[str, Any]:
    draw = random.Random(0)
    waiting = [f"load-{number}" for number in range(count)]
    lock, asked, failed = threading.Lock(), 0, 0

    def work(seed: int) -> None:
        nonlocal asked, failed
        own = random.Random(seed)
        with steepest.Client(ADDRESS) as client:
            while True:
                with lock:
                    if not waiting:
                        return
                    request = waiting.pop()
                while True:
                    try:
                        client.submit(SMALL, request_id=request, **SPEC)
                    except (ServiceUnavailableError, steepest.SteepestError) as error:
                        with lock:
                            failed += 1
                        if not isinstance(error, ServiceUnavailableError) and "UNKNOWN" not in str(error):
                            print("unexpected:", str(error)[:200])
                        time.sleep(0.5 + own.random())
                        continue
                    with lock:
                        asked += 1
                    if own.random() > 0.3:  # else once more, as one would who has got no answer
                        break

    process = _start(directory, database)
    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for _ in range(kills):
        left = len(waiting)
        while waiting and len(waiting) > left - count // (kills + 2) + draw.randint(0, count // 20):
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        for child in children:  # Ray's, which would go on for a while
            with contextlib.suppress(psutil.Error):
                child.kill()
        process = _start(directory, database)
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    with steepest.Client(ADDRESS) as client:
        names = [info.job for info in client.list("labels.from = load")]
    process.send_signal(signal.SIGINT)
    process.wait(60)
    return {
        "creates": count, "jobs afterwards": len(names), "distinct": len(set(names)), "answers": asked,
        "calls without an answer": failed, "kills": kills, "seconds": seconds,
    }  # fmt: skip


def _percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--watchers", type=int, default=500)
    parser.add_argument("--creates", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="with and without watchers [5]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round, and of listing [10]")
    parser.add_argument("--database-url", default="")
    parser.add_argument("--json", type=Path, default=RESULTS / "service_load.json")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as text:
        directory, database = Path(text), options.database_url
        url = database or f"sqlite:///{directory / 'steepest.db'}"
        with _serving(directory, database), steepest.Client(ADDRESS) as client:
            client.submit(TASK, name="one", steps=2).wait()
        store = Store(url)
        template = store.get("one")
        store.close()
        _fill(url, template, options.jobs)
        with _serving(directory, database) as process, steepest.Client(ADDRESS) as client:
            taken = _list(options.seconds)
            found["list calls"] = len(taken)
            found["list median ms"] = statistics.median(taken) * 1000
            found["list p99 ms"] = _percentile(taken, 0.99) * 1000
            job = client.submit(TASK, name="watched", steps=1_000_000, checkpoint_seconds=0)
            while job.get().step < 5:
                time.sleep(0.2)
            alone, watched, seen = [], [], []
            for _ in range(options.rounds):
                alone.append(_speed(job, options.seconds))
                with _watched(job.name, options.watchers, seen):
                    time.sleep(8.0)  # until all are there
                    job.set_priority(random.randint(1, 100))  # an event
                    watched.append(_speed(job, options.seconds))
                    rss = psutil.Process(process.pid).memory_info().rss
            found["steps a second alone"] = statistics.median(alone)
            found["steps a second watched"] = statistics.median(watched)
            found["watched / alone"] = statistics.median(w / a for w, a in zip(watched, alone, strict=True))
            found["service RSS MiB"] = rss / 2**20
            found["events of each stream (last round, least and most)"] = [min(seen[-1][0]), max(seen[-1][0])]
            found["events there were"] = len(job.events())
            found["progress of each stream (last round, least and most)"] = [min(seen[-1][1]), max(seen[-1][1])]
            job.cancel()
            while not job.get().has_ended:
                time.sleep(0.2)
        found |= _create(options.creates, directory, database, options.kills)
    for name, value in found.items():
        print(f"{name:55} {value}")
    write_report(options.json, **found)


if __name__ == "__main__":
    main()
