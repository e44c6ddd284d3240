"""What every device keeps; the stand-in of other tests is held to it as a GPU is."""

from __future__ import annotations

import pytest
import torch

from ps.memory.gpu import CudaDevice, Device
from ps.memory.segment import Segment
from tests.support.stand_in import StandInDevice

NUMEL = 5000


@pytest.fixture(params=["stand-in", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "stand-in":
        return StandInDevice()
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return CudaDevice()


def test_copies_go_both_ways_and_are_there_after_a_wait(device: Device) -> None:
    host = Segment.create(8 * NUMEL, "device").tensor(torch.float32, 2 * NUMEL)
    device.lock(host)
    there = torch.empty(NUMEL, device=device.torch_device)
    host[:NUMEL] = torch.arange(NUMEL)
    device.copy(there, host[:NUMEL])
    device.await_copies()
    there.mul_(2)
    device.copy(host[NUMEL:], there)
    device.synchronize()
    assert torch.equal(host[NUMEL:], 2 * host[:NUMEL])


def test_a_copy_waits_for_what_was_computed_before(device: Device) -> None:
    host = Segment.create(4 * NUMEL, "device").tensor(torch.float32, NUMEL)
    device.lock(host)
    there = torch.ones(NUMEL, device=device.torch_device)
    for _ in range(10):
        there.mul_(2)
    device.copy(host, there)
    device.synchronize()
    assert torch.equal(host, torch.full((NUMEL,), 1024.0))


def test_a_lock_ends_with_its_mapping(device: Device) -> None:
    for _ in range(20):  # mappings come to lie where others have been
        host = Segment.create(4 * NUMEL, "device").tensor(torch.float32, NUMEL)
        device.lock(host)
        there = torch.full((NUMEL,), 7.0, device=device.torch_device)
        device.copy(host, there)
        device.synchronize()
        assert torch.equal(host, torch.full((NUMEL,), 7.0))
        del host
    unlocked = Segment.create(4 * NUMEL, "device").tensor(torch.float32, NUMEL)
    assert not unlocked.is_pinned()


def test_nothing_to_lock_is_no_error(device: Device) -> None:
    device.lock(torch.empty(0))
    device.seed(1)
