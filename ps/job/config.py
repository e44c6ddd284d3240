"""What a server or worker process is told about its job when it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ps.compression.choose import pull_codec, push_codec
from ps.compression.codec import Codec
from ps.job.credentials import Credentials
from ps.parameters.description import ModelDescription
from ps.parameters.layout import Layout, build_layout
from ps.step.best import Aim
from ps.step.plan import Plan
from steepest.spec import BestSpec, TrainingJobSpec


@dataclass(frozen=True)
class JobConfig:
    """One life (incarnation) of a job, the same for all its processes.

    token: the secret that every stream opens with. num_samples, num_evaluation_samples: sizes of the data sets.
    evaluates_with_gradients: whether evaluations run with autograd on. caches: attributes in which modules keep what
    they computed. logged_names: what the loss function returns besides. fingerprint: of data and initial parameters, as
    they were when the job was submitted. factors: see Plan. loss_counts: what the mean of the loss is over, see
    worker.gradients.losses. secrets: by the variable of the environment that is to hold it.
    credentials: for TLS between hosts.
    """

    job: str
    incarnation: int
    token: str
    spec: TrainingJobSpec
    model: ModelDescription
    num_samples: int
    num_evaluation_samples: int
    metric_names: tuple[str, ...]
    num_servers: int
    checkpoint_directory: Path
    evaluates_with_gradients: bool = False
    caches: tuple[str, ...] = ()
    logged_names: tuple[str, ...] = ()
    fingerprint: tuple[tuple[str, float], ...] = ()
    factors: tuple[float, ...] = ()
    loss_counts: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    credentials: Credentials | None = None

    def layout(self) -> Layout:
        """The layout of the parameters."""
        return layout_of(self.model, self.spec)

    @property
    def signals_every(self) -> int:
        """Signals are kept with the norms of parameters, and measured with them."""
        telemetry = self.spec.telemetry
        return telemetry.signals_every if telemetry.parameter_norms else 0

    @property
    def histograms_every(self) -> int:
        """As signals_every."""
        telemetry = self.spec.telemetry
        return telemetry.histograms_every if telemetry.parameter_norms else 0

    def push_codec(self) -> Codec | None:
        """What gradients are sent in, None for as they are."""
        return push_codec(self.spec.compression, self.layout(), self.spec.seed)

    def pull_codec(self) -> Codec | None:
        """What updates are sent in, None for whole parameters."""
        return pull_codec(self.spec.compression, self.layout(), self.spec.seed)

    def plan(self) -> Plan:
        """What the leader is to do."""
        spec = self.spec
        return Plan(
            total_steps=spec.total_steps(self.num_samples),
            num_leaves=spec.data.num_micro_batches,
            num_servers=self.num_servers,
            part_leaves=spec.part_leaves,
            base_lr=spec.optimizer.base_lr,
            changes=spec.changes,
            schedule=spec.schedule,
            clip=spec.clip,
            segment_owners=tuple(self.layout().segment_owners.tolist()) if spec.clip.is_by_parameter else (),
            evaluation_leaves=-(-self.num_evaluation_samples // spec.data.evaluation_batch),
            metric_names=self.metric_names,
            max_seconds=spec.max_seconds or math.inf,
            eval_every=spec.eval_every,
            checkpoint_every=spec.checkpoint_every,
            checkpoint_seconds=spec.checkpoint_interval,
            skip_nonfinite=spec.on_nonfinite == "skip" or spec.health.skips("nonfinite"),
            skip_exploding=spec.health.skips("exploding"),
            worker_timeout_seconds=spec.placement.worker_timeout_seconds,
            factors=self.factors,
            aim=_aim(spec.best),
        )


def layout_of(model: ModelDescription, spec: TrainingJobSpec) -> Layout:
    """How the parameters of a job lie. Raises ValueError, see build_layout."""
    return build_layout(
        model, decay_biases_and_norms=spec.optimizer.decay_biases_and_norms, is_whole=bool(spec.needs_whole_parameters)
    )


def _aim(best: BestSpec) -> Aim | None:
    if not best.is_on:
        return None
    return Aim(best.metric_name, is_max=best.is_max, min_delta=best.min_delta, patience=best.patience)
