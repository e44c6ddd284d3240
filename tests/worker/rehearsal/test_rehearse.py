"""What a rehearsal refuses, warns of and finds out."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from services.jobs.task_probe import TaskDescription
from steepest.spec import TaskReference
from tests.support.submission import RefusedError, rehearsed
from worker.rehearsal import rehearse
from worker.rehearsal.fingerprint import difference, fingerprint
from worker.task.load import load_task

BROUGHT = "tests.support.brought"


@pytest.mark.parametrize(
    ("function", "arguments", "field", "said"),
    [
        (
            "growing_buffer",
            {},
            "task.model",
            r"changed the buffer 'seen' from float32\[1\] to float32\[2\].*keeps its shape",
        ),
        ("counter", {}, "task", r"calls has another value after every pass.*register_buffer"),
        ("carried_state", {}, "task", r"hidden has another value after every pass"),
        ("counter_in_a_closure", {}, "task", r"loss: calls has another value after every pass"),
        ("writes_to_a_parameter", {"how": "in place"}, "task.model", r"writes to the parameter 'line.weight'.*instead"),
        ("writes_to_a_parameter", {"how": "through data"}, "task.model", r"writes to the parameter 'line.weight'"),
        ("writes_to_a_parameter", {"how": "other memory"}, "task.model", r"writes to the parameter 'line.weight'"),
        ("writes_to_a_parameter", {"how": "max_norm"}, "task.model", r"writes to the parameter '0.weight'.*max_norm"),
        ("overlapping_parameters", {}, "task.model", r"'one' and 'two' share a part of their memory.*clone"),
        ("complex_buffer", {}, "task.model", r"turn is complex128.*view_as_real"),
        ("ignored_targets", {"kind": "own"}, "task.loss", r"not a mean over the samples.*loss_weight\(batch\)"),
        ("contrastive", {}, "task.loss", r"not a mean over the samples.*micro_batch = 64"),
        ("clamped_gradients", {}, "task.loss", r"not a mean over the samples"),
        ("data_with_a_generator", {}, "task.train_data", r"other values.*generator of its own.*seeded"),
        ("created_parameter", {}, "task.model", r"changed which parameters there are.*'shift'.*__init__"),
        (
            "groups_that_fit_nothing",
            {},
            "task.parameter_groups",
            r"no parameter is called 'backbone.\*'",
        ),
        (
            "own_schedule",
            {"kind": "negative"},
            "task.schedule",
            r"schedule\(2\) returned -1.0; allowed",
        ),
        ("own_schedule", {"kind": "raising"}, "task.schedule", r"schedule\(1\) raised KeyError: 1"),
        ("loader", {"kind": "batches"}, "task.train_data", r"batch_sampler of its own; give it a batch_size"),
        (
            "stream",
            {"kind": "generator"},
            "task.train_data",
            r"generator, which can be read only once.*IterableDataset",
        ),
        ("metric_that_raises", {}, "task", r"evaluating 64 samples of eval_data raised KeyError: 'acuracy'"),
        (
            "last_batch_of_one",
            {},
            "data.global_batch",
            r"micro-batch of 1 of the 65 samples.*more than 1 value.*drop_last",
        ),
    ],
)
def test_what_would_go_wrong_is_refused_with_cause_and_cure(
    function: str, arguments: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(RefusedError, match=f"(?s){said}") as refused:
        rehearsed(f"{BROUGHT}:{function}", arguments=arguments, epochs=3)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("function", "arguments", "field", "said"),
    [
        ("clamped_gradients", {}, "task.model", r"65536 times as large.*a hook.*clip\.value"),
        ("odd_loss", {"kind": "backward"}, "task.model", r"calls backward itself.*add up losses"),
        (
            "odd_loss",
            {"kind": "accuracy"},
            "task.batch_loss",
            r"as the weight of 16 samples.*\(loss, \{name: number\}\)",
        ),
        ("odd_loss", {"kind": "item"}, "task.batch_loss", r"and adds up"),
        ("odd_loss", {"kind": "two"}, "task.loss", r"two values that depend on parameters.*return their sum"),
        ("odd_loss", {"kind": "metric"}, "task.metrics", r"'error' must return a number.*tensor of shape \[64\]"),
    ],
)
def test_what_is_no_loop_over_batches_is_refused_in_one_piece_too(
    function: str, arguments: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(RefusedError, match=f"(?s){said}") as refused:
        rehearsed(f"{BROUGHT}:{function}", arguments=arguments, epochs=3, data={"micro_batch": 64})
    assert refused.value.field == field


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.5])
def test_a_loss_that_is_no_mean_is_found_in_samples_that_are_others_every_time(noise: float) -> None:
    with pytest.raises(RefusedError, match="not a mean over the samples"):
        rehearsed(f"{BROUGHT}:padded", arguments={"noise": noise}, epochs=1)


def test_metrics_without_data_to_evaluate_are_warned_of() -> None:
    [(code, message)] = rehearsed(f"{BROUGHT}:odd_loss", arguments={"kind": "unused"}, epochs=1).warnings
    assert code == "metrics_without_data"
    assert "error: metrics are of evaluations" in message


def test_a_weight_that_is_drawn_is_accepted() -> None:
    assert rehearsed(f"{BROUGHT}:odd_loss", arguments={"kind": "drawn"}, epochs=1, data={"micro_batch": 64}).weight


def test_samples_that_are_others_every_time_are_no_coupling() -> None:
    assert not rehearsed(f"{BROUGHT}:padded", arguments={"noise": 0.5, "counted": True}, epochs=1).warnings


@pytest.mark.parametrize(
    ("function", "raw"),
    [
        ("contrastive", {"data": {"micro_batch": 64}}),
        ("ignored_targets", {"data": {"micro_batch": 64}, "arguments": {"kind": "own"}}),
        ("last_batch_of_one", {"data": {"global_batch": 65, "micro_batch": 13}}),
        ("plain_line", {}),
        ("last_batch_of_one", {"data": {"drop_last": True}}),
        ("stream", {}),
        ("grouped", {}),
        ("momentum_encoder", {}),
        *[("loader", {"arguments": {"kind": kind}}) for kind in ("shuffled", "weighted", "collated")],
        ("said_weight", {}),
        ("weighed_classes", {}),
        ("tied_by_memory", {}),
        ("noisy_hook", {}),
    ],
)
def test_what_is_right_is_accepted_without_a_warning(function: str, raw: dict[str, Any]) -> None:
    found = rehearsed(f"{BROUGHT}:{function}", epochs=1, **raw).warnings
    assert [code for code, _ in found if code != "small_micro_batch"] == []


@pytest.mark.parametrize(
    ("task", "raw", "said"),
    [
        ("tests.support.tasks:least_squares", {}, "curvature needs a task of torch"),
        ("tests.support.brought_types:complex_layer", {}, "real parameters, and turn is complex"),
        ("tests.worker.analysis.test_curvature:once", {}, "cannot be differentiated twice.*leave it out"),
    ],
)
def test_curvature_that_cannot_be_measured_is_refused(task: str, raw: dict[str, Any], said: str) -> None:
    with pytest.raises(RefusedError, match=f"(?s){said}") as refused:
        rehearsed(task, epochs=1, telemetry={"curvature_every": 5}, **raw)
    assert refused.value.field == "telemetry.curvature_every"
    rehearsed(task, epochs=1)


@pytest.mark.parametrize(("quick_seconds", "samples"), [(0.0, 2), (1e9, 64)])
def test_a_slow_pass_is_rehearsed_with_few_samples_and_its_memory_is_that_of_all(
    quick_seconds: float, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> TaskDescription:
        return rehearsed("tests.support.tasks:deep", epochs=1, data={"global_batch": 64, "micro_batch": 64})

    whole = found()
    monkeypatch.setattr(rehearse, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(rehearse, "QUICK_SECONDS", quick_seconds)
    few = found()
    assert few.weight.startswith(f"{samples} for {samples} samples")
    assert few.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.05)


def test_looking_at_curvature_takes_memory() -> None:
    def peak(**telemetry: int) -> int:
        return rehearsed(f"{BROUGHT}:plain_line", epochs=1, telemetry=telemetry).peak_bytes

    assert peak(curvature_every=5) > peak() > 0


def test_parameters_are_what_a_pass_makes_of_them() -> None:
    moving = rehearsed(f"{BROUGHT}:momentum_encoder", epochs=1).model
    assert {b.name for b in moving.buffers} == {"teacher.weight", "teacher.bias"}
    found = rehearsed(f"{BROUGHT}:unreached_parameters", epochs=1)
    assert {c.name for c in found.model.constants} == {"pooler.weight", "pooler.bias"}
    assert found.warnings[0][0] == "unreached_parameters"


def test_statistics_of_other_parameters_than_are_evaluated_are_warned_of() -> None:
    def warned(function: str, **average: Any) -> dict[str, str]:
        data = {"micro_batch": 32}
        return dict(rehearsed(f"tests.support.tasks:{function}", epochs=1, data=data, average=average).warnings)

    said = warned("evaluated", name="ema")["average_statistics"]
    assert "1.running_mean" in said
    assert "average.evaluate = false" in said
    for function, average in (
        ("evaluated", {"name": "ema", "evaluate": False}),
        ("evaluated", {"name": "none"}),
        ("slow", {"name": "ema"}),
        ("regression", {"name": "ema"}),
    ):
        assert "average_statistics" not in warned(function, **average)


def test_a_loader_settles_what_the_spec_leaves_open() -> None:
    found = rehearsed(f"{BROUGHT}:loader", epochs=1)
    assert found.data == {"global_batch": 16, "shuffle": True, "drop_last": True, "readers": 0}
    assert "global_batch" not in rehearsed(f"{BROUGHT}:loader", epochs=1, data={"global_batch": 8}).data
    assert rehearsed(f"{BROUGHT}:loader", epochs=1, arguments={"kind": "weighted"}).num_samples == 40


def test_a_job_without_a_whole_step_is_refused() -> None:
    with pytest.raises(RefusedError, match="nothing is left of 64 samples: a step has 100") as refused:
        rehearsed(f"{BROUGHT}:plain_line", epochs=1, data={"global_batch": 100, "drop_last": True})
    assert refused.value.field == "data.drop_last"


def test_of_a_stream_no_more_is_counted_than_a_job_reads() -> None:
    assert rehearsed(f"{BROUGHT}:stream", steps=2, data={"global_batch": 16}).num_samples == 32
    assert rehearsed(f"{BROUGHT}:stream", epochs=2, data={"global_batch": 16}).num_samples == 64


def test_a_model_that_couples_samples_is_warned_of() -> None:
    code, message = rehearsed(f"{BROUGHT}:cache", epochs=1).warnings[0]
    assert code == "coupled_samples"
    assert "micro_batch = global_batch" in message


def test_caches_and_losses_that_differentiate_are_found_out() -> None:
    assert rehearsed(f"{BROUGHT}:cache", epochs=1).caches == (".table", ".tables")
    assert rehearsed(f"{BROUGHT}:loss_that_differentiates", epochs=1).evaluates_with_gradients
    assert not rehearsed(f"{BROUGHT}:cache", epochs=1).evaluates_with_gradients


def test_fingerprints_tell_tasks_apart_and_allow_for_rounding() -> None:
    def of(function: str) -> Any:
        return fingerprint(load_task(TaskReference(module=BROUGHT, function=function), None, 5))

    assert not difference(of("draws_in_numpy"), of("draws_in_numpy"))
    assert difference(of("another_in_every_process"), of("another_in_every_process")).startswith("train_data[")
    assert difference(of("plain_line"), of("draws_in_numpy")) == "the length of train_data"
    own = dict(of("plain_line"))
    rounded = {name: value * (1 + 1e-6) for name, value in own.items()}
    assert not difference(tuple(own.items()), tuple(rounded.items()))
    assert difference(tuple(own.items()), ()) == "the initial value of weight"


def test_a_module_of_the_users_wins_over_an_installed_one_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml  # whoever has it keeps it

    (tmp_path / "yaml.py").write_text("MINE = True\n")
    (tmp_path / "theirs.py").write_text(
        "import yaml, steepest\nfrom torch import nn\n\n"
        "def task():\n    assert yaml.MINE\n"
        "    return steepest.Task(model=nn.Linear(1, 1), loss=nn.MSELoss(), train_data=[1])\n"
    )
    monkeypatch.setattr(sys, "path", sys.path.copy())
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "yaml"}
    try:
        load_task(TaskReference(module="theirs", function="task"), tmp_path, 0)
    finally:
        sys.modules.pop("theirs", None)
        sys.modules.pop("yaml", None)
        sys.modules.update(before)
    assert yaml.safe_load("a: 1") == {"a": 1}
    assert torch.__name__ == "torch"


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("kind", "counts"), [("own", "labels"), ("next", "shifted_labels"), ("sequence", "")])
def test_what_counts_of_the_labels_is_found_though_none_may_be_left_out_yet(
    kind: str, counts: str, *, padded: bool
) -> None:
    found = rehearsed("tests.support.labels:tagged", arguments={"kind": kind, "padded": padded}, steps=2)
    assert found.loss_counts == counts
    assert ("the labels that are not -100" in found.weight) == bool(counts)


@pytest.mark.parametrize(("kind", "how"), [("sequence", "sqrt"), ("list", "all")])
def test_a_plan_keeps_within_the_budget_for_activations(kind: str, how: str) -> None:
    deep = partial(rehearsed, f"{BROUGHT}:deep", arguments={"kind": kind, "layers": 36}, epochs=1)
    plain, again = deep(), deep(memory={"checkpoint_activations": how})
    assert (plain.recomputed, again.recomputed) == ("", "")
    assert 0 < again.peak_bytes < 0.8 * plain.peak_bytes
    enough = deep(memory={"activation_budget": plain.peak_bytes})
    assert (enough.recomputed, enough.peak_bytes) == ("", plain.peak_bytes)
    planned = deep(memory={"activation_budget": plain.peak_bytes - 1})
    assert (planned.recomputed, planned.peak_bytes) == (how, again.peak_bytes)
    for memory in ({}, {"checkpoint_activations": how}):
        with pytest.raises(RefusedError, match=r"takes .* MB at its peak.*smaller data.micro_batch") as refused:
            deep(memory={**memory, "activation_budget": "1KB"})
        assert refused.value.field == "memory.activation_budget"


def test_a_budget_for_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(RefusedError, match="no task of torch") as refused:
        rehearsed("tests.support.tasks:least_squares", epochs=1, memory={"activation_budget": "1GB"})
    assert refused.value.field == "memory.activation_budget"


@pytest.mark.parametrize(
    ("function", "how", "said"),
    [
        ("numpy_noise", "all", r"another one when activations are computed again \('all'\).*torch.rand"),
        ("numpy_noise", "sqrt", r"'sqrt': sqrt needs an nn.Sequential of 4"),
        ("plain_line", "encoder.*", r"'encoder.\*': no module is called 'encoder.\*'"),
    ],
)
def test_activations_that_cannot_be_computed_again_are_refused(function: str, how: str, said: str) -> None:
    rehearsed(f"{BROUGHT}:{function}", epochs=1)
    with pytest.raises(RefusedError, match=said) as refused:
        rehearsed(f"{BROUGHT}:{function}", epochs=1, memory={"checkpoint_activations": how})
    assert refused.value.field == "memory.checkpoint_activations"
