"""How fast gradients go to servers on another host and parameters come back: two network namespaces and a switch.

`python -m benchmarks.network` (as root; needs iproute2). A round pushes a layout of 25 million float32 to 1, 2 or 4
shards at once, as workers do with `transport = inline`, and then pulls as much back; numbers of shards take turns, and
a figure is the median of the rounds. `--limit 1gbit` shapes the link. `--tls` has each number of shards once more under
TLS; both ends of the link share the processors, so that encrypting and decrypting are seen together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.report import RESULTS, write_report
from harness.hosts import Host, hosts
from ps.job.credentials import Credentials
from ps.parameters.description import ModelDescription, TensorDescription
from ps.parameters.layout import build_layout, shards
from ps.wire.chunks import chunks, place
from ps.wire.connection import Connection, Role, connect
from ps.wire.listener import Listener, Service
from steepest.v1 import exchange_pb2 as pb

NUMEL = 25_000_000
WARM_UP_ROUNDS = 2
CREDENTIALS = Credentials.create()
LAYOUT = build_layout(ModelDescription((TensorDescription("p", (NUMEL,), "float32"),), (), ()))


def serve(num_shards: int, address: str, credentials: Credentials | None) -> None:
    """A host with `num_shards` servers that take gradients in and send as much back when all is there."""
    cut = shards(LAYOUT, num_shards)

    def run(connection: Connection[pb.WorkerMessage]) -> None:
        first = connection.next_message()
        if first is None:
            return
        flat = torch.zeros(cut[int(first.hello.worker)].numel)
        connection.sink = lambda message, num_bytes: place(flat, message.chunk, num_bytes)
        for message in connection:
            match message.WhichOneof("message"):
                case "push":
                    connection.send(pb.ServerMessage(welcome=pb.Welcome()))
                case "hello":
                    for chunk, data in chunks(flat):
                        connection.send(pb.ServerMessage(chunk=chunk), data)

    listener = Listener({Role.WORKER: Service(pb.WorkerMessage.FromString, run)}, address, credentials)
    print(listener.address, flush=True)
    sys.stdin.read()


def work(address: str, num_shards: int, credentials: Credentials | None) -> None:
    """A worker; for each line of its input, it prints the seconds of a push and a pull."""
    flat = torch.randn(LAYOUT.numel)
    cut = shards(LAYOUT, num_shards)
    links = [connect(address, Role.WORKER, pb.ServerMessage.FromString, credentials) for _ in cut]
    parts = [flat[shard.start : shard.stop] for shard in cut]
    arrived = threading.Barrier(num_shards + 1)

    def listen(link: Connection[pb.ServerMessage], part: torch.Tensor) -> None:
        link.sink = lambda message, num_bytes: place(part, message.chunk, num_bytes)
        for message in link:
            if message.WhichOneof("message") == "welcome" or message.chunk.last:
                arrived.wait()

    for link, part in zip(links, parts, strict=True):
        threading.Thread(target=listen, args=(link, part), daemon=True).start()
    for number, link in enumerate(links):
        link.send(pb.WorkerMessage(hello=pb.Hello(worker=str(number))))
    for _ in sys.stdin:
        began = time.perf_counter()
        for link, part in zip(links, parts, strict=True):
            for chunk, data in chunks(part):
                link.send(pb.WorkerMessage(chunk=chunk), data)
            link.send(pb.WorkerMessage(push=pb.Push()))
        arrived.wait()
        pushed = time.perf_counter()
        for link in links:  # as in a job, nothing comes back before all shards have everything
            link.send(pb.WorkerMessage(hello=pb.Hello()))
        arrived.wait()
        print(json.dumps([pushed - began, time.perf_counter() - pushed]), flush=True)


class Pair:
    """A server and a worker on two hosts, that exchange a layout when they are told to."""

    def __init__(self, pair: Sequence[Host], num_shards: int, *, tls: bool) -> None:
        self.num_shards, self.tls = num_shards, tls
        self.gigabytes: list[tuple[float, float]] = []  # a second, of push and pull, in each round
        self._server = self._start(pair[0], "--serve", pair[0].address)
        assert self._server.stdout is not None
        self._worker = self._start(pair[1], "--call", self._server.stdout.readline().strip())

    def _start(self, host: Host, *arguments: str) -> subprocess.Popen[str]:
        command = [*host.prefix, sys.executable, "-m", __spec__.name, "--shards", str(self.num_shards), *arguments]
        if self.tls:
            command.append("--tls")
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert started.stdin is not None
        if self.tls:
            started.stdin.write(
                json.dumps([part.decode() for part in (CREDENTIALS.certificate, CREDENTIALS.key)]) + "\n"
            )
            started.stdin.flush()
        return started

    def round(self, *, counts: bool) -> None:
        """Push and pull once. counts: whether it is measured."""
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write("go\n")
        self._worker.stdin.flush()
        push, pull = json.loads(self._worker.stdout.readline())
        if counts:
            self.gigabytes.append((LAYOUT.nbytes / push / 1e9, LAYOUT.nbytes / pull / 1e9))

    def close(self) -> None:
        for process in (self._worker, self._server):
            process.kill()
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--limit", default="", help="of the link, in tc's words, such as 1gbit [none]")
    parser.add_argument("--tls", action="store_true", help="once more under TLS")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--call", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=RESULTS / "network.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve or options.call:
        credentials = (
            Credentials(*(text.encode() for text in json.loads(sys.stdin.readline()))) if options.tls else None
        )
        if options.serve:
            return serve(options.shards[0], options.serve, credentials)
        return work(options.call, options.shards[0], credentials)
    if os.geteuid():
        sys.exit("network namespaces need root")
    with hosts(2) as ends:
        for host in ends:
            host.limit(options.limit)
        kinds = [False, True] if options.tls else [False]
        pairs = [Pair(ends, num_shards, tls=tls) for num_shards in options.shards for tls in kinds]
        for number in range(WARM_UP_ROUNDS + options.rounds):
            for pair in pairs:
                pair.round(counts=number >= WARM_UP_ROUNDS)
        for pair in pairs:
            pair.close()
    print("| shards | push, GB/s | against one shard | pull, GB/s | against one shard |\n|---|---|---|---|---|")
    results = []
    for pair in pairs:
        push, pull = (statistics.median(column) for column in zip(*pair.gigabytes, strict=True))
        both = zip(pair.gigabytes, pairs[0].gigabytes, strict=True)
        ratios = [(own[0] / first[0], own[1] / first[1]) for own, first in both]
        to, back = (statistics.median(column) for column in zip(*ratios, strict=True))
        results.append(
            {
                "shards": pair.num_shards,
                "tls": pair.tls,
                "push": push,
                "pull": pull,
                "ratios": ratios,
                "limit": options.limit,
            }
        )
        print(f"| {pair.num_shards}{' under TLS' * pair.tls} | {push:.2f} | {to:.2f} | {pull:.2f} | {back:.2f} |")
    write_report(options.json, results=results)
    return None


if __name__ == "__main__":
    main()
