"""The job spec: everything a job is. Checked once, on construction.

`spec_from_dict` turns any nested mapping into a `TrainingJobSpec` or raises a SpecError that names every bad field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from steepest.errors import SpecError, Violation

OPTIMIZER_NAMES = ("sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw")
SCHEDULE_NAMES = ("constant", "linear", "cosine", "step", "exponential")

PositiveInt = Annotated[int, Field(gt=0, le=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**53)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitFloat = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

# Which hyper-parameters each optimizer takes besides lr and weight_decay: torch.optim's own names.
HYPER_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening"),
    "momentum": ("momentum", "dampening"),
    "nesterov": ("momentum",),
    "adagrad": ("lr_decay", "initial_accumulator_value", "eps"),
    "rmsprop": ("alpha", "eps", "momentum", "centered"),
    "adam": ("betas", "eps", "amsgrad"),
    "adamw": ("betas", "eps", "amsgrad"),
}
DEFAULT_LR: Mapping[str, float] = {"adagrad": 1e-2, "rmsprop": 1e-2}
DEFAULT_LR_OTHERWISE = 1e-3
DEFAULT_RATIO, DEFAULT_RANK, DEFAULT_PARTS = 0.01, 16, 8


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskReference(_Model):
    """The user's function that builds a task. code_bundle: codeBundles/{sha256}, empty for installed code."""

    module: str
    function: str
    arguments: dict[str, JsonValue] = {}
    code_bundle: str = ""


class DataSpec(_Model):
    """How the data are cut. micro_batch: default ceil(global_batch / 8), whatever the number of workers."""

    global_batch: PositiveInt = 64
    micro_batch: PositiveInt | None = None
    shuffle: bool = True
    evaluation_batch: PositiveInt = 256

    @model_validator(mode="after")
    def _micro_within_global(self) -> Self:
        if self.micro_batch is not None and self.micro_batch > self.global_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} is larger than global_batch = {self.global_batch}; "
                f"allowed: 1 to {self.global_batch}"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        """B, the samples of a micro-batch."""
        return self.micro_batch or math.ceil(self.global_batch / 8)

    @property
    def num_micro_batches(self) -> int:
        """M, the micro-batches of a step."""
        return math.ceil(self.global_batch / self.micro_batch_size)


class OptimizerSpec(_Model):
    """Which optimizer. What is None is torch.optim's default (momentum: 0.9 for `momentum` and `nesterov`)."""

    name: Literal["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"] = "adamw"
    lr: PositiveFloat | None = None
    momentum: UnitFloat | None = None
    dampening: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat | None = None
    betas: tuple[UnitFloat, UnitFloat] | None = None
    eps: PositiveFloat | None = None
    alpha: UnitFloat | None = None
    centered: bool | None = None
    amsgrad: bool | None = None
    lr_decay: NonNegativeFloat | None = None
    initial_accumulator_value: NonNegativeFloat | None = None
    decay_biases_and_norms: bool = True

    @model_validator(mode="after")
    def _only_own_hyper_parameters(self) -> Self:
        own = HYPER_PARAMETERS[self.name]
        for names in HYPER_PARAMETERS.values():
            for name in names:
                if name not in own and getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is no hyper-parameter of {self.name}; allowed: lr, weight_decay, {', '.join(own)}"
                    )
        if self.name == "nesterov" and self.momentum == 0:
            raise ValueError("momentum = 0: nesterov needs a momentum greater than 0")
        return self

    @property
    def base_lr(self) -> float:
        """The learning rate before any schedule."""
        return self.lr if self.lr is not None else DEFAULT_LR.get(self.name, DEFAULT_LR_OTHERWISE)


class ScheduleSpec(_Model):
    """How the learning rate moves; see ps.numerics.schedule.

    final_factor: of linear and cosine; step_size: of step; gamma: of step and exponential.
    """

    name: Literal["constant", "linear", "cosine", "step", "exponential"] = "constant"
    warmup_steps: NonNegativeInt = 0
    final_factor: NonNegativeFloat = 0.0
    step_size: PositiveInt = 100
    gamma: PositiveFloat = 0.1


class ClipSpec(_Model):
    """Clipping of the aggregated gradient: by its global L2 norm, or each element to [-value, value]."""

    norm: PositiveFloat | None = None
    value: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.norm is not None and self.value is not None:
            raise ValueError(f"norm = {self.norm} and value = {self.value} are both given; allowed: at most one")
        return self


class CompressionSpec(_Model):
    """Lossy compression of what goes over the network; what is left out of one step goes into the next.

    name: of gradients. ratio: of topk, the share of elements that is sent. rank: of powersgd. pull: of updates to the
    parameters; by default as the gradients for bf16 and fp16, else twobit. parts: in how many parts, of neighbouring
    micro-batches, a step's gradient is compressed; no more workers than that have work.
    """

    name: Literal["none", "bf16", "fp16", "topk", "powersgd", "twobit"] = "none"
    ratio: Annotated[float, Field(gt=0, le=0.5, allow_inf_nan=False)] | None = None
    rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    pull: Literal["none", "bf16", "fp16", "topk", "twobit"] | None = None
    parts: PositiveInt | None = None

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


class SyncSpec(_Model):
    """When the servers apply a push. This version applies every step as a whole: `sync`."""

    mode: Literal["sync"] = "sync"


class PlacementSpec(_Model):
    """Where a job runs; never changes the result (but for threads_per_worker and the type of the device).

    servers: None (or "auto") leaves the number to the service. server_device: where servers keep parameters and
    optimizer state, and compute; on cuda each is on the GPU of a worker.
    """

    workers: Annotated[int, Field(ge=1, le=1024)] = 1
    servers: Annotated[int, Field(ge=1, le=256)] | None = None
    threads_per_worker: Annotated[int, Field(ge=1, le=1024)] = 1
    device: Literal["cpu", "cuda"] = "cpu"
    server_device: Literal["cpu", "cuda"] = "cpu"
    transport: Literal["auto", "inline"] = "auto"
    worker_timeout_seconds: PositiveFloat = 300.0
    max_worker_restarts: NonNegativeInt = 3

    @field_validator("servers", mode="before")
    @classmethod
    def _automatic(cls, value: Any) -> Any:
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _servers_have_gpus(self) -> Self:
        if self.server_device == "cuda" and self.device != "cuda":
            raise ValueError(
                f"server_device = 'cuda' needs device = 'cuda', not {self.device!r}: servers are on GPUs of workers"
            )
        if self.server_device == "cuda" and self.num_servers > self.workers:
            raise ValueError(
                f"servers = {self.servers} with server_device = 'cuda'; allowed: 1 to {self.workers}, the number of "
                "workers, whose GPUs they are on"
            )
        return self

    @property
    def num_servers(self) -> int:
        """How many servers there are; 1 until the service has chosen."""
        return self.servers or 1


class TelemetrySpec(_Model):
    """What is kept of every step.

    every: the record of every so many steps goes to the history. parameter_norms: whether it holds the gradient norm
    of each parameter.
    """

    every: PositiveInt = 1
    parameter_norms: bool = True


class TrainingJobSpec(_Model):
    """Everything a job is. precision: bf16 runs the forward pass under autocast; gradients stay float32."""

    task: TaskReference
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    data: DataSpec = DataSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    clip: ClipSpec = ClipSpec()
    sync: SyncSpec = SyncSpec()
    compression: CompressionSpec = CompressionSpec()
    precision: Literal["full", "bf16"] = "full"
    checkpoint_every: NonNegativeInt = 0
    eval_every: NonNegativeInt = 0
    on_nonfinite: Literal["fail", "skip"] = "fail"
    placement: PlacementSpec = PlacementSpec()
    telemetry: TelemetrySpec = TelemetrySpec()

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
    def _gpu_servers_are_exact(self) -> Self:
        if self.compression.is_on and self.placement.server_device == "cuda":
            raise ValueError(
                f"compression.name = {self.compression.name!r} with placement.server_device = 'cuda': servers on GPUs "
                "take gradients as they are; allowed: cpu, or compression.name = none"
            )
        return self

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
        return self.epochs * math.ceil(num_samples / self.data.global_batch)


def spec_from_dict(raw: Mapping[str, Any]) -> TrainingJobSpec:
    """Check a spec. Raises SpecError with one violation for every bad field."""
    try:
        return TrainingJobSpec.model_validate(raw)
    except ValidationError as error:
        raise SpecError([_violation(dict(e)) for e in error.errors(include_url=False)]) from None


def _violation(error: dict[str, Any]) -> Violation:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # from a validator of ours, whose message is complete
        return Violation(path or "spec", str(error["ctx"]["error"]))
    if error["type"] == "extra_forbidden":
        parent = TrainingJobSpec
        for part in error["loc"][:-1]:
            annotation = parent.model_fields[str(part)].annotation
            parent = annotation if isinstance(annotation, type) else parent
        return Violation(path, f"no such field; allowed: {', '.join(parent.model_fields)}")
    if error["type"] == "missing":
        return Violation(path, "is required")
    message = error["msg"].replace("Input should be", "must be")
    return Violation(path, f"{error['input']!r} {message[:1].lower()}{message[1:]}")
