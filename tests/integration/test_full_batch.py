"""L-BFGS and Newton-CG over all samples, a step for each evaluation, against torch.optim's own and SciPy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.local_job import hashes, run_here, run_processes
from ps.checkpoint.files import State
from steepest.full_batch_spec import NewtonCgSpec
from steepest.spec import TaskReference
from tests.support.choices import full
from tests.support.submission import RefusedError, rehearsed, submitted
from worker.task.load import load_task

pytestmark = pytest.mark.cluster

TASK = "tests.support.logistic"
SIZE = 569  # of the breast cancer data
OPTIMIZER = {"name": "lbfgs", "tolerance_grad": 1e-12, "tolerance_change": 1e-16, "history_size": 50}
BASE: dict[str, Any] = {"optimizer": OPTIMIZER, "data": {"global_batch": SIZE, "micro_batch": 72}}


def _config(directory: Path, steps: int, **raw: Any) -> Any:
    return submitted(directory, f"{TASK}:breast_cancer", steps=steps, **{**BASE, **raw})


def _task() -> Any:
    return load_task(TaskReference(module=TASK, function="breast_cancer"), None, 0)


def _gradient(model: dict[str, torch.Tensor]) -> float:
    task = _task()
    task.model.load_state_dict(model)
    task.batch_loss(task.model, task.train_data[:]).backward()
    return float(torch.cat([p.grad.reshape(-1) for p in task.model.parameters()]).norm())


def _vector(model: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    return torch.cat([model[name].reshape(-1) for name in ("weight", "bias")]).numpy()


@pytest.fixture(scope="module", params=["lbfgs", "newton_cg"])
def raw(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"optimizer": OPTIMIZER if request.param == "lbfgs" else {"name": "newton_cg"}}


@pytest.fixture(scope="module")
def trained(raw: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> State:
    return run_here(_config(tmp_path_factory.mktemp("here"), 99, **raw))


def test_it_reaches_the_optimum_that_scipy_finds(trained: State) -> None:
    from scipy.optimize import minimize

    task = _task()
    start = torch.cat([p.detach().reshape(-1) for p in task.model.parameters()]).numpy()

    def loss(values: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        with torch.no_grad():
            task.model.weight.copy_(torch.from_numpy(values[:-1]).view(1, -1))
            task.model.bias.copy_(torch.from_numpy(values[-1:]))
        task.model.zero_grad()
        value = task.batch_loss(task.model, task.train_data[:])
        value.backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in task.model.parameters()])
        return value.item(), gradient.numpy()

    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10})
    assert _gradient(trained.model) <= 1e-8
    np.testing.assert_allclose(_vector(trained.model), best.x, atol=1e-6)


def test_it_goes_the_way_of_torchs_own(tmp_path: Path) -> None:
    task = _task()
    evaluations = 0
    own = torch.optim.LBFGS(
        task.model.parameters(), lr=1.0, max_iter=1, max_eval=26, line_search_fn="strong_wolfe",
        tolerance_grad=1e-12, tolerance_change=1e-16, history_size=50,
    )  # fmt: skip

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        own.zero_grad()
        value: torch.Tensor = task.batch_loss(task.model, task.train_data[:])
        value.backward()
        return value

    iterations = 6
    for _ in range(iterations):
        own.step(closure)
    steps = evaluations - iterations + 1  # torch evaluates the point that it begins at, which is known here
    state = run_here(_config(tmp_path, steps))
    for name, value in task.model.state_dict().items():
        torch.testing.assert_close(state.model[name], value, rtol=1e-8, atol=1e-10)


def test_the_bits_are_the_same_at_any_placement_and_after_a_restart(
    raw: dict[str, Any], trained: State, tmp_path: Path
) -> None:
    assert hashes(run_processes(_config(tmp_path / "three", 99, **raw), 3)) == hashes(trained)
    for cut in (1, 2, 7, 23):
        run_here(_config(tmp_path / f"{cut}", cut, **raw))
        assert hashes(run_here(_config(tmp_path / f"{cut}", 99, **raw)))[0] == hashes(trained)[0]


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("data.global_batch", {"data": {"global_batch": 64}}),
        ("clip", {"clip": {"norm": 1.0}}),
        ("optimizer.weight_decay", {"optimizer": {**OPTIMIZER, "weight_decay": 0.1}}),
        ("on_nonfinite", {"on_nonfinite": "skip"}),
        ("placement.servers", {"placement": {"servers": 2}}),
        ("optimizer.lr", {"optimizer": {"name": "newton_cg", "lr": 0.1}}),
        ("best.patience", {"optimizer": {"name": "newton_cg"}, "best": {"patience": 3}, "eval_every": 1}),
        ("average.name", {"optimizer": {"name": "newton_cg"}, "average": {"name": "ema"}}),
    ],
)
def test_what_does_not_go_with_it_is_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match=r"lbfgs|newton_cg") as caught:
        rehearsed(f"{TASK}:breast_cancer", steps=5, **{**BASE, **changes})
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("task", "products", "said"),
    [
        ("tests.support.tasks:regression", "differences", r"task\.model: .*model\.double\(\)"),
        (
            "tests.support.tasks:least_squares",
            "hessian",
            "optimizer.products: an AnalyticTask has no second",
        ),
        (
            "tests.support.logistic:once",
            "hessian",
            "optimizer.products: .*differentiated twice.*set optimizer",
        ),
        ("tests.support.logistic:breast_cancer", "gauss_newton", "optimizer.products: .*outputs are not known"),
    ],
)
def test_products_that_cannot_be_had_are_refused(task: str, products: str, said: str) -> None:
    rows = SIZE if "logistic" in task else 101
    with pytest.raises(RefusedError) as refused:
        rehearsed(task, steps=5, optimizer={"name": "newton_cg", "products": products}, data={"global_batch": rows})
    assert re.match(said, f"{refused.value.field}: {refused.value}", re.DOTALL)


@pytest.mark.parametrize(
    ("task", "field", "said"),
    [
        ("with_dropout", "optimizer.name", "draws random numbers"),
        ("small_network", "data.shuffle", "shuffle=false"),
    ],
)
@pytest.mark.parametrize("optimizer", ["lbfgs", "newton_cg"])
def test_a_loss_that_is_another_in_every_step_is_refused(task: str, field: str, said: str, optimizer: str) -> None:
    raw = {"optimizer": {"name": optimizer}, "data": {"global_batch": 101, "micro_batch": 17}}
    with pytest.raises(RefusedError, match=said) as refused:
        rehearsed(f"{TASK}:{task}", steps=5, **raw)
    assert refused.value.field == field


def test_what_multiplies_is_settled_at_submission(tmp_path: Path) -> None:
    def products(task: str, rows: int) -> str | None:
        raw = {"steps": 5, "optimizer": {"name": "newton_cg"}, "data": {"global_batch": rows}}
        spec = submitted(tmp_path, task, **raw).spec
        assert isinstance(spec.optimizer, NewtonCgSpec)
        return spec.optimizer.products

    assert products("tests.support.logistic:breast_cancer", SIZE) == "hessian"
    assert products("tests.support.logistic:by_hand", SIZE) == "differences"


@pytest.mark.parametrize("products", ["hessian", full("gauss_newton")])
def test_a_network_in_single_precision_learns(products: str, tmp_path: Path) -> None:
    """Damped, with batch statistics: the bits are the same on one worker and on three, and after a restart."""
    raw = {
        "optimizer": {"name": "newton_cg", "products": products, "damping": 0.1},
        "data": {"global_batch": 101, "micro_batch": 17, "shuffle": False},
    }
    task = "tests.support.logistic:small_network"
    here = run_here(submitted(tmp_path / "here", task, steps=60, **raw))
    first = run_here(submitted(tmp_path / "first", task, steps=1, **raw))
    assert _loss(here.model) < 0.6 * _loss(first.model)
    assert hashes(run_processes(submitted(tmp_path / "three", task, steps=60, **raw), 3)) == hashes(here)
    for cut in (3, 11):
        run_here(submitted(tmp_path / f"{cut}", task, steps=cut, **raw))
        assert hashes(run_here(submitted(tmp_path / f"{cut}", task, steps=60, **raw)))[0] == hashes(here)[0]


def _loss(state: dict[str, torch.Tensor]) -> float:
    task = load_task(TaskReference(module=TASK, function="small_network"), None, 0)
    task.model.load_state_dict(state)
    inputs, targets = task.train_data.arrays
    with torch.no_grad():
        return float(task.loss(task.model(inputs), targets))


def test_a_rate_that_moves_is_that_of_the_line_search_after_a_restart(tmp_path: Path) -> None:
    schedule = {"schedule": {"name": "exponential", "gamma": 0.97}}
    expected = run_here(_config(tmp_path / "whole", 20, **schedule))
    for cut in (2, 3, 9):
        run_here(_config(tmp_path / f"{cut}", cut, **schedule))
        assert hashes(run_here(_config(tmp_path / f"{cut}", 20, **schedule)))[0] == hashes(expected)[0]
