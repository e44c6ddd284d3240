"""Several hosts, each a network namespace: the same bits, and no more traffic than one gradient a host."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.hosts import Host, hosts
from harness.local_job import hashes, job_config, run_here, running
from ps.job.credentials import Credentials
from ps.job.footprint import footprint
from steepest.client import Client
from tests.support.choices import full
from tests.support.service import COMMAND, RAY_ENVIRONMENT, TASKS, serving, until

pytestmark = pytest.mark.cluster

LARGE: dict[str, Any] = {
    "task": "tests.support.tasks:large",
    "steps": 4,
    "clip": {"norm": 1.0},
    "data": {"global_batch": 24, "micro_batch": 3},
}
DATA = {"global_batch": 24, "micro_batch": 3}
SLOW: dict[str, Any] = {
    "task": "tests.support.tasks:slow",
    "arguments": {"delay": 0.004},
    "epochs": 8,
    "data": {"global_batch": 24, "micro_batch": 3},
}
DEEP = {**SLOW, "task": "tests.support.tasks:deep"}
IN_PARTS: dict[
    str, Any
] = {  # with one micro-batch for a worker, the first thing it sends of a gradient is not all of it
    "task": "tests.support.tasks:checkpointed_twice",
    "arguments": {"width": 600},
    "steps": 4,
    "data": {"global_batch": 24, "micro_batch": 12},
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """Of both jobs, undisturbed, in one process."""
    slow, deep = ({**raw, "arguments": {"delay": 0.0}} for raw in (SLOW, DEEP))
    directory = tmp_path_factory.mktemp("expected")
    return {
        raw["task"]: hashes(run_here(job_config(directory / str(number), **raw)))
        for number, raw in enumerate((LARGE, slow, deep, IN_PARTS))
    }


LAYOUTS: dict[str, tuple[list[int], list[int], int]] = {
    "a server each": ([0, 1], [0, 0, 1, 1], 2),
    "three": ([0, 1, 2], [0, 1, 1, 2, 2], 3),
    "two servers each": ([0, 1, 0, 1], [1, 1, 0], 4),
    "one server": ([0], [0, 1, 2], 1),
    "a home without a shard": ([0, 1], [0, 1, 1, 2], 1),
    "a leader apart": ([2], [0, 0, 1], 1),
}
JOBS = {"large": LARGE, "slow": SLOW, "deep": DEEP, "in parts": IN_PARTS}
QUICK = {
    ("deep", "two servers each"),
}


@pytest.mark.parametrize(
    ("name", "where"),
    [pytest.param(n, w, marks=[] if (n, w) in QUICK else pytest.mark.full) for n in JOBS for w in LAYOUTS],
)
def test_where_hosts_are_does_not_show_in_the_bits(
    three: list[Host],
    expected: dict[str, tuple[str, str]],
    tmp_path: Path,
    name: str,
    where: str,
) -> None:
    raw, (servers, workers, shards) = JOBS[name], LAYOUTS[where]
    config = job_config(tmp_path, **{**raw, "placement": {"servers": shards}})
    places = [three[i] for i in servers], [three[i] for i in workers]
    with running(config, len(workers), *places) as job:
        assert hashes(job.finish()) == expected[raw["task"]]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("deep", "a home without a shard"),
        full("large", "three", name="large"),
        full("in parts", "two servers each", name="parts"),
    ],
)
def test_nor_does_tls(
    three: list[Host], expected: dict[str, tuple[str, str]], tmp_path: Path, name: str, where: str
) -> None:
    raw, (servers, workers, shards) = JOBS[name], LAYOUTS[where]
    config = job_config(tmp_path, **{**raw, "placement": {"servers": shards}})
    config = replace(config, credentials=Credentials.create())
    places = [three[i] for i in servers], [three[i] for i in workers]
    with running(config, len(workers), *places) as job:
        if name == "deep":
            job.wait_for_step(3)
            job.kill_worker("worker-3")
            job.start_worker("worker-3", places[1][3])
        assert hashes(job.finish()) == expected[raw["task"]]


@pytest.mark.parametrize("raw", [full(SLOW, name="slow"), full(DEEP, name="deep")])
def test_workers_killed_on_a_host_leave_no_trace(
    three: list[Host], expected: dict[str, tuple[str, str]], tmp_path: Path, raw: dict[str, Any]
) -> None:
    config = job_config(tmp_path, **{**raw, "placement": {"servers": 2}})
    where = [three[0], three[1], three[1]]
    with running(config, 3, three[:2], where) as job:
        for round_, victim in enumerate((1, 2, 0)):
            job.wait_for_step(3 + 8 * round_)
            job.kill_worker(f"worker-{victim}")
            job.start_worker(f"worker-{victim}", where[victim])
        assert hashes(job.finish()) == expected[raw["task"]]


ROUND_TRIP_SECONDS = 0.02

CONNECT = """
import socket, sys, time
began = time.perf_counter()
try:
    socket.create_connection((sys.argv[1], 1))
except ConnectionRefusedError:
    print(time.perf_counter() - began)
"""


@pytest.mark.full
@pytest.mark.parametrize("raw", [LARGE, DEEP], ids=["large", "deep"])
def test_far_hosts_give_the_same_bits(
    three: list[Host], expected: dict[str, tuple[str, str]], tmp_path: Path, raw: dict[str, Any]
) -> None:
    assert three  # for what it skips without
    with hosts(2, ROUND_TRIP_SECONDS) as far:
        command = [*far[0].prefix, sys.executable, "-c", CONNECT, far[1].address]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        assert float(answer.stdout) >= ROUND_TRIP_SECONDS
        for host in far:
            host.limit("100mbit")
        config = job_config(tmp_path, **{**raw, "placement": {"servers": 2}})
        where = [far[0], far[0], far[1]]
        with running(config, 3, far, where) as job:
            job.wait_for_step(1)
            job.kill_worker("worker-2")
            job.start_worker("worker-2", where[2])
            assert hashes(job.finish()) == expected[raw["task"]]


def _bytes_a_step(three: list[Host], directory: Path, workers: list[int], servers: list[int], steps: int) -> float:
    """Over all interfaces, once the job is under way: the difference between a long job and a short one."""
    totals = []
    for number, length in enumerate((2, 2 + steps)):
        raw = {**LARGE, "steps": length, "data": DATA, "placement": {"servers": len(servers)}}
        before = sum(sum(host.traffic()) for host in three)
        places = [three[i] for i in servers], [three[i] for i in workers]
        with running(job_config(directory / str(number), **raw), len(workers), *places) as job:
            job.finish()
        totals.append(sum(sum(host.traffic()) for host in three) - before)
    return (totals[1] - totals[0]) / steps


@pytest.mark.full
def test_a_host_sends_one_gradient_however_many_workers_it_has(three: list[Host], tmp_path: Path) -> None:
    placement = {"workers": 6, "servers": 2}
    config = job_config(tmp_path / "size", **{**LARGE, "data": DATA, "placement": placement})
    planned = 2 * footprint(config.spec, config.layout(), num_hosts=2).network  # every byte is counted at both ends
    two = _bytes_a_step(three, tmp_path / "two", [0, 1], [0, 1], 60)
    six = _bytes_a_step(three, tmp_path / "six", [0, 0, 0, 1, 1, 1], [0, 1], 60)
    # Each host sends the part it does not own and gets as much back. A host whose range of micro-batches is not quite a
    # node of the tree sends two, which makes half as much again; three workers that each went over the network would
    # make it threefold.
    nbytes = config.layout().nbytes
    assert 3.9 * nbytes < two < 4 * nbytes * 1.6
    assert 3.9 * nbytes < six < 4 * nbytes * 1.6
    assert planned == 6 * nbytes  # dealt evenly, eight micro-batches are five for one host and three for the other


RAY_CPUS = (2, 3)


@pytest.fixture
def cluster_address(three: list[Host], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A raylet on each of two hosts."""
    program = str(Path(sys.executable).parent / "ray")
    address = f"{three[0].address}:6379"
    # Sockets below a directory of pytest's would have names longer than Unix takes.
    directory = tempfile.mkdtemp(prefix="ray-")
    head = ["--head", "--port", "6379", "--include-dashboard", "false", "--temp-dir", directory]
    raylets, logs = [], []
    for host, cpus, own in zip(three, RAY_CPUS, (head, ["--address", address]), strict=False):
        log = tmp_path_factory.mktemp("ray") / "log"
        command = [*host.prefix, program, "start", *own, "--node-ip-address", host.address, "--num-cpus", str(cpus)]
        with log.open("w") as output:
            raylets.append(subprocess.Popen([*command, "--block"], env=RAY_ENVIRONMENT, stdout=output, stderr=output))
        logs.append(log)
        until(lambda log=log: "block forever" in log.read_text())
    yield address
    for raylet in reversed(raylets):
        raylet.terminate()
        raylet.wait(60)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.full
def test_a_service_has_its_jobs_speak_tls(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--cpus", "2", "--exchange-tls") as address, Client(address) as client:
        placement = {"workers": 2, "servers": 2, "transport": "inline"}
        job = client.submit(f"{TASKS}:slow", arguments={"delay": 0.05}, steps=40, placement=placement)
        until(lambda: job.get().step >= 3)
        job.scale(1)
        ended = job.wait()
        expected = hashes(run_here(job_config(tmp_path / "here", "tests.support.tasks:slow", steps=40)))
        assert (ended.parameters_sha256, ended.state_sha256) == expected


@pytest.mark.full
@pytest.mark.parametrize(("servers", "names"), [(2, ["server-0", "server-1"]), (1, ["server-0", "home-0"])])
def test_ray_puts_servers_where_the_workers_are(
    three: list[Host], cluster_address: str, tmp_path: Path, servers: int, names: list[str]
) -> None:
    data, prefix = tmp_path / "data", three[0].prefix
    with serving(data, "--ray-address", cluster_address, prefix=prefix) as address:
        run = subprocess.run(
            [
                *prefix, *COMMAND, "submit", f"{TASKS}:large", "--steps", "6", "--workers", "5",
                "--servers", str(servers), "--server", address, "--watch", "--json",
            ],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        result = json.loads(run.stdout.splitlines()[-1])
        expected = hashes(run_here(job_config(tmp_path / "here", "tests.support.tasks:large", steps=6)))
        assert (result["parameters_sha256"], result["state_sha256"]) == expected
        assert [server["id"] for server in result["servers"]] == names
