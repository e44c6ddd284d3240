"""A worker's life: join, then answer assignments until dismissed."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from threadpoolctl import threadpool_limits

from ps.job.config import JobConfig
from ps.job.environment import hidden
from ps.memory.segment import Segment
from ps.parameters.layout import shards
from ps.step.messages import Assign, Failure
from ps.wire.address import ServerAddress
from steepest.full_batch_spec import is_gauss_newton
from steepest.task import AnalyticTask, Task
from worker.gradients.analytic import AnalyticEngine
from worker.gradients.backend import Backend
from worker.gradients.batches import Batches
from worker.gradients.compiled import compile_model
from worker.gradients.compressor import Compressor
from worker.gradients.compute import Computer, MicroBatchError
from worker.gradients.curvature import CurvatureSignal
from worker.gradients.engine import Engine, LossError, Rehearsed, StateError
from worker.gradients.readers import Readers, Reading
from worker.gradients.recompute import checkpoint_activations
from worker.gradients.slopes import engine_of
from worker.gradients.slots import Slots, num_slots
from worker.gradients.torch_engine import TorchEngine
from worker.process.exchange import Beside, Exchange
from worker.process.output import Output
from worker.process.profile import Profile
from worker.rehearsal.fingerprint import difference, fingerprint
from worker.task.load import TaskError, initialize, load_task, user_traceback
from worker.task.model import conduct_of, describe_model

if TYPE_CHECKING:
    from ps.server.parameter_server import ParameterServer

DISMISSED_GRACE_SECONDS = 0.2


def keep_freed_memory() -> None:
    """Have glibc keep the memory of large tensors for the next step, which saves a page fault for every 4 KiB of it.

    What is free now is given back first. Without effect where another allocator is preloaded. Measured by
    benchmarks/step_time.py and memory.py.
    """
    trim_threshold, mmap_max = -1, -4  # mallopt(3)
    _tell_glibc({mmap_max: 0, trim_threshold: 2**31 - 1})


def return_freed_memory() -> None:
    """Have glibc give the memory of every tensor of 64 KiB and more back as soon as it is free.

    Among small allocations, freed activations would leave holes that nothing fits. Without effect where another
    allocator is preloaded, as in processes of a fork server. Measured by benchmarks/activations.py.
    """
    mmap_threshold = -3  # mallopt(3)
    _tell_glibc({mmap_threshold: 1 << 16})


def _tell_glibc(settings: Mapping[int, int]) -> None:
    """mallopt(3), after giving back what is free. Other C libraries are left alone."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)
    except (OSError, AttributeError):
        return


def _check_same(task: Task | AnalyticTask, config: JobConfig) -> None:
    """Raises TaskError when the task is another than at submission."""
    found = ""
    if config.fingerprint:
        found = difference(config.fingerprint, fingerprint(task))
    if not found and not describe_model(task, conduct_of(config.model, task)).is_same_as(config.model):
        found = "the model"
    if found:
        raise TaskError(
            "task",
            f"{found} is not as it was when the job was submitted, so {config.spec.task.module}:"
            f"{config.spec.task.function} returns another task in every process: have it draw from torch's, NumPy's or "
            "Python's global generator, which are seeded, and read what is the same on every host",
        )


class WorkerLoop:
    """One worker of a job. code: where the job's code bundle is unpacked. backend: of the job's device.

    output: what user code prints, if it is to be kept.
    """

    def __init__(
        self,
        config: JobConfig,
        worker: str,
        generation: int,
        code: Path | None,
        backend: Backend,
        output: Output | None = None,
    ) -> None:
        self._output = output
        threads = config.spec.placement.threads_per_worker
        torch.set_num_threads(threads)
        threadpool_limits(threads)
        self._config = config
        self._worker = worker
        self._generation = generation
        task = load_task(config.spec.task, code, config.spec.seed)
        initialize(task, config.spec.init_from, strict=config.spec.init_strict)
        _check_same(task, config)
        self._layout = config.layout()
        self._backend = backend
        if isinstance(task, AnalyticTask):
            self._engine: Engine = AnalyticEngine(task, self._layout)
        else:
            self._engine = engine_of(config.spec.derivative)(
                task,
                config.model,
                self._layout,
                backend,
                config.spec.precision,
                Rehearsed(config.evaluates_with_gradients, config.caches, config.logged_names, config.loss_counts),
            )
            if config.spec.memory.checkpoint_activations:
                checkpoint_activations(task.model, config.spec.memory.checkpoint_activations)
            if config.spec.compile:
                compile_model(task.model)
        self._initial_buffers = self._engine.initial_buffers()
        slots = num_slots(config.spec.data.num_micro_batches)
        self._segment = Segment.create(slots * self._layout.nbytes, f"gradients-{config.job}")
        shared = self._segment.tensor(self._layout.dtype, slots * self._layout.numel).view(slots, -1)
        self._slots = Slots(shared, self._layout, backend)
        codec = config.push_codec()
        num_leaves = config.spec.data.num_micro_batches
        self._compressor = (
            None if codec is None else Compressor(codec, self._layout, config.spec.part_leaves, num_leaves)
        )
        readers = None
        if config.spec.data.readers and self._engine.train_source.reads_ahead:
            reading = Reading(config.spec.task, code, config.spec.seed, tuple(sys.path))
            readers = Readers(reading, config.spec.data.readers)
        batches = Batches(
            config.spec, self._engine, backend, config.num_samples, config.num_evaluation_samples, readers
        )
        self._computer = Computer(
            self._engine,
            self._layout,
            self._slots,
            batches,
            num_leaves,
            self._compressor,
            signals_every=config.signals_every,
            curvature=self._curvature(batches),
            is_gauss_newton=is_gauss_newton(config.spec.optimizer),
        )

    def _curvature(self, batches: Batches) -> CurvatureSignal | None:
        every, engine = self._config.spec.telemetry.curvature_every, self._engine
        if not every or not isinstance(engine, TorchEngine):
            return None
        return CurvatureSignal(engine, self._layout, batches, every, self._config.spec.seed)

    def run(self, addresses: Sequence[ServerAddress], server: ParameterServer | None = None) -> None:
        """Work until dismissed. addresses: of the servers, the leader first. server: the one in this process, if any.

        Raises ConnectionError when a server is gone, RefusedError when one says no."""
        beside = None
        if server is not None and server.gpu_parameters is not None and not self._config.spec.is_inline:
            beside = Beside(server.index, partial(server.call_from_here, self._slots.flat))
            own = shards(self._layout, self._config.num_servers)[server.index]
            self._backend.share(server.gpu_parameters, own.start, own.stop)
        exchange = Exchange(
            self._config, self._worker, self._generation, addresses, self._segment, self._compressor, beside
        )
        if self._output is not None:
            self._output.attach(exchange.show)
        if self._compressor is None:
            self._overlap(exchange)
        bound = False
        version = -1
        profile = Profile(self._config.spec.telemetry, self._worker, self._config.checkpoint_directory)
        try:
            for assign in exchange.assignments():
                if not bound and assign.kind != "initialize":
                    if exchange.memory is not None:
                        self._engine.share_constants(exchange.memory)
                    self._engine.bind(exchange.parameters)
                    # From here on, for the task's own initial parameters are gone.
                    (return_freed_memory if self._config.spec.memory.checkpoint_activations else keep_freed_memory)()
                    bound = True
                if assign.version != version and bound:
                    self._engine.refresh()
                    version = assign.version
                profile.begin(assign.step)
                self._answer(exchange, assign)
        finally:
            profile.end()
            self._show_output(unfinished=True)
            time.sleep(DISMISSED_GRACE_SECONDS)  # lets a last message out
            exchange.close()
            if self._output is not None:
                self._output.close()

    def _overlap(self, exchange: Exchange) -> None:
        """Have sums leave this process while they are completed, if they have to travel."""
        if self._backend.publishes:
            self._computer.overlap()
        elif exchange.has_network:
            self._computer.overlap(lambda ready: exchange.begin(ready, self._slots.shared(ready.slot)))

    def _answer(self, exchange: Exchange, assign: Assign) -> None:
        try:
            push = self._computer.answer(assign, self._initial_buffers)
        except MicroBatchError as error:
            self._show_output(unfinished=True)
            exchange.fail(self._failure(assign, error))
            return
        self._show_output()  # before the step can end, and the job with it
        exchange.push(push, self._slots)
        os.sched_yield()  # the servers come first: what they do, everybody waits for
        self._computer.prefetch(assign)

    def _show_output(self, *, unfinished: bool = False) -> None:
        if self._output is not None:
            self._output.flush(unfinished=unfinished)

    def _failure(self, assign: Assign, error: MicroBatchError) -> Failure:
        cause = error.__cause__
        assert cause is not None  # noqa: S101  # Computer always chains the cause
        where = f"at step {assign.step}, worker {self._worker}, micro-batch {error.micro_batch}"
        reason = "bad_loss" if isinstance(cause, LossError) else "user_code_raised"
        if isinstance(cause, LossError | StateError):  # the message is complete, and no frame of it is the user's
            return Failure(assign.step, error.micro_batch, reason, hidden(f"{cause} ({where})"), "", assign.kind)
        said = hidden(f"{type(cause).__name__}: {cause} ({where})")
        return Failure(assign.step, error.micro_batch, reason, said, user_traceback(cause), assign.kind)
