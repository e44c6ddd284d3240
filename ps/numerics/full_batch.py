"""Optimizers that minimize the loss over all samples: L-BFGS, which is torch.optim's, and Newton-CG.

Such an optimizer calls a function whenever it wants the loss and gradient at another point. Here every step of the job
is one such call: the optimizer runs in a thread of its own, which waits in that function until the step's loss and
gradient are there, and goes on to the next point, which is the next version of the parameters. Either the thread works
or whoever waits for it, never both.

An iteration (a line search, say) that a checkpoint falls into is made again from where it began: with what was found
then, it takes the same way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ps.numerics.optimizer import StatePart, leave_out_dynamo
from ps.parameters.layout import Shard
from steepest.full_batch_spec import MOST_PRODUCTS, LbfgsSpec, NewtonCgSpec
from steepest.optimizer_base import OptimizerSpec
from steepest.optimizer_state import pack_state, unpack_state

MOST_TRIALS = 25  # of a line search, as torch.optim.LBFGS has it
DIFFERENCE = 2.0**-26  # between two points whose gradients are subtracted, relative: the root of float64's precision
SUFFICIENT = 1e-4  # how far a loss must fall, of what its slope promises
ROUNDING = 45.0  # of a loss, times the precision: how little says nothing
DAMPED = 1.5  # times more damping, or less


NOWHERE = torch.empty(0)


class _Evaluation(NamedTuple):
    """What is known of a point, or, with a direction, of the matrix there: `gradient` is their product then.

    point: NOWHERE with a direction.
    """

    point: torch.Tensor
    loss: float
    gradient: torch.Tensor
    direction: torch.Tensor | None = None


class _Function(Protocol):
    """What is minimized."""

    def evaluate(self) -> _Evaluation:
        """Loss and gradient at the present point."""

    def multiply(self, direction: torch.Tensor) -> torch.Tensor:
        """The matrix of second derivatives at the present point times a direction."""


class _Kind(Protocol):
    """One kind of optimizer. lr: of the step."""

    lr: float

    def iterate(self, function: _Function) -> None:
        """One iteration from the present point, which it moves."""

    def state(self) -> dict[str, Any]:
        """What the next iteration depends on, besides the point; not written to later."""

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""


class _Lbfgs:
    """torch.optim.LBFGS."""

    def __init__(self, spec: LbfgsSpec, point: nn.Parameter) -> None:
        leave_out_dynamo()
        self.lr = spec.base_lr
        self._point = point
        self._optimizer = torch.optim.LBFGS(
            [point],
            lr=spec.base_lr,
            max_iter=1,
            max_eval=1 + MOST_TRIALS,
            line_search_fn="strong_wolfe",
            **spec.hyper_parameters,
        )

    def iterate(self, function: _Function) -> None:
        """See _Kind."""

        def closure() -> torch.Tensor:
            known = function.evaluate()
            self._point.grad = known.gradient.clone()
            self._optimizer.param_groups[0]["lr"] = self.lr
            return torch.tensor(known.loss, dtype=torch.float64)

        self._optimizer.param_groups[0]["lr"] = self.lr
        self._optimizer.step(closure)  # type: ignore[no-untyped-call]

    def state(self) -> dict[str, Any]:
        """See _Kind; of its tensors, one is written to later, and one list is scratch."""
        state = self._optimizer.state[self._point]
        own: dict[str, Any] = {k: list(v) if isinstance(v, list) else v for k, v in state.items() if k != "al"}
        if own.get("prev_flat_grad") is not None:
            own["prev_flat_grad"] = own["prev_flat_grad"].clone()
        return own

    def restore(self, state: dict[str, Any]) -> None:
        """See _Kind."""
        if state:
            self._optimizer.state[self._point] = state


class _NewtonCg:
    """Newton's method by conjugate gradients, truncated (Dembo and Steihaug 1983; Nocedal and Wright 2006, 7.1).

    With damping, which follows Levenberg and Marquardt's rule as in Martens 2010, section 4.1. A product is a step of
    the job, as an evaluation is.
    """

    def __init__(self, spec: NewtonCgSpec, point: nn.Parameter) -> None:
        self.lr = 1.0
        self._point = point
        self._by_differences = spec.products == "differences"
        self._damping = spec.damping
        self._rounding = ROUNDING * torch.finfo(point.dtype).eps

    def iterate(self, function: _Function) -> None:
        """See _Kind: a direction, then halves of it until the loss falls."""
        point = self._point.detach()
        here = function.evaluate()
        direction, foretold = self._direction(here, function)
        slope = float(here.gradient.dot(direction))
        norm, slack = float(here.gradient.norm()), self._rounding * max(1.0, abs(here.loss))
        for halvings in range(MOST_TRIALS):
            share = 0.5**halvings
            torch.add(here.point, direction, alpha=share, out=point)
            found = function.evaluate()
            if halvings == 0:
                self._adapt(found.loss - here.loss, foretold, slack)
            falls = found.loss <= here.loss + SUFFICIENT * share * slope
            # Near the minimum rounding decides about the loss, and the gradient still tells.
            if falls or (found.loss <= here.loss + slack and float(found.gradient.norm()) < norm):
                return
        point.copy_(here.point)

    def _direction(self, here: _Evaluation, function: _Function) -> tuple[torch.Tensor, float]:
        """An approximate solution d of A d = -g, downhill, and what the loss would change by if A were all there is.

        The first direction of all, and not a number, where curvature is not positive.
        """
        norm = float(here.gradient.norm())
        solution, residual = torch.zeros_like(here.gradient), here.gradient.clone()
        conjugate, squares = -residual, norm * norm
        for _ in range(min(len(residual), MOST_PRODUCTS)):
            if squares**0.5 <= min(0.5, norm**0.5) * norm:
                break
            product = self._product(here, conjugate, function).add(conjugate, alpha=self._damping)
            curvature = float(conjugate.dot(product))
            if curvature <= 0.0:
                return (solution if bool(solution.any()) else conjugate), math.nan
            length = squares / curvature
            solution.add_(conjugate, alpha=length)
            residual.add_(product, alpha=length)
            before, squares = squares, float(residual.dot(residual))
            conjugate.mul_(squares / before).sub_(residual)
        return solution, 0.5 * float(solution.dot(here.gradient + residual))  # residual: A d + g

    def _product(self, here: _Evaluation, direction: torch.Tensor, function: _Function) -> torch.Tensor:
        if not self._by_differences:
            return function.multiply(direction)
        step = DIFFERENCE * (1.0 + float(here.point.norm())) / float(direction.norm())
        torch.add(here.point, direction, alpha=step, out=self._point.detach())
        return (function.evaluate().gradient - here.gradient) / step

    def _adapt(self, change: float, foretold: float, slack: float) -> None:
        """Damp less where the matrix foretells the loss's change, and more where it does not."""
        if math.isnan(foretold) or -foretold <= slack:  # else rounding would decide
            return
        ratio = change / foretold
        if ratio > 0.75:
            self._damping /= DAMPED
        elif not ratio >= 0.25:
            self._damping *= DAMPED

    def state(self) -> dict[str, Any]:
        """See _Kind."""
        return {"damping": self._damping}

    def restore(self, state: dict[str, Any]) -> None:
        """See _Kind."""
        self._damping = state.get("damping", self._damping)


class FullBatchOptimizer:
    """The optimizer of a shard that is the whole layout.

    parameters: shape (shard.numel,), updated in place: after a step they are the next point to evaluate, or the best
    one so far if the step was the last. direction: what the next step is to multiply the matrix of second derivatives
    at that point with, shape (shard.numel,); None when it is to evaluate.
    """

    def __init__(self, spec: OptimizerSpec, shard: Shard, parameters: torch.Tensor) -> None:
        self._name = shard.layout.parameters[0].name
        self._point = nn.Parameter(parameters)
        self._kind = self._kind_of(spec)
        self.direction: torch.Tensor | None = None
        self._evaluations: list[_Evaluation] = []  # since the iteration began
        self._began: tuple[torch.Tensor, dict[str, Any], float] = (parameters, {}, spec.base_lr)  # point, state, lr
        self._found: SimpleQueue[_Evaluation] = SimpleQueue()
        self._wanted: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def _kind_of(self, spec: OptimizerSpec) -> _Kind:
        match spec:
            case LbfgsSpec():
                return _Lbfgs(spec, self._point)
            case NewtonCgSpec():
                return _NewtonCg(spec, self._point)
        raise ValueError(f"{spec.name} does not minimize over all samples")

    def step(self, gradient: torch.Tensor, *, lr: float, divisor: float, loss: float, last: bool) -> None:
        """Go on from the mean loss and the *sum* `gradient`, or product with `direction`, at the present point."""
        if self._thread is None:
            self._kind.lr = lr
            self._start()
        self._kind.lr = lr  # of the next iteration
        point = self._point.detach()
        self._go_on(loss, gradient / divisor)
        if last and (evaluated := [known for known in self._evaluations if known.direction is None]):
            point.copy_(min(evaluated, key=lambda known: known.loss).point)

    def _start(self) -> None:
        """Have the thread at its first question."""
        self._thread = threading.Thread(target=self._run, name="full-batch", daemon=True)
        self._thread.start()
        self._wait()

    def _go_on(self, loss: float, gradient: torch.Tensor) -> None:
        """Answer what was asked for."""
        point = self._point.detach().clone() if self.direction is None else NOWHERE
        self._found.put(_Evaluation(point, loss, gradient, self.direction))
        self._wait()

    def _wait(self) -> None:
        problem = self._wanted.get()
        if problem is not None:
            raise problem

    # -- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        torch.get_num_threads()  # takes over the process's number for this thread
        try:
            while True:
                self._begin()
                known = len(self._evaluations)
                self._kind.iterate(self)
                if len(self._evaluations) == known > 0:  # it stays where it is: there is nothing more to gain
                    self._ask(None)
        except BaseException as error:  # whoever waits raises it
            self._wanted.put(error)

    def _begin(self) -> None:
        """An iteration begins: keep what is needed to make it again."""
        known = self._known()
        self._evaluations = [] if known is None else [known]
        self._began = self._point.detach().clone(), self._kind.state(), self._kind.lr

    def _known(self) -> _Evaluation | None:
        point = self._point.detach()
        evaluated = (known for known in self._evaluations if known.direction is None)
        return next((known for known in evaluated if torch.equal(known.point, point)), None)

    def evaluate(self) -> _Evaluation:
        """See _Function; waits for a step of the job if the point is not known."""
        known = self._known()
        if known is None:
            known = self._ask(None)
            self._evaluations.append(known)
        return known

    def multiply(self, direction: torch.Tensor) -> torch.Tensor:
        """See _Function; waits for a step of the job."""
        known = self._ask(direction)
        self._evaluations.append(known)
        return known.gradient

    def _ask(self, direction: torch.Tensor | None) -> _Evaluation:
        self.direction = direction
        self._wanted.put(None)
        return self._found.get()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def export_state(self) -> Iterator[StatePart]:
        """All of it, under the name of the first parameter, as torch.optim.LBFGS keeps its own."""
        point, state, lr = self._began
        found = [[known.loss, known.gradient] for known in self._evaluations]
        whole = {"point": point, "state": state, "lr": lr, "found": found}
        for name, value in pack_state(whole, {}).items():
            yield StatePart(self._name, name, 0, value.detach().reshape(-1).cpu(), tuple(value.shape))

    def import_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take it over, and be at the point that was to be evaluated next."""
        prefix = f"{self._name}."
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not own:
            return
        whole, _ = unpack_state(own)
        device = self._point.device
        self._point.detach().copy_(whole["point"])
        self._kind.restore(_on(whole["state"], device))
        self._kind.lr = whole["lr"]
        self._start()
        for loss, gradient in whole["found"]:
            self._go_on(loss, gradient.to(device))


def _on(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(each) for each in value]
        return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in state.items()}
