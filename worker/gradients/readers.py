"""Processes that read and collate micro-batches ahead of their use.

Each loads the task by itself and fetches whole micro-batches, with the random generators seeded for each as they are
without readers: so what is read is the same, and only sooner. They are forked from a process that has imported torch,
and end with the worker.
"""

from __future__ import annotations

import io
import multiprocessing
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing  # tensors go between processes by shared memory
from numpy.typing import NDArray

from steepest.spec import TaskReference
from steepest.task import Task
from worker.data.sources import source_of
from worker.gradients.backend import CpuBackend
from worker.gradients.seeding import DATA, seed_all
from worker.task.load import load_task, said, user_traceback

SMALL_BYTES = 64 << 10  # what a pipe holds; a shared-memory segment of its own is dearer up to there


class ReadingError(Exception):
    """A reader failed. The message has what user code raised, and its traceback."""


@dataclass(frozen=True)
class Reading:
    """What a reader needs to load the task. path: where it finds modules. code: of the code bundle."""

    task: TaskReference
    code: Path | None
    seed: int
    path: tuple[str, ...]


class _Key(NamedTuple):
    step: int
    micro_batch: int


class Readers:
    """So many readers, and what they have been asked for."""

    def __init__(self, reading: Reading, number: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["worker.gradients.readers"])
        self._pipes: list[Connection] = []
        self._asked: list[list[_Key]] = [[] for _ in range(number)]  # by reader, in order
        self._read: dict[_Key, Any] = {}
        with _no_main_module():
            for number_ in range(number):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(theirs, reading), daemon=True, name=f"steepest-reader-{number_}"
                )
                process.start()
                theirs.close()
                self._pipes.append(ours)

    @property
    def number(self) -> int:
        """How many readers there are."""
        return len(self._pipes)

    def ask(self, step: int, index: int, indices: NDArray[np.int64]) -> None:
        """Have a micro-batch read, unless it is already."""
        key = _Key(step, index)
        if key in self._read or any(key in asked for asked in self._asked):
            return
        reader = min(range(len(self._pipes)), key=lambda number: len(self._asked[number]))
        try:
            self._pipes[reader].send((step, index, indices))
        except OSError as error:
            raise ReadingError(f"a reader is gone: {said(error)}") from error
        self._asked[reader].append(key)

    def take(self, step: int, index: int) -> Any:
        """The batch of a micro-batch that was asked for. Raises ReadingError."""
        wanted = _Key(step, index)
        while wanted not in self._read:
            reader = next(number for number, asked in enumerate(self._asked) if wanted in asked)
            self._receive(reader)
        result = self._read.pop(wanted)
        if isinstance(result, _Failed):
            raise ReadingError(f"{result.message}\n{result.traceback}")
        return result

    def forget(self, before: int) -> None:
        """Drop what was read for steps before this one."""
        for reader in range(len(self._pipes)):
            while self._asked[reader] and self._pipes[reader].poll():
                self._receive(reader)
        self._read = {key: batch for key, batch in self._read.items() if key.step >= before}

    def _receive(self, reader: int) -> None:
        try:
            batch = self._pipes[reader].recv()
        except (EOFError, OSError) as error:
            raise ReadingError("a reader ended: it may have run out of memory, or user code ended it") from error
        self._read[self._asked[reader].pop(0)] = batch


class _Pickler(ForkingPickler):
    """Copies small tensors, where torch would share their memory.

    A tensor that is to be read conjugated or negated is sent as it reads: torch's way loses that.
    """

    def reducer_override(self, value: Any) -> Any:
        if type(value) is torch.Tensor and (value.is_conj() or value.is_neg()):
            return _itself, (value.resolve_conj().resolve_neg(),)
        if (
            type(value) is torch.Tensor
            and value.device.type == "cpu"
            and value.layout is torch.strided
            and value.is_contiguous()
            and not (value.requires_grad or value.is_quantized)
            and value.numel() * value.itemsize <= SMALL_BYTES
        ):
            return _unpickled, (value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return NotImplemented


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value


def _unpickled(dtype: torch.dtype, shape: tuple[int, ...], content: bytes) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    if content:
        tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(content, dtype=np.uint8)
    return tensor


def _send(pipe: Connection, answer: Any) -> None:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(answer)
    pipe.send_bytes(buffer.getbuffer())


@dataclass(frozen=True)
class _Failed:
    message: str
    traceback: str


def _serve(pipe: Connection, reading: Reading) -> None:
    """A reader's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the worker's to handle
    torch.set_num_threads(1)
    sys.path += [entry for entry in reading.path if entry not in sys.path]
    failed, source = None, None
    try:
        task = load_task(reading.task, reading.code, reading.seed)
        assert isinstance(task, Task)  # noqa: S101  # only a Task has data to read
        source = source_of(task.train_data, task.collate)
    except BaseException as error:
        failed = _Failed(said(error), user_traceback(error))
    backend = CpuBackend()
    while True:
        try:
            step, index, indices = pipe.recv()
        except (EOFError, OSError):
            return  # the worker is gone
        answer: Any = failed
        if source is not None:
            try:
                seed_all(reading.seed, DATA, step, index, backend=backend)
                answer = source.batch(indices)
            except BaseException as error:
                answer = _Failed(said(error), user_traceback(error))
        try:
            _send(pipe, answer)
        except (OSError, EOFError):
            return
        except Exception as error:
            pipe.send(_Failed(f"a batch cannot go to another process: {said(error)}", ""))


class _no_main_module:  # noqa: N801  # a context manager
    """New processes are not to import the main module of this one, which is Ray's."""

    def __enter__(self) -> None:
        self._main = sys.modules["__main__"]
        self._spec, self._file = getattr(self._main, "__spec__", None), getattr(self._main, "__file__", None)
        self._main.__spec__ = None
        if self._file is not None:
            del self._main.__file__

    def __exit__(self, *_: object) -> None:
        self._main.__spec__ = self._spec
        if self._file is not None:
            self._main.__file__ = self._file
