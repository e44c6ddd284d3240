"""Which optimizer: one description of every name and its hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    TypeAdapter,
    field_validator,
    model_validator,
)

from steepest.full_batch_spec import LbfgsSpec, NewtonCgSpec
from steepest.optimizer_base import DEFAULT_OPTIMIZER, TORCH, OptimizerSpec
from steepest.spec_base import NonNegativeFloat, PositiveFloat, PositiveInt, UnitFloat

CLASS = "class"  # the kind of an optimizer that is named by its class

# Hyper-parameters that several optimizers share: torch.optim's own names.
Momentum = Annotated[
    UnitFloat | None,
    Field(
        description="Momentum factor, for sgd, momentum, nesterov, rmsprop and muon.",
        json_schema_extra={"default_text": "0.9 for momentum and nesterov, 0.95 for muon, else 0"},
    ),
]
Dampening = Annotated[
    NonNegativeFloat | None,
    Field(description="Dampening of the momentum, for sgd and momentum.", json_schema_extra=TORCH),
]
Eps = Annotated[
    PositiveFloat | None,
    Field(
        description="Term added to the denominator, for adagrad, adadelta, rmsprop and the kinds of Adam.",
        json_schema_extra=TORCH,
    ),
]
Betas = Annotated[
    tuple[UnitFloat, UnitFloat] | None,
    Field(
        description="Decay rates of the two moment estimates, for adam, adamw, adamax, nadam, radam, and muon's AdamW.",
        json_schema_extra=TORCH,
    ),
]
Decoupled = Annotated[
    bool | None,
    Field(description="Decouple weight decay as adamw does, for nadam and radam.", json_schema_extra=TORCH),
]
Alpha = Annotated[
    UnitFloat | None,
    Field(
        description="Smoothing constant of the squared gradient, for rmsprop; power of the rate's decay, for asgd.",
        json_schema_extra=TORCH,
    ),
]


class SgdSpec(OptimizerSpec):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = "sgd"
    momentum: Momentum = None
    dampening: Dampening = None


class MomentumSpec(OptimizerSpec):
    """SGD with heavy-ball momentum."""

    name: Literal["momentum"] = "momentum"
    momentum: Momentum = None
    dampening: Dampening = None


class NesterovSpec(OptimizerSpec):
    """SGD with Nesterov momentum."""

    name: Literal["nesterov"] = "nesterov"
    momentum: Annotated[PositiveFloat, Field(lt=1)] | None = Field(
        default=None,
        description="Momentum factor, for sgd, momentum, nesterov, rmsprop and muon.",
        json_schema_extra={"default_text": "0.9 for momentum and nesterov, 0.95 for muon, else 0"},
    )


class AdagradSpec(OptimizerSpec):
    """Adagrad."""

    default_lr = 1e-2
    name: Literal["adagrad"] = "adagrad"
    lr_decay: NonNegativeFloat | None = Field(
        default=None, description="Decay of the learning rate with the updates, for adagrad.", json_schema_extra=TORCH
    )
    initial_accumulator_value: NonNegativeFloat | None = Field(
        default=None, description="Initial sum of squared gradients, for adagrad.", json_schema_extra=TORCH
    )
    eps: Eps = None


class RmspropSpec(OptimizerSpec):
    """RMSprop."""

    default_lr = 1e-2
    name: Literal["rmsprop"] = "rmsprop"
    alpha: Alpha = None
    eps: Eps = None
    momentum: Momentum = None
    centered: bool | None = Field(
        default=None,
        description="Normalize by the estimated variance of the gradient, for rmsprop.",
        json_schema_extra=TORCH,
    )


class _Adam(OptimizerSpec):
    betas: Betas = None
    eps: Eps = None
    amsgrad: bool | None = Field(
        default=None, description="Use the AMSGrad variant, for adam and adamw.", json_schema_extra=TORCH
    )


class AdamSpec(_Adam):
    """Adam."""

    name: Literal["adam"] = "adam"


class AdamwSpec(_Adam):
    """AdamW."""

    name: Literal["adamw"] = "adamw"


class AdadeltaSpec(OptimizerSpec):
    """Adadelta."""

    default_lr = 1.0
    name: Literal["adadelta"] = "adadelta"
    rho: UnitFloat | None = Field(
        default=None, description="Decay rate of the two averages, for adadelta.", json_schema_extra=TORCH
    )
    eps: Eps = None


class AdamaxSpec(OptimizerSpec):
    """Adam by the infinity norm."""

    default_lr = 2e-3
    name: Literal["adamax"] = "adamax"
    betas: Betas = None
    eps: Eps = None


class NadamSpec(OptimizerSpec):
    """Adam with Nesterov momentum."""

    default_lr = 2e-3
    name: Literal["nadam"] = "nadam"
    betas: Betas = None
    eps: Eps = None
    momentum_decay: NonNegativeFloat | None = Field(
        default=None, description="Decay of the momentum, for nadam.", json_schema_extra=TORCH
    )
    decoupled_weight_decay: Decoupled = None


class RadamSpec(OptimizerSpec):
    """Adam with a rectified variance at the beginning."""

    name: Literal["radam"] = "radam"
    betas: Betas = None
    eps: Eps = None
    decoupled_weight_decay: Decoupled = None


class RpropSpec(OptimizerSpec):
    """Resilient backpropagation: by the signs of gradients alone, so for steps over all of the data."""

    default_lr = 1e-2
    name: Literal["rprop"] = "rprop"
    etas: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="By what step sizes shrink and grow, for rprop.", json_schema_extra=TORCH
    )
    step_sizes: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None, description="Least and largest step size, for rprop.", json_schema_extra=TORCH
    )

    @model_validator(mode="after")
    def _no_decay(self) -> Self:
        if self.weight_decay:
            raise ValueError(f"weight_decay = {self.weight_decay}: rprop has none; allowed: 0, or another optimizer")
        return self

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """See OptimizerSpec; torch.optim's takes no weight decay."""
        return {name: value for name, value in super().hyper_parameters.items() if name != "weight_decay"}


class AsgdSpec(OptimizerSpec):
    """Averaged stochastic gradient descent; the average is in the optimizer's state, under the name ax."""

    default_lr = 1e-2
    name: Literal["asgd"] = "asgd"
    lambd: NonNegativeFloat | None = Field(default=None, description="Decay term, for asgd.", json_schema_extra=TORCH)
    alpha: Alpha = None
    t0: PositiveFloat | None = Field(
        default=None, description="Updates after which averaging begins, for asgd.", json_schema_extra=TORCH
    )


class AdafactorSpec(OptimizerSpec):
    """Adafactor: second moments by row and column, so next to no state."""

    default_lr = 1e-2
    is_whole = True
    name: Literal["adafactor"] = "adafactor"
    beta2_decay: Annotated[float, Field(lt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Power by which the decay rate approaches 1, for adafactor.", json_schema_extra=TORCH
    )
    d: Annotated[PositiveFloat, Field(ge=1)] | None = Field(
        default=None, description="Largest root mean square of an update, for adafactor.", json_schema_extra=TORCH
    )


class MuonSpec(OptimizerSpec):
    """Muon for parameters of two dimensions, AdamW for the others."""

    is_whole = True
    name: Literal["muon"] = "muon"
    momentum: Momentum = None
    nesterov: bool | None = Field(
        default=None, description="Look ahead along the momentum, for muon.", json_schema_extra=TORCH
    )
    ns_steps: Annotated[PositiveInt, Field(lt=100)] | None = Field(
        default=None, description="Newton-Schulz steps of an update, for muon.", json_schema_extra=TORCH
    )
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        default="match_rms_adamw",
        description="How the learning rate follows a matrix's shape, for muon: match_rms_adamw, with which one rate "
        "suits both it and its AdamW, or original.",
    )
    adamw: tuple[str, ...] = Field(
        default=(),
        description="Names of matrices that AdamW is to train, for muon, with * and ?: embeddings, output layers.",
        json_schema_extra={"default_text": "none"},
    )
    betas: Betas = None


class ClassSpec(OptimizerSpec):
    """Any subclass of torch.optim.Optimizer that updates each parameter by itself."""

    is_whole = True
    name: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    lr: PositiveFloat

    @field_validator("name")
    @classmethod
    def _is_a_module(cls, name: str) -> str:
        module, _, found = name.partition(":")
        if module.endswith(".py"):
            raise ValueError(f"{name!r} names a file; allowed: the module, as Python imports it: {module[:-3]}:{found}")
        return name

    options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Further arguments of a class that is named as module:Class.",
        json_schema_extra={"default_text": "the class's"},
    )

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """See OptimizerSpec; under the names of the class."""
        own = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        return {**self.options, **own}


def _kind(raw: Any) -> str:
    name = str(raw["name"] if isinstance(raw, Mapping) else getattr(raw, "name", raw))
    return CLASS if ":" in name else name


def _named(raw: Any) -> Any:
    """The default optimizer where none is named; a name alone is that one with its defaults.

    A null, as job files and older databases have it, is no value.
    """
    if isinstance(raw, str):
        return {"name": raw}
    if not isinstance(raw, Mapping):
        return raw
    return {"name": DEFAULT_OPTIMIZER, **{key: value for key, value in raw.items() if value is not None}}


_BY_NAME: tuple[type[OptimizerSpec], ...] = (
    SgdSpec,
    MomentumSpec,
    NesterovSpec,
    AdagradSpec,
    RmspropSpec,
    AdamSpec,
    AdamwSpec,
    AdadeltaSpec,
    AdamaxSpec,
    NadamSpec,
    RadamSpec,
    RpropSpec,
    AsgdSpec,
    AdafactorSpec,
    MuonSpec,
    LbfgsSpec,
    NewtonCgSpec,
)
OPTIMIZERS: Mapping[str, type[OptimizerSpec]] = {str(kind.model_fields["name"].default): kind for kind in _BY_NAME}
OPTIMIZER_NAMES = tuple(OPTIMIZERS)
ELEMENTWISE = tuple(name for name, kind in OPTIMIZERS.items() if not kind.is_whole)
if TYPE_CHECKING:
    AnyOptimizer = OptimizerSpec
else:
    _TAGGED = [Annotated[kind, Tag(name)] for name, kind in {**OPTIMIZERS, CLASS: ClassSpec}.items()]
    AnyOptimizer = Annotated[Union[tuple(_TAGGED)], Discriminator(_kind), BeforeValidator(_named)]  # noqa: UP007
# Which hyper-parameters each optimizer takes besides lr and weight_decay: torch.optim's own names.
HYPER_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    name: tuple(field for field in kind.model_fields if field not in OptimizerSpec.model_fields)
    for name, kind in OPTIMIZERS.items()
}
_ADAPTER: TypeAdapter[OptimizerSpec] = TypeAdapter(AnyOptimizer)


def optimizer_spec(**raw: Any) -> OptimizerSpec:
    """The spec of one optimizer. Raises pydantic.ValidationError."""
    return _ADAPTER.validate_python(raw)
