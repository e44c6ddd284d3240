"""L-BFGS with a strong Wolfe line search: torch.optim's own, turned inside out.

torch.optim.LBFGS calls a closure whenever it wants the loss and gradient at another point. Here every step of the job
is one such call: the optimizer runs in a thread of its own, which waits in the closure until the step's loss and
gradient are there, and goes on to the next point, which is the next version of the parameters. Either the thread works
or whoever waits for it, never both.

A line search that a checkpoint falls into is made again from where it began: with what was found then, it takes the
same way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import nn

from ps.numerics.optimizer import StatePart, leave_out_dynamo
from ps.parameters.layout import Shard
from steepest.optimizer_spec import LbfgsSpec
from steepest.optimizer_state import pack_state, unpack_state

MOST_TRIALS = 25  # of a line search, as torch.optim.LBFGS has it


class _Evaluation(NamedTuple):
    """What is known of a point."""

    point: torch.Tensor
    loss: float
    gradient: torch.Tensor


class LbfgsOptimizer:
    """The optimizer of a shard that is the whole layout.

    parameters: shape (shard.numel,), updated in place: after a step they are the next point to evaluate, or the best
    one so far if the step was the last.
    """

    def __init__(self, spec: LbfgsSpec, shard: Shard, parameters: torch.Tensor) -> None:
        leave_out_dynamo()
        self._name = shard.layout.parameters[0].name
        self._point = nn.Parameter(parameters)
        self._optimizer = torch.optim.LBFGS(
            [self._point],
            lr=spec.base_lr,
            max_iter=1,
            max_eval=1 + MOST_TRIALS,
            line_search_fn="strong_wolfe",
            **spec.hyper_parameters,
        )
        self._evaluations: list[_Evaluation] = []  # since the line search began
        self._began: tuple[torch.Tensor, dict[str, Any]] = (parameters.clone(), {})  # the point, and torch's state
        self._found: SimpleQueue[_Evaluation] = SimpleQueue()
        self._wanted: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def step(self, gradient: torch.Tensor, *, lr: float, divisor: float, loss: float, last: bool) -> None:
        """Go on from the mean loss and the *sum* `gradient` at the present point."""
        if self._thread is None:
            self._start()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        point = self._point.detach()
        self._go_on(_Evaluation(point.clone(), loss, gradient / divisor))
        if last and self._evaluations:
            point.copy_(min(self._evaluations, key=lambda known: known.loss).point)

    def _start(self) -> None:
        """Have the thread at its first question."""
        self._thread = threading.Thread(target=self._run, name="lbfgs", daemon=True)
        self._thread.start()
        self._wait()

    def _go_on(self, evaluation: _Evaluation) -> None:
        self._found.put(evaluation)
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
                self._optimizer.step(self._evaluate)  # type: ignore[no-untyped-call]
                if len(self._evaluations) == known > 0:  # it stays where it is: there is nothing more to gain
                    self._ask()
        except BaseException as error:  # whoever waits raises it
            self._wanted.put(error)

    def _begin(self) -> None:
        """A line search begins: keep what is needed to make it again."""
        point = self._point.detach()
        self._evaluations = [known for known in self._evaluations if torch.equal(known.point, point)]
        self._began = point.clone(), _copied(self._optimizer.state[self._point])

    def _evaluate(self) -> torch.Tensor:
        """The closure of torch.optim.LBFGS."""
        point = self._point.detach()
        known = next((known for known in self._evaluations if torch.equal(known.point, point)), None)
        if known is None:
            known = self._ask()
            self._evaluations.append(known)
        self._point.grad = known.gradient.clone()
        return torch.tensor(known.loss, dtype=torch.float64)

    def _ask(self) -> _Evaluation:
        self._wanted.put(None)
        return self._found.get()

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def export_state(self) -> Iterator[StatePart]:
        """All of it, under the name of the first parameter, as torch.optim.LBFGS keeps its own."""
        point, state = self._began
        found = [[known.loss, known.gradient] for known in self._evaluations]
        whole = {"point": point, "state": {k: v for k, v in state.items() if k != "al"}, "found": found}
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
        if whole["state"]:
            self._optimizer.state[self._point] = _on(whole["state"], device)
        self._start()
        for loss, gradient in whole["found"]:
            self._go_on(_Evaluation(self._point.detach().clone(), loss, gradient.to(device)))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of torch.optim.LBFGS's state; of its tensors, one is written to later."""
    copied: dict[str, Any] = {name: list(v) if isinstance(v, list) else v for name, v in state.items()}
    if copied.get("prev_flat_grad") is not None:
        copied["prev_flat_grad"] = copied["prev_flat_grad"].clone()
    return copied


def _on(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(each) for each in value]
        return value.to(device, copy=True) if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in state.items()}
