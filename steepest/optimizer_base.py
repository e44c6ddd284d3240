"""What the specs of all optimizers have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, JsonValue

from steepest.spec_base import NonNegativeFloat, PositiveFloat, SpecModel

DEFAULT_OPTIMIZER = "adamw"
DEFAULT_LR = 1e-3
TORCH: dict[str, JsonValue] = {"default_text": "torch.optim's"}


class OptimizerSpec(SpecModel):
    """Which optimizer, with its hyper-parameters; absent ones are torch.optim's defaults.

    Each optimizer is a subclass with the hyper-parameters that it takes.
    """

    default_lr: ClassVar[float] = DEFAULT_LR
    # Whether an update of one element depends on others of its parameter, so that a server must have all of them.
    is_whole: ClassVar[bool] = False
    # Whether a step is over all samples, and one server has all parameters.
    is_full_batch: ClassVar[bool] = False

    name: str = Field(
        default=DEFAULT_OPTIMIZER,
        description="Optimizer: sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, adadelta, adamax, nadam, "
        "radam, rprop, asgd, adafactor, muon, lbfgs, newton_cg, or a class of yours or of a package, as module:Class.",
    )
    lr: PositiveFloat | None = Field(
        default=None,
        description="Learning rate before the schedule.",
        json_schema_extra={"default_text": "torch.optim's; 0.001 for sgd, momentum and nesterov; none for a class"},
    )
    weight_decay: NonNegativeFloat | None = Field(
        default=None,
        description="Weight decay; decoupled for adamw, adafactor and muon, an L2 penalty for the others; not for "
        "rprop, lbfgs and newton_cg.",
        json_schema_extra=TORCH,
    )
    decay_biases_and_norms: bool = Field(
        default=True, description="Apply weight decay to parameters of fewer than two dimensions too."
    )

    @property
    def base_lr(self) -> float:
        """The learning rate before any schedule."""
        return self.lr if self.lr is not None else self.default_lr

    @property
    def hyper_parameters(self) -> dict[str, Any]:
        """Those that are given, besides the learning rate, under torch.optim's names."""
        own = self.model_dump(exclude={"name", "lr", "decay_biases_and_norms"}, exclude_none=True)
        return dict(own)
