"""Which micro-batch, and whose, made a step that is not finite."""

from __future__ import annotations

from ps.step.messages import Failure
from ps.step.round import RoundState


def blame_loss(current: RoundState) -> tuple[Failure, str] | None:
    """(failure, worker) for the first loss that is not finite; None when all are."""
    found = current.find_nonfinite_loss()
    if found is None:
        return None
    result, worker = found
    message = (
        f"the loss is not finite at step {current.step}, worker {worker}, micro-batch {result.leaf}: "
        f"loss sum {result.loss}, weight {result.weight}"
    )
    return Failure(current.step, result.leaf, "nonfinite_loss", message), worker


def blame_gradient(diagnosis: RoundState) -> tuple[Failure, str]:
    """(failure, worker) for the first gradient of a diagnosis that is not finite, or for their sum."""
    found = diagnosis.find_nonfinite_gradient()
    if found is None:
        message = f"the sum of finite gradients is not finite at step {diagnosis.step}: they are too large to add"
        return Failure(diagnosis.step, -1, "nonfinite_gradient", message), ""
    result, worker = found
    message = (
        f"the gradient of {result.nonfinite} is not finite at step {diagnosis.step}, worker {worker}, "
        f"micro-batch {result.leaf}"
    )
    return Failure(diagnosis.step, result.leaf, "nonfinite_gradient", message, layer=result.nonfinite), worker
