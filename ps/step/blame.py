"""Which micro-batch, and whose, made a step that is not finite."""

from __future__ import annotations

from ps.step.messages import Failure, LeafResult
from ps.step.round import RoundState


def blame(diagnosis: RoundState) -> tuple[Failure, str]:
    """(failure, worker) for the first loss of a diagnosis that is not finite, the first gradient, or their sum."""
    step = diagnosis.step
    if (found := diagnosis.find_nonfinite_loss()) is not None:
        result, worker = found
        message = (
            f"the loss is not finite at step {step}, worker {worker}, micro-batch {result.leaf}{_samples(result)}: "
            f"loss sum {result.loss}, weight {result.weight}"
        )
        return Failure(step, result.leaf, "nonfinite_loss", message, samples=result.bad_samples), worker
    if (found := diagnosis.find_nonfinite_gradient()) is not None:
        result, worker = found
        message = (
            f"the gradient of {result.nonfinite} is not finite at step {step}, worker {worker}, "
            f"micro-batch {result.leaf}{_samples(result)}"
        )
        failure = Failure(
            step, result.leaf, "nonfinite_gradient", message, layer=result.nonfinite, samples=result.bad_samples
        )
        return failure, worker
    message = f"the sum of finite gradients is not finite at step {step}: they are too large to add"
    return Failure(step, -1, "nonfinite_gradient", message), ""


def _samples(result: LeafResult) -> str:
    bad = result.bad_samples
    return f", sample{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))} of the training data" if bad else ""
