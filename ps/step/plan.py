"""What a job does, as far as the leader needs to know it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ps.numerics.schedule import learning_rate
from ps.numerics.tree import parts_of_step
from ps.step.best import Aim
from steepest.change_spec import ChangeSpec, lr_scale_at
from steepest.spec import ScheduleSpec
from steepest.step_spec import ClipSpec


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job does, as far as the leader needs to know it. evaluation_leaves: 0 without evaluation data.

    factors: of the learning rate at each update, if the task has a schedule of its own.
    segment_owners: see Layout; of jobs that clip every parameter by itself.
    changes: of the learning rate, from steps on. skip_exploding: whether steps are not taken whose gradient explodes.
    max_seconds: of training steps, after which the job ends.
    evaluates_average: whether evaluations are of what the servers average, see ShardState.show; server 0 says.
    aim: what the best evaluation is, if that matters.
    part_leaves: micro-batches that are compressed together, with a residual that stays at the worker; 0: nothing is.
    """

    total_steps: int
    num_leaves: int
    num_servers: int
    base_lr: float
    schedule: ScheduleSpec
    clip: ClipSpec = ClipSpec()  # noqa: RUF009  # immutable
    segment_owners: tuple[int, ...] = ()
    part_leaves: int = 0
    evaluation_leaves: int = 0
    metric_names: tuple[str, ...] = ()
    evaluates_average: bool = False
    max_seconds: float = math.inf
    eval_every: int = 0
    checkpoint_every: int = 0
    checkpoint_seconds: float = 0.0
    skip_nonfinite: bool = False
    skip_exploding: bool = False
    worker_timeout_seconds: float = 300.0
    factors: tuple[float, ...] = ()
    aim: Aim | None = None
    changes: tuple[ChangeSpec, ...] = ()

    @property
    def parts(self) -> list[int]:
        """The micro-batches of each part, as bits."""
        parts = parts_of_step(self.num_leaves, self.part_leaves) if self.part_leaves else []
        return [node.leaves for node in parts]

    def learning_rate(self, step: int, update: int) -> float:
        """Of a step, from 0, that makes the update of that number, from 0."""
        base_lr = self.base_lr * lr_scale_at(self.changes, step)
        if self.factors:
            return base_lr * self.factors[min(update, len(self.factors) - 1)]
        return learning_rate(base_lr, self.schedule, update, self.total_steps)
