"""Puts the parts of a job's state together and writes the checkpoint, in a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ps.checkpoint.files import State, write_checkpoint
from ps.checkpoint.named_state import assemble, compression_state
from ps.job.config import JobConfig
from ps.numerics.optimizer import StatePart
from ps.numerics.threads import copy_all
from ps.parameters.layout import Layout
from ps.server.collection import AVERAGE, MASTER
from ps.step.best import Standing
from ps.step.messages import StepRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is on disk, or `problem` says why not."""

    step: int
    parameters_sha256: str = ""
    state_sha256: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is made of. parts: of every shard, parameters among them. residuals: by part of the step."""

    standing: Standing
    buffers: bytes
    constants: bytes
    parts: Sequence[StatePart]
    residuals: Mapping[int, torch.Tensor]


class CheckpointWriter:
    """Writes one checkpoint after the other."""

    def __init__(self, config: JobConfig, layout: Layout) -> None:
        self._config = config
        self._layout = layout
        self._one_by_one = ThreadPoolExecutor(1, "checkpoint")

    def write(self, snapshot: Snapshot, records: Sequence[StepRecord], done: Callable[[Saved], None]) -> None:
        """Write a checkpoint, then call `done` in the thread that wrote it.

        records: of steps that may not have reached the history. The state is copied before this returns.
        """
        state = self._assemble(snapshot)

        def run() -> None:
            try:
                written = write_checkpoint(
                    self._config.checkpoint_directory, state, records=records, incarnation=self._config.incarnation
                )
                saved = Saved(written.step, written.parameters_sha256, written.state_sha256)
            except Exception as error:
                step = snapshot.standing.step
                log.exception("checkpoint of step %d", step)
                saved = Saved(step, problem=f"the checkpoint of step {step} could not be written: {error}")
            done(saved)

        self._one_by_one.submit(run)

    def _assemble(self, snapshot: Snapshot) -> State:
        wholes: dict[str, torch.Tensor] = {}  # of the layout, by the name of what they are
        states, copies = [], []
        for part in snapshot.parts:
            if part.parameter:
                states.append(part)
                continue
            if part.state not in wholes:
                wholes[part.state] = torch.zeros(self._layout.numel, dtype=self._layout.dtype)
            copies.append((wholes[part.state][part.offset : part.offset + part.values.numel()], part.values))
        copy_all(copies)
        return assemble(
            self._config.model,
            self._layout,
            wholes[""],
            snapshot.buffers,
            snapshot.constants,
            states,
            standing=snapshot.standing,
            average=wholes.get(AVERAGE),
            compression=compression_state(self._layout, wholes.get(MASTER), snapshot.residuals),
        )
