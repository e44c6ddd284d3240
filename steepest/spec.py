"""The job spec: everything a job is. Checked once, on construction.

`spec_from_dict` turns any nested mapping into a `TrainingJobSpec` or raises a SpecError that names every bad field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, PrivateAttr, ValidationError, model_validator

from steepest.change_spec import Changes, ChangeSpec
from steepest.environment_spec import SecretVariables, Variables
from steepest.errors import SpecError
from steepest.memory_spec import MemorySpec
from steepest.optimizer_base import OptimizerSpec
from steepest.optimizer_spec import ELEMENTWISE, HYPER_PARAMETERS, OPTIMIZER_NAMES, AdamwSpec, AnyOptimizer
from steepest.placement_spec import DEFAULT_MAX_WORKERS, PlacementSpec
from steepest.requirements_spec import Requirements
from steepest.spec_base import Labels, NonNegativeInt, PositiveFloat, PositiveInt, SpecModel
from steepest.spec_violations import violation
from steepest.step_spec import (
    SCHEDULE_NAMES,
    AverageSpec,
    BestSpec,
    ClipSpec,
    ScheduleSpec,
)
from steepest.telemetry_spec import HealthSpec, TelemetrySpec

__all__ = [
    "HYPER_PARAMETERS",
    "ELEMENTWISE",
    "OPTIMIZER_NAMES",
    "SCHEDULE_NAMES",
    "AverageSpec",
    "BestSpec",
    "ChangeSpec",
    "HealthSpec",
    "TelemetrySpec",
    "ClipSpec",
    "OptimizerSpec",
    "PlacementSpec",
    "ScheduleSpec",
]

CHECKPOINT_SECONDS = 60.0
DEFAULT_RATIO, DEFAULT_RANK, DEFAULT_PARTS = 0.01, 16, 8

REVERSE, FORWARD, ESTIMATE, FINITE = "reverse", "forward", "forward_estimate", "finite"


class TaskReference(SpecModel):
    """The user's function that builds a task, and the code it lives in."""

    module: str = Field(description="Module of the function, as Python imports it.")
    function: str = Field(description="Name of the function in its module.")
    arguments: dict[str, JsonValue] = Field(
        default={}, description="Arguments of the function; on the wire, each as JSON."
    )
    code_bundle: str = Field(
        default="", description="codeBundles/{sha256}; empty when the module is installed on the cluster."
    )


class DataSpec(SpecModel):
    """How the data are cut into steps."""

    global_batch: PositiveInt = Field(default=64, description="Samples of one step.")
    micro_batch: PositiveInt | None = Field(
        default=None,
        description="Samples of one gradient computation, the unit that is dealt to workers.",
        json_schema_extra={"default_text": "so many that placement.max_workers have one each"},
    )
    accumulate: PositiveInt | None = Field(
        default=None, description="Micro-batches of a step, whose gradients are added up; instead of their size."
    )
    shuffle: bool = Field(default=True, description="Draw another order of the samples in each epoch.")
    evaluation_batch: PositiveInt = Field(default=256, description="Samples of one evaluation pass.")
    drop_last: bool = Field(default=False, description="Leave out the last step of an epoch if it is short.")
    readers: Annotated[int, Field(ge=0, le=256)] = Field(
        default=0, description="Processes of each worker that read its samples ahead; 0: it reads them itself."
    )
    shuffle_buffer: PositiveInt = Field(
        default=1000, description="Samples among which the next is drawn, for data that can only be read in order."
    )

    # Workers that find a micro-batch each; of placement.max_workers.
    _cut_for: int = PrivateAttr(default=DEFAULT_MAX_WORKERS)

    def cut_for(self, workers: int) -> DataSpec:
        """The same, with micro-batches for so many workers unless their size is given."""
        copy = self.model_copy()
        copy._cut_for = workers
        return copy

    @model_validator(mode="after")
    def _micro_within_global(self) -> Self:
        if self.micro_batch is not None and self.accumulate is not None:
            raise ValueError(
                f"micro_batch = {self.micro_batch} and accumulate = {self.accumulate} are both given; allowed: one of "
                "the two"
            )
        if self.accumulate is not None and self.accumulate > self.global_batch:
            raise ValueError(
                f"accumulate = {self.accumulate} is larger than global_batch = {self.global_batch}; "
                f"allowed: 1 to {self.global_batch}"
            )
        if self.micro_batch is not None and self.micro_batch > self.global_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} is larger than global_batch = {self.global_batch}; "
                f"allowed: 1 to {self.global_batch}"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        """B, the samples of a micro-batch."""
        pieces = self.accumulate or 1 << (self._cut_for - 1).bit_length()
        return self.micro_batch or math.ceil(self.global_batch / pieces)

    @property
    def num_micro_batches(self) -> int:
        """M, the micro-batches of a step."""
        return math.ceil(self.global_batch / self.micro_batch_size)

    def steps_per_epoch(self, num_samples: int) -> int:
        """Of a training set of `num_samples`."""
        return num_samples // self.global_batch if self.drop_last else math.ceil(num_samples / self.global_batch)


class CompressionSpec(SpecModel):
    """Lossy compression of gradients and updates on the network.

    Whatever a step does not send is added to the next, for gradients and updates alike: delayed, never lost.
    """

    name: Literal["none", "bf16", "fp16", "topk", "powersgd", "twobit"] = Field(
        default="none", description="Compression of gradients: none, bf16, fp16, topk, powersgd or twobit."
    )
    ratio: Annotated[float, Field(gt=0, le=0.5, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Share of the elements that is sent, for topk.",
        json_schema_extra={"default_text": "0.01"},
    )
    rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Rank of the approximation, for powersgd.", json_schema_extra={"default_text": "16"}
    )
    pull: Literal["none", "bf16", "fp16", "topk", "twobit"] | None = Field(
        default=None,
        description="Compression of updates to the parameters: none, bf16, fp16, topk or twobit.",
        json_schema_extra={"default_text": "as the gradients for bf16 and fp16, else twobit"},
    )
    parts: PositiveInt | None = Field(
        default=None,
        description="In how many parts a step's gradient is compressed; no more workers than that have work.",
        json_schema_extra={"default_text": "8"},
    )

    @model_validator(mode="after")
    def _only_own_fields(self) -> Self:
        if self.ratio is not None and "topk" not in (self.name, self.pull):
            raise ValueError(f"ratio = {self.ratio} is of topk; name = {self.name} takes none")
        if self.rank is not None and self.name != "powersgd":
            raise ValueError(f"rank = {self.rank} is of powersgd; name = {self.name} takes none")
        if self.name == "none" and (self.pull is not None or self.parts is not None):
            given = f"pull = {self.pull}" if self.pull is not None else f"parts = {self.parts}"
            raise ValueError(f"{given} is of no use without name; allowed: bf16, fp16, topk, powersgd, twobit")
        return self

    @property
    def is_on(self) -> bool:
        """Whether anything is compressed."""
        return self.name != "none"

    @property
    def top_ratio(self) -> float:
        """Of topk."""
        return DEFAULT_RATIO if self.ratio is None else self.ratio

    @property
    def low_rank(self) -> int:
        """Of powersgd."""
        return DEFAULT_RANK if self.rank is None else self.rank

    @property
    def pull_name(self) -> str:
        """How updates are sent."""
        return self.pull or (self.name if self.name in ("none", "bf16", "fp16") else "twobit")

    def part_leaves(self, num_micro_batches: int) -> int:
        """How many micro-batches are compressed together: a power of two, so that a part is a node of the tree."""
        return 1 << (math.ceil(num_micro_batches / (self.parts or DEFAULT_PARTS)) - 1).bit_length()


class SyncSpec(SpecModel):
    """When the servers apply a push."""

    mode: Literal["sync"] = Field(default="sync", description="Mode: sync applies every step as a whole.")
    staleness: Annotated[int, Field(ge=0, le=0)] = Field(
        default=0,
        description="Steps that a worker may be ahead of the slowest: 0, for in sync mode all are at the same step.",
    )


class TrainingJobSpec(SpecModel):
    """Everything a job is."""

    task: TaskReference = Field(description="The function that builds the task.")
    labels: Labels = Field(default={}, description="Words to find the job by: KEY = VALUE, as team = vision.")
    environment: Variables = Field(
        default={}, description="Environment variables of the task's code, in all its processes: NAME = VALUE."
    )
    secrets: SecretVariables = Field(
        default={},
        description="Environment variables that get their values from the service's secrets: NAME = SECRET. Values are "
        "hidden in all that is printed and told.",
    )
    requirements: Requirements = Field(
        default=(),
        description="Packages that the task's code needs and the service may not have, as on pip's command line: "
        "einops or einops>=0.8. They go along with the code.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0,
        description="Seed of everything random: initial parameters, order of the data, dropout, augmentation.",
    )
    init_from: str = Field(
        default="",
        description="Begin with these weights: a .safetensors or state_dict file, or trainingJobs/ID.",
    )
    init_strict: bool = Field(default=True, description="Whether init_from must have every weight, and no other.")
    steps: PositiveInt | None = Field(default=None, description="Length in optimizer steps; give steps or epochs.")
    epochs: PositiveInt | None = Field(
        default=None, description="Length in passes over the data; give steps or epochs."
    )
    max_seconds: PositiveFloat | None = Field(
        default=None, description="End the job after so many seconds of training steps, with a checkpoint."
    )
    data: DataSpec = Field(default=DataSpec(), description="How the data are cut into steps.")
    optimizer: AnyOptimizer = Field(default=AdamwSpec(), description="Which optimizer.")
    schedule: ScheduleSpec = Field(default=ScheduleSpec(), description="How the learning rate moves.")
    clip: ClipSpec = Field(default=ClipSpec(), description="Clipping of the aggregated gradient.")
    average: AverageSpec = Field(
        default=AverageSpec(), description="A running average of the parameters, kept beside them."
    )
    sync: SyncSpec = Field(default=SyncSpec(), description="When the servers apply a push.")
    compression: CompressionSpec = Field(default=CompressionSpec(), description="Lossy compression on the network.")
    precision: Literal["full", "bf16"] = Field(
        default="full",
        description="full, or bf16: the forward pass under autocast; parameters and gradients stay float32.",
    )
    derivative: Literal["reverse", "forward", "forward_estimate", "finite"] = Field(
        default="reverse",
        description="How a Task's gradient is computed: reverse (backpropagation), forward (forward mode, entry by "
        "entry), forward_estimate (along one random direction), or finite (central differences, in float64).",
    )
    checkpoint_every: NonNegativeInt = Field(
        default=0,
        description="Save every so many steps, waiting until it is on disk; 0: by the clock, and at the end.",
    )
    checkpoint_seconds: Annotated[float, Field(ge=0.0, le=86_400.0)] | None = Field(
        default=None,
        description="Save also after so many seconds, while training goes on; 0: never.",
        json_schema_extra={"default_text": "60, or 0 when checkpoint_every is given"},
    )
    eval_every: NonNegativeInt = Field(default=0, description="Evaluate every so many steps; 0: only at the end.")
    best: BestSpec = Field(default=BestSpec(), description="The best evaluation, and stopping without a better one.")
    on_nonfinite: Literal["fail", "skip"] = Field(
        default="fail", description="A loss or gradient that is not finite fails the job, or skips the step."
    )
    placement: PlacementSpec = Field(default=PlacementSpec(), description="Where the job runs.")
    compile: bool = Field(default=False, description="Compile the model by torch.compile, in every worker.")
    memory: MemorySpec = Field(default=MemorySpec(), description="What is kept in memory, and what is computed again.")
    health: HealthSpec = Field(default=HealthSpec(), description="What becomes of what the health rules find.")
    telemetry: TelemetrySpec = Field(default=TelemetrySpec(), description="What is kept of every step.")
    changes: Changes = Field(
        default=(),
        description="What is done otherwise from a step on: each with step, lr_scale and skip_samples.",
        json_schema_extra={"default_text": "none"},
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            given = "neither is" if self.steps is None else f"steps = {self.steps} and epochs = {self.epochs} are both"
            raise ValueError(f"steps, epochs: {given} given; allowed: exactly one of the two")
        if self.steps is not None and self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} leaves nothing of steps = {self.steps}; "
                f"allowed: 0 to {self.steps - 1}"
            )
        return self

    @model_validator(mode="after")
    def _no_variable_twice(self) -> Self:
        twice = sorted(self.environment.keys() & self.secrets.keys())
        if twice:
            raise ValueError(f"environment.{twice[0]} is among the secrets, too; allowed: one of the two")
        return self

    @model_validator(mode="after")
    def _cut(self) -> Self:
        workers = self.placement.max_workers or DEFAULT_MAX_WORKERS
        self.__dict__["data"] = self.data.cut_for(workers)  # the model is frozen, and this is no other value
        return self

    @property
    def checkpoint_interval(self) -> float:
        """After how many seconds to save while training goes on; 0 for never."""
        if self.checkpoint_seconds is None:
            return 0.0 if self.checkpoint_every else CHECKPOINT_SECONDS
        return self.checkpoint_seconds

    @model_validator(mode="after")
    def _best_needs_evaluations(self) -> Self:
        if self.best.is_on and not self.eval_every:
            given = f"metric = {self.best.metric!r}" if self.best.metric else f"patience = {self.best.patience}"
            raise ValueError(f"best.{given} needs evaluations on the way, and eval_every = 0; allowed: 1 or more")
        return self

    @model_validator(mode="after")
    def _gpu_servers_are_exact(self) -> Self:
        if self.compression.is_on and self.placement.server_device == "cuda":
            raise ValueError(
                f"compression.name = {self.compression.name!r} with placement.server_device = 'cuda': servers on GPUs "
                "take gradients as they are; allowed: cpu, or compression.name = none"
            )
        return self

    @model_validator(mode="after")
    def _whole_tensors_are_exact(self) -> Self:
        if self.compression.is_on and self.needs_whole_parameters:
            raise ValueError(
                f"compression.name = {self.compression.name!r} with {self.needs_whole_parameters}, which needs whole "
                "parameters, and what is compressed is cut in blocks; allowed: compression.name = none, or without "
                f"clip.agc one of {', '.join(ELEMENTWISE)}"
            )
        return self

    @property
    def needs_whole_parameters(self) -> str:
        """What of the job needs shards that are cut between parameters only; empty when nothing does."""
        if self.optimizer.is_whole:
            return f"optimizer.name = {self.optimizer.name!r}"
        return "" if self.clip.agc is None else "clip.agc"

    @property
    def is_inline(self) -> bool:
        """Whether gradients and parameters go over the network between all processes; what is compressed does."""
        return self.placement.transport == "inline" or self.compression.is_on

    @property
    def part_leaves(self) -> int:
        """How many micro-batches are compressed together; 0 without compression."""
        return self.compression.part_leaves(self.data.num_micro_batches) if self.compression.is_on else 0

    def total_steps(self, num_samples: int) -> int:
        """The length of the job in steps, for a training set of `num_samples`."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # noqa: S101  # one of the two is set
        return self.epochs * self.data.steps_per_epoch(num_samples)


def spec_from_dict(raw: Mapping[str, Any]) -> TrainingJobSpec:
    """Check a spec. Raises SpecError with one violation for every bad field."""
    try:
        return TrainingJobSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError([violation(dict(e), TrainingJobSpec) for e in error.errors(include_url=False)]) from None
