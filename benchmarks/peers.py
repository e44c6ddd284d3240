"""What the service is compared with: PyTorch DistributedDataParallel over gloo, and a plain PyTorch loop.

Each peer stays alive between rounds, so that rounds of both sides can take turns in one run.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
from tasks import NUM_SAMPLES, Size, arrays, model
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

LR, MAX_NORM = 1e-4, 1.0


def _trainer(module: nn.Module, batch: int, rank: int, world: int) -> Callable[[], None]:
    """One step: batch, forward, backward, clip by norm, fused AdamW."""
    inputs, targets = arrays()
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, fused=True)
    criterion = nn.CrossEntropyLoss()
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(NUM_SAMPLES, generator=generator)
    position = 0

    def step() -> None:
        nonlocal position
        start = (position * world + rank) * batch % NUM_SAMPLES
        chosen = order[start : start + batch]
        position += 1
        optimizer.zero_grad()
        criterion(module(inputs[chosen]), targets[chosen]).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        optimizer.step()

    return step


def _run(rank: int, world: int, port: int, size: Size, batch: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = model(size.width, size.layers)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        distributed.init_process_group("gloo", rank=rank, world_size=world)
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    step = _trainer(module, batch, rank, world)
    while (steps := orders.recv()) > 0:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        orders.send(times)
    if world > 1:
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Peer:
    """`world` processes of one thread each that train `size` with `batch` samples each a step."""

    def __init__(self, size: Size, batch: int, world: int) -> None:
        context = get_context("spawn")
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(rank, world, port, size, batch, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def round(self, steps: int) -> list[float]:
        """Seconds of each of `steps` steps, as rank 0 saw them."""
        for pipe in self._pipes:
            pipe.send(steps)
        seconds: list[list[float]] = [pipe.recv() for pipe in self._pipes]
        return seconds[0]

    def pids(self) -> list[int]:
        """Of all ranks."""
        return [process.pid for process in self._processes if process.pid is not None]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(0)
        for process in self._processes:
            process.join()
