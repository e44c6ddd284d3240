"""Where Ray puts what is to be on a GPU, and what a user is told when Ray counts GPUs that PyTorch does not find.

What Ray counts need not be there, so this runs anywhere; jobs on a GPU are in tests/worker/process/test_gpu_jobs.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from steepest.client import Client
from steepest.errors import JobFailedError
from tests.support.choices import full
from tests.support.service import RAY_ENVIRONMENT, TASKS, raylets, serving

PLACED = """
import json, sys, time
import ray
from services.cluster import cluster  # prepares Ray's environment
from services.cluster import job_room
from services.cluster.fork_servers import ForkServers
from steepest.spec import PlacementSpec

class Actor:
    def describe(self): return ray.get_gpu_ids(), 0, ray.get_runtime_context().get_node_id()
    def connect(self, addresses): pass
    def wait(self): import time; time.sleep(60)

class Worker:
    def describe(self): return ray.get_gpu_ids(), ray.get_runtime_context().get_node_id()
    def run(self, *arguments): pass

class Both(Actor):
    def run(self, *arguments): pass

def remote(cls):
    class Made:
        @staticmethod
        def options(**options):
            options.pop("runtime_env")
            made = ray.remote(type(cls.__name__, (cls,), {"__init__": lambda self, *arguments: None}))
            return made.options(**options)
    return Made

ray.init(address=sys.argv[1], log_to_driver=False)
job_room.ServerActor, job_room.WorkerActor, job_room.GpuActor = remote(Actor), remote(Worker), remote(Both)
placed = job_room.JobRoom(
    PlacementSpec(workers=3, servers=2, device="cuda", server_device="cuda"), 1000, ForkServers(), inline=False
)
for _ in range(3):
    placed.add_group()
assert placed.wait(30) and placed.add_servers(30)
servers = [(address, where.host) for address, where in placed.start_servers(None, lambda index, end: None)]

def start(number):
    placed.start_worker(None, f"worker-{number}", 0, [], lambda started: None, lambda end: None)
    process = placed._workers[f"worker-{number}"]
    while not process.ended:
        time.sleep(0.01)
    described = ray.get(process.actor.describe.remote())
    return described[0], described[-1]

workers = [start(number) for number in range(3)]
for number in (2, 0):
    placed.stop_worker(f"worker-{number}", keep_room=False)
again = start(3)
placed.release()
print(json.dumps([servers, workers, again]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with raylets([{"num_cpus": 4, "num_gpus": 2}, {"num_cpus": 4, "num_gpus": 1}]) as address:
        yield address


@pytest.mark.full
def test_a_server_is_on_the_gpu_of_the_worker_of_its_number(cluster: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PLACED, cluster], capture_output=True, text=True, env=RAY_ENVIRONMENT, timeout=120
    )
    assert run.returncode == 0, run.stderr
    servers, workers, again = json.loads(run.stdout.splitlines()[-1])
    assert all(len(gpus) == 1 for gpus, _ in workers)
    assert len({json.dumps(worker) for worker in workers}) == 3
    assert servers == workers[:2]
    assert servers[0][1] != servers[1][1]  # round the nodes
    assert again in (workers[0], workers[2])  # a server's GPU is kept while its worker is away


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch finds the GPU")
@pytest.mark.parametrize("server_device", [full("cpu"), full("cuda")])
def test_a_gpu_that_pytorch_does_not_find(cluster: str, tmp_path: Path, server_device: str) -> None:
    with serving(tmp_path / "data", "--ray-address", cluster) as address, Client(address) as client:
        placement = {"device": "cuda", "server_device": server_device, "max_worker_restarts": 0}
        job = client.submit(f"{TASKS}:regression", steps=2, placement=placement)
        with pytest.raises(JobFailedError) as caught:
            job.wait()
    for words in ("finds no CUDA device on", "where Ray counts a GPU", "placement.device = cpu"):
        assert words in str(caught.value)
