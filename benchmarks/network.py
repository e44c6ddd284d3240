"""How fast gradients go to servers on another host and parameters come back: two network namespaces and a switch.

`python benchmarks/network.py` (as root; needs iproute2). A round pushes a layout of 25 million float32 to 1, 2 or 4
shards at once, as workers do with `transport = inline`, and then pulls as much back. `--limit 1gbit` shapes the link.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from hosts import Host, hosts

from ps.layout import build_layout, shards
from ps.model import ModelDescription, TensorDescription
from ps.peer import chunks, place
from ps.stream import Connection, Listener, Role, Service, connect
from steepest.v1 import exchange_pb2 as pb

HERE = Path(__file__).parent
NUMEL = 25_000_000
LAYOUT = build_layout(ModelDescription((TensorDescription("p", (NUMEL,), "float32"),), (), ()))


def serve(num_shards: int, address: str) -> None:
    """A host with `num_shards` servers that take gradients in and send as much back when all is there."""
    cut = shards(LAYOUT, num_shards)

    def run(connection: Connection[pb.WorkerMessage]) -> None:
        first = connection.next_message()
        if first is None:
            return
        flat = torch.zeros(cut[int(first.hello.worker)].numel)
        connection.sink = lambda message, num_bytes: place(flat, message.chunk, num_bytes)
        for message in connection:
            if message.WhichOneof("message") == "push":
                connection.send(pb.ServerMessage(welcome=pb.Welcome()))
                for chunk, data in chunks(flat):
                    connection.send(pb.ServerMessage(chunk=chunk), data)

    listener = Listener({Role.WORKER: Service(pb.WorkerMessage.FromString, run)}, address)
    print(listener.address, flush=True)
    sys.stdin.read()


def work(address: str, num_shards: int, rounds: int) -> None:
    """A worker; prints the seconds of each round's push and pull."""
    flat = torch.randn(LAYOUT.numel)
    cut = shards(LAYOUT, num_shards)
    links = [connect(address, Role.WORKER, pb.ServerMessage.FromString) for _ in cut]
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
    for _ in range(rounds):
        began = time.perf_counter()
        for link, part in zip(links, parts, strict=True):
            for chunk, data in chunks(part):
                link.send(pb.WorkerMessage(chunk=chunk), data)
            link.send(pb.WorkerMessage(push=pb.Push()))
        arrived.wait()
        pushed = time.perf_counter()
        arrived.wait()
        print(json.dumps([pushed - began, time.perf_counter() - pushed]), flush=True)


def measure(pair: Sequence[Host], num_shards: int, rounds: int) -> tuple[float, float]:
    """(push, pull) in GB/s: medians of the rounds after the first two."""

    def start(host: Host, *arguments: str) -> subprocess.Popen[str]:
        command = [*host.prefix, sys.executable, __file__, "--shards", str(num_shards), *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with start(pair[0], "--serve", pair[0].address) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with start(pair[1], "--call", address, "--rounds", str(rounds + 2)) as worker:
            assert worker.stdout is not None
            seconds = [json.loads(line) for line in worker.stdout][2:]
        server.kill()
    push, pull = (statistics.median(column) for column in zip(*seconds, strict=True))
    return LAYOUT.nbytes / push / 1e9, LAYOUT.nbytes / pull / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--limit", default="", help="of the link, in tc's words, such as 1gbit [none]")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--call", default="", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "network.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.serve:
        return serve(options.shards[0], options.serve)
    if options.call:
        return work(options.call, options.shards[0], options.rounds)
    if os.geteuid():
        sys.exit("network namespaces need root")
    print("| shards | push, GB/s | pull, GB/s |\n|---|---|---|")
    results = []
    for num_shards in options.shards:
        with hosts(2) as pair:
            for host in pair:
                host.limit(options.limit)
            push, pull = measure(pair, num_shards, options.rounds)
        results.append({"shards": num_shards, "push": push, "pull": pull, "limit": options.limit})
        print(f"| {num_shards} | {push:.2f} | {pull:.2f} |", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
