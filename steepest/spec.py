"""The job spec: everything a job is. Checked once, on construction.

`spec_from_dict` turns any nested mapping into a `TrainingJobSpec` or raises a SpecError that names every bad field.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
_TORCH: dict[str, JsonValue] = {"default_text": "torch.optim's"}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskReference(_Model):
    """The user's function that builds a task, and the code it lives in."""

    module: str = Field(description="Module of the function, as Python imports it.")
    function: str = Field(description="Name of the function in its module.")
    arguments: dict[str, JsonValue] = Field(
        default={}, description="Arguments of the function; on the wire, each as JSON."
    )
    code_bundle: str = Field(
        default="", description="codeBundles/{sha256}; empty when the module is installed on the cluster."
    )


class DataSpec(_Model):
    """How the data are cut into steps."""

    global_batch: PositiveInt = Field(default=64, description="Samples of one step.")
    micro_batch: PositiveInt | None = Field(
        default=None,
        description="Samples of one gradient computation, the unit that is dealt to workers.",
        json_schema_extra={"default_text": "global batch / 8, rounded up"},
    )
    shuffle: bool = Field(default=True, description="Draw another order of the samples in each epoch.")
    evaluation_batch: PositiveInt = Field(default=256, description="Samples of one evaluation pass.")

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
    """Which optimizer, with its hyper-parameters; absent ones are torch.optim's defaults."""

    name: Literal["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "adam", "adamw"] = Field(
        default="adamw", description="Optimizer: sgd, momentum, nesterov, adagrad, rmsprop, adam or adamw."
    )
    lr: PositiveFloat | None = Field(
        default=None,
        description="Learning rate before the schedule.",
        json_schema_extra={"default_text": "0.001; 0.01 for adagrad and rmsprop"},
    )
    momentum: UnitFloat | None = Field(
        default=None,
        description="Momentum factor, for sgd, momentum, nesterov and rmsprop.",
        json_schema_extra={"default_text": "0.9 for momentum and nesterov, else 0"},
    )
    dampening: NonNegativeFloat | None = Field(
        default=None, description="Dampening of the momentum, for sgd and momentum.", json_schema_extra=_TORCH
    )
    weight_decay: NonNegativeFloat | None = Field(
        default=None,
        description="Weight decay; decoupled for adamw, an L2 penalty for the others.",
        json_schema_extra=_TORCH,
    )
    betas: tuple[UnitFloat, UnitFloat] | None = Field(
        default=None,
        description="Decay rates of the two moment estimates, for adam and adamw.",
        json_schema_extra=_TORCH,
    )
    eps: PositiveFloat | None = Field(
        default=None,
        description="Term added to the denominator, for adagrad, rmsprop, adam and adamw.",
        json_schema_extra=_TORCH,
    )
    alpha: UnitFloat | None = Field(
        default=None, description="Smoothing constant of the squared gradient, for rmsprop.", json_schema_extra=_TORCH
    )
    centered: bool | None = Field(
        default=None,
        description="Normalize by the estimated variance of the gradient, for rmsprop.",
        json_schema_extra=_TORCH,
    )
    amsgrad: bool | None = Field(
        default=None, description="Use the AMSGrad variant, for adam and adamw.", json_schema_extra=_TORCH
    )
    lr_decay: NonNegativeFloat | None = Field(
        default=None, description="Decay of the learning rate with the updates, for adagrad.", json_schema_extra=_TORCH
    )
    initial_accumulator_value: NonNegativeFloat | None = Field(
        default=None, description="Initial sum of squared gradients, for adagrad.", json_schema_extra=_TORCH
    )
    decay_biases_and_norms: bool = Field(
        default=True, description="Apply weight decay to parameters of fewer than two dimensions too."
    )

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
    """How the learning rate moves over the steps."""

    name: Literal["constant", "linear", "cosine", "step", "exponential"] = Field(
        default="constant", description="Schedule: constant, linear, cosine, step or exponential."
    )
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps of linear warm-up from 0, before the schedule.")
    final_factor: NonNegativeFloat = Field(
        default=0.0, description="Share of the learning rate left at the last step, for linear and cosine."
    )
    step_size: PositiveInt = Field(default=100, description="Steps between two decays, for step.")
    gamma: PositiveFloat = Field(
        default=0.1, description="Factor of one decay: every step_size steps for step, every step for exponential."
    )


class ClipSpec(_Model):
    """Clipping of the aggregated gradient: at most one of the two."""

    norm: PositiveFloat | None = Field(
        default=None, description="Largest global L2 norm of the gradient; a longer one is scaled down."
    )
    value: PositiveFloat | None = Field(
        default=None, description="Largest magnitude of a gradient element; others are set to it."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.norm is not None and self.value is not None:
            raise ValueError(f"norm = {self.norm} and value = {self.value} are both given; allowed: at most one")
        return self


class CompressionSpec(_Model):
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


class SyncSpec(_Model):
    """When the servers apply a push."""

    mode: Literal["sync"] = Field(default="sync", description="Mode: sync applies every step as a whole.")
    staleness: Annotated[int, Field(ge=0, le=0)] = Field(
        default=0,
        description="Steps that a worker may be ahead of the slowest: 0, for in sync mode all are at the same step.",
    )


class PlacementSpec(_Model):
    """Where a job runs. Never changes the result, but for threads_per_worker and the type of the devices."""

    workers: Annotated[int, Field(ge=1, le=1024)] = Field(default=1, description="Number of workers.")
    servers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        default=None,
        description="Number of servers, or auto: one; on several hosts one each, from 16 MiB of parameters on.",
        json_schema_extra={"default_text": "auto"},
    )
    threads_per_worker: Annotated[int, Field(ge=1, le=1024)] = Field(
        default=1, description="CPU threads of each worker; another number may change the last bits."
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Device of the workers: cpu or cuda, a GPU each.")
    server_device: Literal["cpu", "cuda"] = Field(
        default="cpu", description="Device of the servers: cpu or cuda, each on the GPU of a worker."
    )
    transport: Literal["auto", "inline"] = Field(
        default="auto", description="auto: shared memory within a host; inline: the network everywhere."
    )
    worker_timeout_seconds: PositiveFloat = Field(
        default=300.0, description="A worker that does not answer for so long is replaced."
    )
    max_worker_restarts: NonNegativeInt = Field(
        default=3, description="Deaths in a row, without a step in between, that the job survives."
    )

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
    """What is kept of every step."""

    every: PositiveInt = Field(default=1, description="Keep the record of every so many steps in the history.")
    parameter_norms: bool = Field(default=True, description="Keep the gradient norm of each parameter in the records.")


class TrainingJobSpec(_Model):
    """Everything a job is."""

    task: TaskReference = Field(description="The function that builds the task.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0,
        description="Seed of everything random: initial parameters, order of the data, dropout, augmentation.",
    )
    steps: PositiveInt | None = Field(default=None, description="Length in optimizer steps; give steps or epochs.")
    epochs: PositiveInt | None = Field(
        default=None, description="Length in passes over the data; give steps or epochs."
    )
    data: DataSpec = Field(default=DataSpec(), description="How the data are cut into steps.")
    optimizer: OptimizerSpec = Field(default=OptimizerSpec(), description="Which optimizer.")
    schedule: ScheduleSpec = Field(default=ScheduleSpec(), description="How the learning rate moves.")
    clip: ClipSpec = Field(default=ClipSpec(), description="Clipping of the aggregated gradient.")
    sync: SyncSpec = Field(default=SyncSpec(), description="When the servers apply a push.")
    compression: CompressionSpec = Field(default=CompressionSpec(), description="Lossy compression on the network.")
    precision: Literal["full", "bf16"] = Field(
        default="full",
        description="full, or bf16: the forward pass under autocast; parameters and gradients stay float32.",
    )
    checkpoint_every: NonNegativeInt = Field(default=0, description="Save every so many steps; 0: only at the end.")
    eval_every: NonNegativeInt = Field(default=0, description="Evaluate every so many steps; 0: only at the end.")
    on_nonfinite: Literal["fail", "skip"] = Field(
        default="fail", description="A loss or gradient that is not finite fails the job, or skips the step."
    )
    placement: PlacementSpec = Field(default=PlacementSpec(), description="Where the job runs.")
    telemetry: TelemetrySpec = Field(default=TelemetrySpec(), description="What is kept of every step.")

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


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """One field of a spec as people read about it. default: as text, empty when there is none."""

    path: str
    description: str
    default: str


def describe_fields(model: type[BaseModel] = TrainingJobSpec, prefix: str = "") -> Iterator[FieldInfo]:
    """Every field that holds a value, in order; those of `task` are set by naming the task, and left out."""
    for name, info in model.model_fields.items():
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            if annotation is not TaskReference:
                yield from describe_fields(annotation, f"{prefix}{name}.")
            continue
        extra = info.json_schema_extra
        default = extra["default_text"] if isinstance(extra, dict) and "default_text" in extra else info.default
        text = "" if default is None or info.is_required() else str(default)
        yield FieldInfo(prefix + name, info.description or "", text.lower() if isinstance(default, bool) else text)
