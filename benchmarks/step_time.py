"""Step time through the service against PyTorch DDP over gloo, and against a plain loop.

`python -m benchmarks.step_time` (make bench). Both sides train the same model on the same data with one thread a
process: global-norm clip and fused AdamW in float32. They take turns, a round each, in one run; the figure is
the median over the rounds of each round's median step. `--against zero ray` compares two workers with DDP and
ZeroRedundancyOptimizer, and with TorchTrainer of Ray Train around the same loop, which needs `ray[train]`.
`--device cuda` compares one worker and its server on a GPU with a plain loop there, by default also for a residual
network and a transformer, `--precision bf16` under autocast; `--optimizer muon` has both sides step by Muon.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import argparse
import contextlib
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers import LR, MAX_NORM, Peer, RayPeer
from benchmarks.report import RESULTS, write_report
from benchmarks.tasks import LARGE, SIZES, Size
from ps.step.signals import FIRST_STEPS
from steepest.client import Client, Job
from steepest.embedded import running_service

HERE = Path(__file__).parent
ENDLESS = 1_000_000


@dataclass(frozen=True)
class Comparison:
    """One line of the table; times in seconds."""

    size: str
    workers: int
    against: str
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]


def _processor_seconds() -> float:
    """Of this process and all that come from it."""
    me, seconds = psutil.Process(), 0.0
    for process in itertools.chain([me], me.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:2])
    return seconds


class Ours:
    """A job of the service that runs only during its rounds."""

    def __init__(
        self,
        client: Client,
        size: Size,
        batch: int,
        workers: int,
        servers: int,
        telemetry: dict[str, Any] | None = None,
        workers_started: int | None = None,
        device: str = "cpu",
        optimizer: str = "adamw",
        precision: str = "full",
    ) -> None:
        """workers: a batch each makes the global batch. workers_started: if they are to be others than so many.

        device: of workers and servers. optimizer: its name. precision: of the spec.
        """
        self._job: Job = client.submit(
            f"{HERE / 'tasks.py'}:{size.kind}",
            arguments={"width": size.width, "layers": size.layers},
            steps=ENDLESS,
            data={"global_batch": batch * workers, "micro_batch": batch},
            optimizer={"name": optimizer, "lr": LR},
            clip={"norm": MAX_NORM},
            placement={
                "workers": workers_started or workers,
                "servers": servers,
                "device": device,
                "server_device": device,
            },
            precision=precision,
            telemetry=telemetry or {},
            checkpoint_seconds=0,  # benchmarks.checkpoint says what they cost
        )
        # Signals are measured in all of the first steps, and then in one of so many.
        self._await(lambda: self._job.get().state == "RUNNING" and self._job.get().step > FIRST_STEPS)
        self._await(lambda: all(w.state == "running" for w in self._job.get().workers))
        self._next = 0
        self.processor_step = 0.0  # seconds of a step of the last round, of all processes, the service's too

    def _await(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._job.get().has_ended:
                raise RuntimeError(f"the job ended: {self._job.get().error}")
            time.sleep(0.02)

    def pause(self) -> None:
        self._job.pause()
        self._await(lambda: self._job.get().state == "PAUSED")
        self._next = self._job.get().step

    def round(self, seconds: float, min_steps: int) -> list[float]:
        """Seconds of each step of a round that lasts `seconds` and `min_steps` at least."""
        times = [record["time"] for record in self._records(seconds, min_steps + 2)]
        return [after - before for before, after in pairwise(times)]

    def mean_step(self, seconds: float, min_steps: int, every: int) -> float:
        """Seconds of a step over a round, from the first multiple of `every` in it to the last."""
        records = [record for record in self._records(seconds, min_steps) if record["step"] % every == 0]
        return float((records[-1]["time"] - records[0]["time"]) / (records[-1]["step"] - records[0]["step"]))

    def _records(self, seconds: float, min_steps: int) -> list[dict[str, Any]]:
        """Let it run for so long and so many steps at least; what was kept of them."""
        first, before = self._next, _processor_seconds()
        self._job.resume()
        time.sleep(seconds)
        self._await(lambda: self._job.get().step >= first + min_steps)
        self.pause()
        self.processor_step = (_processor_seconds() - before) / (self._next - first)
        return list(self._job.history(first))

    def pids(self) -> list[int]:
        """Of all its workers and servers."""
        info = self._job.get()
        return [member.pid for member in (*info.workers, *info.servers)]

    def close(self) -> None:
        self._job.cancel()
        self._await_end()

    def _await_end(self) -> None:
        while not self._job.get().has_ended:
            time.sleep(0.05)


PEERS: dict[str, tuple[str, Callable[[Size, int, int], Peer | RayPeer]]] = {
    "ddp": ("DDP, gloo", Peer),
    "zero": ("DDP + ZeRO", partial(Peer, optimizer="zero")),
    "ray": ("Ray Train", RayPeer),
}


def compare(
    client: Client, size: Size, workers: int, servers: int, against: str, options: argparse.Namespace
) -> Comparison:
    """Take turns. options: of the command."""
    device, optimizer, precision = options.device, options.optimizer, options.precision or size.precision
    batch = size.batch or options.batch
    ours = Ours(client, size, batch, workers, servers, device=device, optimizer=optimizer, precision=precision)
    ours.pause()
    label, make = PEERS[against]
    if (device, optimizer, precision) != ("cpu", "adamw", "full"):
        make = partial(Peer, device=device, optimizer=optimizer, precision=precision)
    theirs = make(size, batch, workers)
    try:
        theirs.round(max(3, size.steps // 10))
        pairs = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            their_step = statistics.median(theirs.round(size.steps))
            lasted = time.perf_counter() - began
            pairs.append((statistics.median(ours.round(lasted, min(size.steps, 5))), their_step))
    finally:
        theirs.close()
        ours.close()
    ratios = [a / b for a, b in pairs]
    return Comparison(
        size.name,
        workers,
        label if workers > 1 else "plain loop",
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(ratios),
        (min(ratios), max(ratios)),
    )


def line(c: Comparison) -> str:
    low, high = c.spread
    return (
        f"| {c.size:>11} | {c.workers} | {c.against:<10} | {c.ours * 1e3:9.2f} | {c.theirs * 1e3:9.2f} "
        f"| {c.ratio:.2f} | {low:.2f} to {high:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", help="10k 1M 25M 100M convnet transformer [on a CPU the first four]")
    parser.add_argument("--batch", type=int, default=16, help="samples of a worker's micro-batch [16]")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each side [7]")
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 1])
    parser.add_argument("--against", nargs="*", default=["ddp"], choices=list(PEERS), help="with more workers than one")
    parser.add_argument("--servers", type=int, default=0, help="of a job [2 from 25 M parameters on, else 1]")
    parser.add_argument(
        "--optimizer", choices=["adamw", "muon", "adafactor"], default="adamw", help="against DDP alone"
    )
    parser.add_argument("--precision", choices=["full", "bf16"], help="bf16: autocast [full; bf16 for the last two]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: one worker alone [cpu]")
    parser.add_argument("--json", type=Path, default=RESULTS / "step_time.json")
    options = parser.parse_args()
    workers_compared = options.workers if options.device == "cpu" else [1]
    sizes = [*SIZES, *LARGE] if options.device != "cpu" or options.sizes else SIZES
    if options.device != "cpu":  # rounds of a CPU's steps are over in no time
        sizes = [replace(size, steps=max(size.steps, 60)) if size.kind == "mlp" else size for size in sizes]
    names = options.sizes or [size.name.replace(" ", "") for size in sizes]
    # For the workers of Ray Train; what the caller has there stays, or its processes may not find Ray.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    print("|     size    | workers | against | ours, ms | theirs, ms | ratio | spread of rounds |")
    print("|---|---|---|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory() as data, running_service(Path(data), grpc_port=0, http_port=0) as service:
        service.cluster.wait_ready()
        with Client(f"127.0.0.1:{service.grpc_port}") as client:
            for workers in workers_compared:
                for size in (s for s in sizes if s.name.replace(" ", "") in names):
                    servers = options.servers or (2 if size.width >= 2048 and workers > 1 else 1)
                    for against in options.against if workers > 1 else ["ddp"]:
                        results.append(compare(client, size, workers, servers, against, options))
                        print(line(results[-1]), flush=True)
    settings = {name: getattr(options, name) for name in ("batch", "device", "optimizer", "precision")}
    write_report(options.json, **settings, results=[vars(c) for c in results])
    print(f"geometric mean of ratios {math.exp(statistics.fmean(math.log(c.ratio) for c in results)):.2f}")


if __name__ == "__main__":
    main()
