"""Curvature against dense Hessians, and the same bits with any number of processes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import steepest
from steepest.spec import spec_from_dict
from tests.support.analysis import local_team
from tests.support.choices import full
from tests.support.models import DifferentiableOnce
from worker.analysis.curvature import Compact, hutch_plus_plus, kind_of_point, lanczos, measure, spectral_density
from worker.analysis.question import CurvatureQuestion
from worker.analysis.team import Team
from worker.task.load import TaskError, load_task
from worker.task.model import describe_model

TASKS = __name__


def digits(hidden: int = 4) -> steepest.Task:
    x, y = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(x[:200] / 16, dtype=torch.float32), torch.tensor(y[:200])
    model = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Dropout(0.5), nn.Linear(hidden, 10))
    return steepest.Task(model=model, loss=nn.CrossEntropyLoss(), train_data=steepest.ArrayData(inputs, targets))


def valley() -> steepest.Task:
    """0.5 (3 a^2 + b^2) whatever the data."""

    class Point(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.at = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * (self.at**2 * torch.tensor([3.0, 1.0])).sum() + 0.0 * x.mean()

    rows = steepest.ArrayData(torch.zeros(8, 1), torch.zeros(8, 1))
    return steepest.Task(model=Point(), batch_loss=lambda model, batch: model(batch[0]), train_data=rows)


def labelled() -> steepest.Task:
    """A model whose loss is the mean over the labels that count; of half of the samples nearly none do."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": nn.functional.cross_entropy(self.inner(inputs).flatten(0, 1), labels.flatten())}

    generator = torch.Generator().manual_seed(0)
    rows = [
        {"inputs": torch.randn(6, 5, generator=generator), "labels": torch.randint(0, 3, (6,), generator=generator)}
        for _ in range(8)
    ]
    for row in rows[:4]:
        row["labels"][1:] = -100
    return steepest.Task(model=Net(), train_data=rows)


def once() -> steepest.Task:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return DifferentiableOnce.apply(self.inner(x)) ** 2

    rows = steepest.ArrayData(torch.ones(8, 1), torch.zeros(8, 1))
    return steepest.Task(model=Net(), loss=nn.MSELoss(), train_data=rows)


def team(
    function: str, samples: int, size: int = 1, micro_batch: int = 32, loss_counts: str = "", **arguments: Any
) -> Team:
    reference = {"module": TASKS, "function": function, "arguments": arguments}
    data = {"global_batch": micro_batch, "micro_batch": micro_batch}
    spec = spec_from_dict({"task": reference, "epochs": 1, "data": data})
    model = describe_model(load_task(spec.task, None, spec.seed))
    question = CurvatureQuestion(spec, model, samples, top=5, matrix="hessian", jacobian=0, loss_counts=loss_counts)
    return local_team(question, size)


def product_of(its: Team) -> Compact:
    layout = its.subject.layout
    positions = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
    return Compact(its.hessian_product, layout.numel, positions)


def test_products_are_those_of_the_dense_hessian() -> None:
    its = team("digits", 200)
    task = digits()
    product, layout = product_of(its), its.subject.layout
    model = task.model.double().eval()
    x, y = (array[:200] for array in task.train_data.arrays)
    names = [p.name for p in layout.parameters]
    views = dict(zip(names, layout.views(its.subject.flat), strict=True))

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = torch.split(flat, [p.numel for p in layout.parameters])
        own = {p.name: part.view(p.shape) for p, part in zip(layout.parameters, parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, own, (x.double(),)), y)

    point = torch.cat([views[name].reshape(-1) for name in names])
    dense = torch.func.hessian(loss)(point).numpy()
    vector = np.random.default_rng(0).standard_normal(len(point))
    assert product(vector) == pytest.approx(dense @ vector, rel=1e-9, abs=1e-12)
    found = measure(product, *_at(its, product))
    exact = np.linalg.eigvalsh(dense)[::-1]
    assert found.eigenvalues == pytest.approx(exact[:5], rel=1e-2)
    assert found.smallest == pytest.approx(exact[-1], rel=1e-2)
    assert found.trace == pytest.approx(np.trace(dense), rel=0.03)
    assert found.point == "saddle"
    assert np.trapezoid(found.values, found.grid) == pytest.approx(1.0, abs=1e-3)


def known_digits() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The model, inputs and targets of `digits`, in float64 and without dropout."""
    task = digits()
    x, y = task.train_data.arrays
    return task.model.double().eval(), x.double(), y


def moved(own: nn.Module, its: Team) -> nn.Module:
    """The same module, with the parameters of the team's subject."""
    layout = its.subject.layout
    for placed, view in zip(layout.parameters, layout.views(its.subject.flat), strict=True):
        own.get_parameter(placed.name).data.copy_(view)
    return own


def test_the_loss_is_the_mean_over_what_counts_however_it_is_cut() -> None:
    (loss, whole), (again, parts) = (
        team("labelled", 8, micro_batch=n, loss_counts="labels").gradient() for n in (8, 4)
    )
    assert again == pytest.approx(loss, rel=1e-12)
    assert parts == pytest.approx(whole, rel=1e-12, abs=1e-15)
    assert team("labelled", 8, micro_batch=4).gradient()[0] != pytest.approx(loss, rel=1e-3)  # the samples' mean


def test_gauss_newton_products_are_those_of_the_dense_matrix() -> None:
    its = team("digits", 200)
    model, x, _ = known_digits()
    moved(model, its)
    names = [name for name, _ in model.named_parameters()]
    point = {name: parameter.detach() for name, parameter in model.named_parameters()}
    jacobians = torch.func.jacrev(lambda own: torch.func.functional_call(model, own, (x,)))(point)
    dense = torch.cat([jacobians[name].reshape(200, 10, -1) for name in names], 2)
    chances = torch.softmax(model(x), 1).detach()
    curved = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]  # of cross entropy
    matrix = torch.einsum("nip,nij,njq->pq", dense, curved, dense).numpy() / 200
    layout = its.subject.layout
    places = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
    product = Compact(its.gauss_newton_product, layout.numel, places)
    assert [p.name for p in layout.parameters] == names
    vector = np.random.default_rng(0).standard_normal(product.size)
    assert product(vector) == pytest.approx(matrix @ vector, rel=1e-9, abs=1e-12)
    found = measure(product, *_at(its, product))
    exact = np.linalg.eigvalsh(matrix)[::-1]
    assert found.eigenvalues == pytest.approx(exact[:5], rel=1e-2)
    assert found.point == "minimum"
    rows = its.subject.jacobian(20)[:, places]
    assert rows == pytest.approx(dense[:20].reshape(200, -1).numpy(), rel=1e-9, abs=1e-12)


def test_products_are_those_of_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    its = team("digits", 200)
    model, x, y = known_digits()
    moved(model, its)
    layout = its.subject.layout
    places = np.concatenate([np.arange(p.offset, p.offset + p.numel) for p in layout.parameters])
    vector = np.random.default_rng(0).standard_normal(len(places))
    theirs = torch.from_numpy(vector)
    for kind, own in (
        (curvlinops.HessianLinearOperator, its.hessian_product),
        (curvlinops.GGNLinearOperator, its.gauss_newton_product),
    ):
        named = dict(model.named_parameters())
        operator = kind(model, nn.CrossEntropyLoss(), [named[p.name] for p in layout.parameters], [(x, y)])
        expected = (operator @ theirs).detach().numpy()
        assert Compact(own, layout.numel, places)(vector) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def with_outputs() -> steepest.Task:
    """As `digits`, with a loss of the whole batch that returns its outputs."""
    known = digits()

    def loss(model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        return nn.functional.cross_entropy(outputs, batch[1]), outputs

    return steepest.Task(model=known.model, batch_loss=loss, train_data=known.train_data)


def linear() -> steepest.Task:
    """A loss without curvature."""
    rows = steepest.ArrayData(torch.ones(8, 2), torch.ones(8, 1))
    return steepest.Task(model=nn.Linear(2, 1), loss=lambda outputs, targets: outputs.mean(), train_data=rows)


def test_outputs_of_a_loss_of_the_whole_batch_count() -> None:
    vector = np.random.default_rng(0).standard_normal(10_000)
    found = []
    for function in ("digits", "with_outputs"):
        its = team(function, 200)
        found.append(its.gauss_newton_product(vector[: its.subject.layout.numel]))
    assert found[0].tobytes() == found[1].tobytes()


def test_a_linear_loss_has_no_gauss_newton_matrix() -> None:
    its = team("linear", 8)
    assert not its.gauss_newton_product(np.ones(its.subject.layout.numel)).any()


def test_without_outputs_gauss_newton_is_refused() -> None:
    its = team("valley", 8)
    with pytest.raises(TaskError, match="outputs are not known"):
        its.gauss_newton_product(np.ones(its.subject.layout.numel))


def test_a_jacobian_beyond_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.analysis.subject.MAX_JACOBIAN_NUMEL", 10_000)
    its = team("digits", 200)
    with pytest.raises(TaskError, match="ask for fewer samples"):
        its.subject.jacobian(20)


def _at(its: Team, product: Compact) -> tuple[float, np.ndarray]:
    loss, gradient = its.gradient()
    return loss, gradient[product._positions]


@pytest.mark.parametrize("most", [2, full(3)])
def test_the_bits_are_the_same_with_any_number_of_processes(most: int) -> None:
    products = []
    for processes in (1, most):
        its = team("digits", 200, processes, micro_batch=20)
        product = product_of(its)
        vector = np.random.default_rng(0).standard_normal(product.size)
        newton = its.gauss_newton_product(np.ones(its.subject.layout.numel))
        products.append((product(vector).tobytes(), newton.tobytes(), its.gradient()[1].tobytes()))
    assert len(set(products)) == 1


def test_a_valley_is_a_minimum() -> None:
    its = team("valley", 8)
    product = product_of(its)
    found = measure(product, *_at(its, product))
    assert found.eigenvalues == (3.0, 1.0)
    assert (found.trace, found.trace_error, found.point, found.gradient_norm) == (4.0, 0.0, "minimum", 0.0)


def test_what_cannot_be_differentiated_twice_is_refused() -> None:
    its = team("once", 8)
    with pytest.raises(TaskError, match="differentiated twice"):
        its.hessian_product(np.ones(its.subject.layout.numel))


@pytest.mark.parametrize(
    ("smallest", "largest", "kind"),
    [
        (0.0, 0.0, "flat"),
        (0.1, 2.0, "minimum"),
        (-1e-5, 2.0, "minimum"),
        (-2.0, -0.1, "maximum"),
        (-1.0, 1.0, "saddle"),
    ],
)
def test_kinds_of_points(smallest: float, largest: float, kind: str) -> None:
    assert kind_of_point(smallest, largest) == kind


class _Matrix(Compact):
    def __init__(self, matrix: np.ndarray) -> None:
        super().__init__(lambda vector: matrix @ vector, len(matrix), np.arange(len(matrix)))


def spectrum(values: np.ndarray) -> _Matrix:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((len(values), len(values))))
    return _Matrix(rotation @ np.diag(values) @ rotation.T)


def test_the_trace_of_a_matrix_with_few_large_eigenvalues() -> None:
    values = np.concatenate([[100.0, 50.0, -20.0], np.full(297, 0.1)])
    traces = [hutch_plus_plus(spectrum(values), np.random.default_rng(seed), rank=20, most=60) for seed in range(20)]
    assert np.mean([trace for trace, _ in traces]) == pytest.approx(values.sum(), rel=1e-3)
    inside = [abs(trace - values.sum()) <= 3 * error + 1e-9 for trace, error in traces]
    assert np.mean(inside) > 0.8


def test_lanczos_gives_the_extreme_eigenvalues_of_a_known_spectrum() -> None:
    values = np.concatenate([[10.0, -4.0], np.linspace(0, 1, 98)])
    start = np.ones(100) / 10
    diagonal, beside = lanczos(spectrum(values), start, 60)
    own = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    assert (own[0], own[-1]) == (pytest.approx(-4.0, rel=1e-8), pytest.approx(10.0, rel=1e-8))


def test_the_density_has_its_weight_where_the_eigenvalues_are() -> None:
    values = np.concatenate([np.full(70, 0.0), np.full(30, 5.0)])
    grid, density = spectral_density(spectrum(values), 20, 20, np.random.default_rng(0))
    near = [np.trapezoid(density[mask], grid[mask]) for mask in (grid < 2.5, grid >= 2.5)]
    assert near == pytest.approx([0.7, 0.3], abs=0.06)
    assert all(low <= high for low, high in itertools.pairwise(grid))
