"""What every backend keeps: servers see sums and workers see parameters, wherever they lie."""

from __future__ import annotations

import pytest
import torch

from ps.memory.gpu import CudaDevice
from ps.memory.segment import Segment
from tests.support.stand_in import StandInDevice
from worker.gradients.backend import Backend, CpuBackend, DeviceBackend

NUMEL = 1000


def _make(kind: str) -> Backend:
    if kind == "cpu":
        return CpuBackend()
    if kind == "stand-in":
        return DeviceBackend(StandInDevice())
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return DeviceBackend(CudaDevice())


@pytest.fixture(params=["cpu", "stand-in", "cuda"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return _make(request.param)


def _shared() -> torch.Tensor:
    return Segment.create(4 * NUMEL, "backend").tensor(torch.float32, NUMEL)


def test_parameters_are_the_version_that_was_refreshed(backend: Backend) -> None:
    shared = _shared()
    parameters = backend.parameters(shared)
    for version in (1.0, 2.0):
        shared.fill_(version)
        backend.refresh(parameters, shared)
        assert torch.equal(parameters.cpu(), torch.full((NUMEL,), version))
    assert parameters.device.type == backend.device.type


def test_a_sum_is_where_servers_see_it_once_it_is_waited_for(backend: Backend) -> None:
    shared = _shared()
    gradient = backend.gradient(shared)
    gradient.copy_(torch.arange(NUMEL))
    backend.publish(gradient, shared, 0, 300)
    backend.publish(gradient, shared, 300, NUMEL)
    backend.wait()
    assert torch.equal(shared, torch.arange(NUMEL, dtype=torch.float32))


def test_a_batch_keeps_its_form(backend: Backend) -> None:
    batch = (torch.ones(2), {"a": torch.zeros(1), "b": "text"})
    moved = backend.batch(batch)
    assert isinstance(moved, tuple)
    assert torch.equal(moved[0].cpu(), batch[0])
    assert moved[1]["b"] == "text"
    assert moved[0].device.type == backend.device.type


def test_only_a_gpu_takes_time_to_publish_and_shares(backend: Backend) -> None:
    assert backend.publishes == (backend.gpu is not None)
    shared = _shared()
    backend.share(torch.zeros(NUMEL, device=backend.device), 0, NUMEL)
    assert not backend.publishes
    gradient = backend.gradient(shared)
    backend.seed(3)
    backend.publish(gradient, shared, 0, NUMEL)
    backend.wait()
