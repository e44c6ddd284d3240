"""Answers a question about a task with a team of processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from worker.analysis.curvature import Compact, measure
from worker.analysis.gradient_check import as_json, check_gradients
from worker.analysis.question import GAUSS_NEWTON, HESSIAN, CheckQuestion, CurvatureQuestion, Question, Refusal
from worker.analysis.team import RefusedError, Team
from worker.task.load import TaskError, said, user_traceback


def answer(question: Question, team: Team, say: Callable[[str], None]) -> dict[str, Any]:
    """What was asked for, as JSON can hold it. Raises what `refusal_of` explains. say: called with what is done."""
    match question:
        case CheckQuestion():
            methods = {"expected": question.expected, "got": question.got}
            return as_json(check_gradients(team, **methods, tolerance=question.tolerance, say=say), team.subject)
        case CurvatureQuestion():
            return _curvature(question, team, say)
    raise TypeError(f"{type(question).__name__} is no question with an answer")


def _curvature(question: CurvatureQuestion, team: Team, say: Callable[[str], None]) -> dict[str, Any]:
    layout = team.subject.layout
    positions = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
    loss, gradient = team.gradient()
    products = {HESSIAN: team.hessian_product, GAUSS_NEWTON: team.gauss_newton_product}
    product = Compact(products[question.matrix], layout.numel, positions)
    found = measure(product, loss, gradient[positions], top=question.top, seed=question.spec.seed, say=say)
    singular: list[float] = []
    if question.jacobian:
        say("the Jacobian of the outputs")
        rows = team.subject.jacobian(question.jacobian)
        squares = np.linalg.eigvalsh(rows @ rows.T)[::-1]  # of the tangent kernel, which is much the smaller matrix
        singular = np.sqrt(np.maximum(squares, 0.0)).tolist()
    about = {"matrix": question.matrix, "jacobian_singular_values": singular}
    return {**found.to_dict(), **about, "samples": question.num_samples, "parameters": len(positions)}


def refusal_of(error: Exception) -> Refusal:
    """What it says to whoever asked."""
    match error:
        case RefusedError():
            return error.refusal
        case TaskError():
            return Refusal(error.field, error.message, error.traceback)
    return Refusal("task", said(error), user_traceback(error))
