"""Runs a job's real servers and workers, over real gRPC, without Ray and without the service.

`run_here` keeps one worker and its servers in this process; `run_processes` gives each a process of its own, forked
from one that has imported torch already, so that a whole job takes about a second.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from harness.hosts import Host
from ps.checkpoint.files import State, newest_valid, state_hashes
from ps.job.config import JobConfig
from ps.job.environment import set_variables
from ps.memory.gpu import Device, device_of
from ps.server.parameter_server import ParameterServer
from ps.wire.address import ServerAddress
from steepest.spec import spec_from_dict
from worker.gradients.backend import Backend, backend_of
from worker.process.loop import WorkerLoop
from worker.task.load import load_task
from worker.task.model import describe_model, num_samples

WAIT_SECONDS = 60.0


def job_config(directory: Path, task: str, **raw: Any) -> JobConfig:
    """The config that the service would make. task: "module:function". raw: the spec."""
    module, function = task.split(":")
    arguments = raw.pop("arguments", {})
    spec = spec_from_dict({**raw, "task": {"module": module, "function": function, "arguments": arguments}})
    set_variables(spec.environment, {})
    loaded = load_task(spec.task, None, spec.seed)
    return JobConfig(
        job="local",
        incarnation=1,
        token="a secret",
        spec=spec,
        model=describe_model(loaded),
        num_samples=num_samples(loaded.train_data, "train_data"),
        num_evaluation_samples=0 if loaded.eval_data is None else num_samples(loaded.eval_data, "eval_data"),
        metric_names=tuple(loaded.metrics),
        num_servers=spec.placement.num_servers,
        checkpoint_directory=directory,
    )


def final_state(config: JobConfig) -> State:
    """The state a finished job left."""
    restored = newest_valid(config.checkpoint_directory)
    assert restored is not None, "the job left no checkpoint"
    state = restored[1]
    assert state.step == config.plan().total_steps
    return state


def connect_all(servers: Sequence[ParameterServer]) -> None:
    """Have servers of this process meet each other."""
    addresses = [server.address for server in servers]
    for server in servers:
        server.connect(addresses)


def run_here(config: JobConfig, backend: Backend | None = None, devices: Sequence[Device | None] = ()) -> State:
    """Train with one worker, all in this process. devices: of the servers; a worker on a GPU is on the first one's."""
    devices = devices or [None] * config.num_servers
    servers = [ParameterServer(config, i, "127.0.0.1", device) for i, device in enumerate(devices)]
    try:
        connect_all(servers)
        backend = backend or backend_of("cpu")
        beside = servers[0] if backend.gpu is not None and servers[0].gpu_parameters is not None else None
        WorkerLoop(config, "worker-0", 0, None, backend).run([s.address for s in servers], beside)
        return final_state(config)
    finally:
        for server in servers:
            server.stop()


def _enter(host: Host | None) -> str:
    """Move to a host; the address to listen on there."""
    if host is None:
        return "127.0.0.1"
    host.enter()
    return host.address


def _serve(config: JobConfig, index: int, pipe: Connection, host: Host | None) -> None:
    torch.set_num_threads(1)
    server = ParameterServer(config, index, _enter(host), device_of(config.spec.placement.server_device))
    pipe.send(server.address)
    addresses = pipe.recv()
    server.connect(addresses)
    pipe.send("ready")
    beside: threading.Thread | None = None
    with contextlib.suppress(EOFError):
        while asked := pipe.recv():
            match asked:
                case "step":
                    pipe.send(-1 if server.leader is None else server.leader.step)
                case "works":
                    pipe.send(beside is not None and beside.is_alive())
                case name:
                    loop = WorkerLoop(config, name, 1, None, backend_of(config.spec.placement.device))
                    beside = threading.Thread(target=loop.run, args=(addresses, server))
                    beside.start()


def work(config: JobConfig, name: str, generation: int, addresses: list[ServerAddress], host: Host | None) -> None:
    """A worker's process."""
    _enter(host)
    WorkerLoop(config, name, generation, None, backend_of(config.spec.placement.device)).run(addresses)


class _Beside:
    """A worker in the process of a server on its GPU; as much of a process as is asked of it."""

    def __init__(self, name: str, pipe: Connection) -> None:
        self._pipe = pipe
        pipe.send(name)

    def is_alive(self) -> bool:
        """Whether it still works."""
        self._pipe.send("works")
        return bool(self._pipe.recv())

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        deadline = time.monotonic() + (timeout or WAIT_SECONDS)
        while self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)

    def kill(self) -> None:
        """It ends with its server."""


@dataclass
class LocalJob:
    """Processes of a running job."""

    config: JobConfig
    addresses: list[ServerAddress]
    servers: list[BaseProcess]
    pipes: list[Connection]
    workers: dict[str, Any] = field(default_factory=dict)
    generation: int = 0
    work: Callable[..., None] = field(default=work)

    def start_worker(self, name: str, host: Host | None = None) -> None:
        """A new process, in place of one of the same name if there was. With servers on GPUs, one beside each first."""
        self.generation += 1
        if self.config.spec.placement.server_device == "cuda" and len(self.workers) < self.config.num_servers:
            self.workers[name] = _Beside(name, self.pipes[len(self.workers)])
            return
        process = _context().Process(target=self.work, args=(self.config, name, self.generation, self.addresses, host))
        process.start()
        self.workers[name] = process

    def kill_worker(self, name: str) -> None:
        """Kill a worker that still works; fails when it was dismissed already, for then nothing would be tested."""
        process = self.workers[name]
        assert process.is_alive(), f"{name} has ended before it was killed"
        process.kill()
        process.join()

    def wait_for_step(self, step: int, seconds: float = WAIT_SECONDS) -> None:
        """Return when so many steps are done, while the job still runs."""
        deadline = time.monotonic() + seconds
        while self.step < step:
            assert time.monotonic() < deadline, f"step {step} was not reached within {seconds:g} s"
            time.sleep(0.002)
        assert self.step < self.config.plan().total_steps, "the job has ended"

    @property
    def step(self) -> int:
        """How many steps are done."""
        self.pipes[0].send("step")
        return int(self.pipes[0].recv())

    def finish(self, seconds: float = WAIT_SECONDS) -> State:
        """Wait for the end, for no longer than so many seconds for each worker."""
        for process in self.workers.values():
            process.join(seconds)
            assert not process.is_alive(), "a worker was not dismissed"
        return final_state(self.config)


def _context() -> Any:
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.local_job", "sklearn.datasets"])
    return context


@contextlib.contextmanager
def running(
    config: JobConfig,
    workers: int,
    servers_on: Sequence[Host | None] = (),
    workers_on: Sequence[Host | None] = (),
    *,
    work: Callable[..., None] = work,
) -> Iterator[LocalJob]:
    """A job whose processes are gone at the end. servers_on, workers_on: their hosts, this one when not said.

    work: what a worker's process does, if it is not `work`. Servers beyond the job's own number are homes without a
    shard.
    """
    pipes, servers = [], []
    for index in range(max(config.num_servers, len(servers_on))):
        ours, theirs = _context().Pipe()
        host = servers_on[index] if servers_on else None
        process = _context().Process(target=_serve, args=(config, index, theirs, host), daemon=True)
        process.start()
        pipes.append(ours)
        servers.append(process)
    job = LocalJob(config, [pipe.recv() for pipe in pipes], servers, pipes, work=work)
    try:
        for pipe in pipes:
            pipe.send(job.addresses)
        for pipe in pipes:
            assert pipe.recv() == "ready"
        for number in range(workers):
            job.start_worker(f"worker-{number}", workers_on[number] if workers_on else None)
        yield job
    finally:
        for process in [*job.workers.values(), *servers]:
            if isinstance(process, BaseProcess):
                process.kill()
                process.join()


def run_processes(config: JobConfig, workers: int, seconds: float = WAIT_SECONDS) -> State:
    """Train with real processes."""
    with running(config, workers) as job:
        return job.finish(seconds)


def hashes(state: State) -> tuple[str, str]:
    """(parameters_sha256, state_sha256)."""
    return state_hashes(state)
