"""What the service is compared with: PyTorch DistributedDataParallel over gloo, the same with ZeroRedundancyOptimizer,
TorchTrainer of Ray Train around the same loop, and a plain PyTorch loop.

Each peer stays alive between rounds, so that rounds of both sides can take turns in one run.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.tasks import Size, arrays, criterion, model

LR, MAX_NORM = 1e-4, 1.0


def _optimizers(module: nn.Module, kind: str) -> list[torch.optim.Optimizer]:
    """kind: adamw, zero (the same, its state cut over the ranks), muon (with AdamW for vectors) or adafactor."""
    parameters = list(module.parameters())
    match kind:
        case "adamw":
            return [torch.optim.AdamW(parameters, lr=LR, fused=True)]
        case "zero":
            return [ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=LR, fused=True)]
        case "muon":
            matrices, others = ([p for p in parameters if (p.dim() == 2) == wanted] for wanted in (True, False))
            muon = torch.optim.Muon(matrices, lr=LR, adjust_lr_fn="match_rms_adamw")
            return [muon, torch.optim.AdamW(others, lr=LR, fused=True)]
    return [torch.optim.Adafactor(parameters, lr=LR)]


def _trainer(
    module: nn.Module,
    kind: str,
    batch: int,
    rank: int,
    world: int,
    *,
    optimizer: str = "adamw",
    device: str = "cpu",
    precision: str = "full",
) -> Callable[[], None]:
    """One step: batch, forward, backward, clip by norm, optimizer (see `_optimizers`).

    kind: of the model. device: where the module is; on a GPU a step ends when that has done its work. precision: full,
    or bf16 for autocast.
    """
    inputs, targets = arrays(kind)
    optimizers = _optimizers(module, optimizer)
    loss = criterion(kind)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(len(inputs), generator=generator)
    position = 0

    def step() -> None:
        nonlocal position
        start = (position * world + rank) * batch % len(inputs)
        chosen = order[start : start + batch]
        position += 1
        for each in optimizers:
            each.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(module(inputs[chosen].to(device)), targets[chosen].to(device))
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_NORM)
        for each in optimizers:
            each.step()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def _obey(orders: Connection, step: Callable[[], None]) -> None:
    """Make as many steps as is asked for and say how long each took, until none are."""
    while (steps := orders.recv()) > 0:
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        orders.send(times)


def _run(
    rank: int,
    world: int,
    port: int,
    size: Size,
    batch: int,
    optimizer: str,
    device: str,
    precision: str,
    orders: Connection,
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = model(size).to(device)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        distributed.init_process_group("gloo", rank=rank, world_size=world)
        module = DistributedDataParallel(module, gradient_as_bucket_view=True)
    trainer = _trainer(module, size.kind, batch, rank, world, optimizer=optimizer, device=device, precision=precision)
    _obey(orders, trainer)
    if world > 1:
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Peer:
    """`world` processes of one thread each that train `size` with `batch` samples each a step.

    optimizer, device, precision: see `_trainer`.
    """

    def __init__(
        self,
        size: Size,
        batch: int,
        world: int,
        *,
        optimizer: str = "adamw",
        device: str = "cpu",
        precision: str = "full",
    ) -> None:
        context = get_context("spawn")
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, port, size, batch, optimizer, device, precision, theirs)
            process = context.Process(target=_run, args=arguments, daemon=True)
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


def _ray_loop(config: dict[str, Any]) -> None:
    """What TorchTrainer runs in every worker."""
    import ray.train.torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = config["size"]
    module = ray.train.torch.prepare_model(model(size), parallel_strategy_kwargs={"gradient_as_bucket_view": True})
    with Client(config["address"], authkey=config["key"]) as orders:
        orders.send(rank)
        _obey(orders, _trainer(module, size.kind, config["batch"], rank, world))


class RayPeer:
    """The same as `Peer` in workers of Ray Train, on the Ray cluster that is there already."""

    def __init__(self, size: Size, batch: int, world: int) -> None:
        from ray.train import ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        key = secrets.token_bytes(16)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            config = {"size": size, "batch": batch, "address": listener.address, "key": key}
            trainer = TorchTrainer(
                _ray_loop,
                train_loop_config=config,
                scaling_config=ScalingConfig(num_workers=world, use_gpu=False),
                torch_config=TorchConfig(backend="gloo"),
            )
            self._thread = threading.Thread(target=trainer.fit)
            self._thread.start()
            pipes = [listener.accept() for _ in range(world)]
        self._pipes = sorted(pipes, key=lambda pipe: int(pipe.recv()))

    def round(self, steps: int) -> list[float]:
        """See Peer."""
        for pipe in self._pipes:
            pipe.send(steps)
        seconds: list[list[float]] = [pipe.recv() for pipe in self._pipes]
        return seconds[0]

    def close(self) -> None:
        """End the workers."""
        for pipe in self._pipes:
            pipe.send(0)
        self._thread.join()
