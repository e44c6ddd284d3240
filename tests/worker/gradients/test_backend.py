"""The device of a worker. What needs a GPU is skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from ps.memory.segment import Segment
from ps.parameters.layout import build_layout
from ps.step.messages import Assign, Round
from steepest.spec import spec_from_dict
from tests.support import tasks
from worker.gradients.backend import CpuBackend, DeviceBackend, backend_of
from worker.gradients.batches import Batches
from worker.gradients.compute import Computer
from worker.gradients.slots import Slots, num_slots
from worker.gradients.torch_engine import TorchEngine
from worker.task.load import TaskError
from worker.task.model import check_fits, describe_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_on_a_cpu_nothing_is_copied() -> None:
    backend = backend_of("cpu")
    assert isinstance(backend, CpuBackend)
    shared = torch.zeros(10)
    assert backend.parameters(shared) is shared
    assert backend.gradient(shared) is shared
    batch = (torch.ones(2), {"a": torch.ones(1)})
    assert backend.batch(batch) is batch


@needs_gpu
def test_sums_and_parameters_travel_between_the_device_and_shared_memory() -> None:
    backend = backend_of("cuda")
    assert isinstance(backend, DeviceBackend)
    segment = Segment.create(40 << 20, "backend")
    shared = segment.tensor(torch.float32, 10 << 20)
    shared.copy_(torch.randn(10 << 20))
    parameters, gradient = backend.parameters(shared), backend.gradient(shared)
    backend.refresh(parameters, shared)
    assert torch.equal(parameters.cpu(), shared)
    assert shared.is_pinned()
    gradient.copy_(parameters).mul_(2)
    backend.publish(gradient, shared, 0, len(shared))
    backend.wait()
    assert torch.equal(shared, gradient.cpu())


@needs_gpu
@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_gradients_of_a_gpu_are_those_of_the_cpu(precision: str) -> None:
    spec = spec_from_dict({"task": {"module": "m", "function": "f"}, "steps": 2, "precision": precision})
    sums = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        task = tasks.regression(hidden=2000)
        model = describe_model(task)
        layout = build_layout(model)
        backend = backend_of(device)
        count = num_slots(spec.data.num_micro_batches)
        segment = Segment.create(count * layout.nbytes, "gradients")
        slots = segment.tensor(layout.dtype, count * layout.numel).view(count, -1)
        engine = TorchEngine(task, model, layout, backend, precision)
        batches = Batches(spec, engine, backend, 101, 0)
        slots_of = Slots(slots, layout, backend)
        computer = Computer(engine, layout, slots_of, batches, spec.data.num_micro_batches)
        flat = Segment.create(layout.nbytes, "parameters").tensor(layout.dtype, layout.numel)
        engine.write_initial(flat)
        engine.bind(flat)
        engine.refresh()
        (node,) = computer.answer(Assign(0, Round.TRAIN, ((0, 8),)), b"").nodes
        assert node.slot is not None
        sums.append(slots[node.slot].clone())
    tolerance = 1e-5 if precision == "full" else 2e-2
    torch.testing.assert_close(sums[1], sums[0], rtol=tolerance, atol=tolerance * float(sums[0].abs().max()))


def test_what_cannot_be_computed_so_is_refused() -> None:
    analytic, double = tasks.least_squares(), tasks.regression(dtype="float64")
    for task, precision, device, field in (
        (analytic, "full", "cuda", "placement.device"),
        (analytic, "bf16", "cpu", "precision"),
        (double, "bf16", "cpu", "precision"),
    ):
        with pytest.raises(TaskError) as caught:
            check_fits(task, describe_model(task), precision, device)
        assert caught.value.field == field
    check_fits(tasks.regression(), describe_model(tasks.regression()), "bf16", "cuda")
