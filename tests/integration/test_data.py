"""Data as they come: read ahead, streamed, cut and dropped, always the same bits and every sample once."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.local_job import hashes, run_here, run_processes, running
from steepest.spec import DataSpec, TaskReference
from tests.support import brought
from tests.support.choices import full
from tests.support.submission import submitted
from worker.data.sampler import Sampler
from worker.data.sources import source_of
from worker.gradients.readers import Readers, Reading, ReadingError

pytestmark = pytest.mark.cluster

BROUGHT = "tests.support.brought"
SPEC: dict[str, Any] = {"epochs": 3, "optimizer": {"name": "momentum", "lr": 0.02}}


def test_readers_read_the_same_bits(tmp_path: Path) -> None:
    noisy = {"task": "tests.support.tasks:slow", "arguments": {"delay": 0.0}, **SPEC}
    expected = hashes(run_here(submitted(tmp_path / "without", **noisy)))
    ahead = submitted(tmp_path / "with", **noisy, data={"readers": 2})
    assert hashes(run_processes(ahead, 2)) == expected


def test_what_a_reader_raises_comes_with_its_traceback_and_its_end_is_noticed() -> None:
    task = TaskReference(module="tests.support.tasks", function="failing_dataset", arguments={"after": 5})
    readers = Readers(Reading(task, None, 0, tuple(sys.path)), 1)
    readers.ask(0, 0, np.arange(4))
    readers.ask(0, 1, np.arange(4, 8))
    assert len(readers.take(0, 0)[0]) == 4
    with pytest.raises(ReadingError, match=r"(?s)OSError: sample 5 is torn.*__getitem__"):
        readers.take(0, 1)
    readers.ask(1, 0, np.arange(4))
    [child] = [p for p in multiprocessing.active_children() if p.name.startswith("steepest-reader")]
    child.kill()
    child.join()
    with pytest.raises(ReadingError, match="a reader"):
        readers.take(1, 0)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_data_sets_of_hugging_face_are_read_as_they_are(kind: str, tmp_path: Path) -> None:
    raw = {"task": f"{BROUGHT}:hugging_face", "arguments": {"kind": kind}, **SPEC, "epochs": 2}
    config = submitted(tmp_path / "here", **raw)
    assert config.num_samples == brought.NUM_SAMPLES
    expected = hashes(run_here(config))
    assert hashes(run_processes(submitted(tmp_path / "there", **raw), 2)) == expected
    if kind == "map":  # the same rows as arrays
        plain = {"task": f"{BROUGHT}:arrays_of_pairs", **SPEC, "epochs": 2}
        assert hashes(run_here(submitted(tmp_path / "arrays", **plain))) == expected


@pytest.mark.parametrize("kind", [full("plain"), full("loader")])
def test_a_stream_gives_the_same_bits_with_workers_killed_on_the_way(kind: str, tmp_path: Path) -> None:
    raw = {"task": f"{BROUGHT}:stream", "arguments": {"kind": kind}, **SPEC, "epochs": 40}
    data = {} if kind == "loader" else {"data": {"global_batch": 16, "shuffle_buffer": 10}}
    expected = hashes(run_here(submitted(tmp_path / "here", **raw, **data)))
    with running(submitted(tmp_path / "there", **raw, **data), 3) as job:
        for step in (10, 40):
            job.wait_for_step(step)
            job.kill_worker("worker-1")
            job.start_worker("worker-1")
        assert hashes(job.finish()) == expected


@pytest.mark.parametrize("kind", ["stream", "map", "drop_last"])
def test_an_epoch_has_every_sample_once(kind: str) -> None:
    data = DataSpec(global_batch=10, micro_batch=3, drop_last=kind == "drop_last", shuffle_buffer=7)
    task = brought.stream("bare") if kind == "stream" else brought.plain_line()
    source = source_of(task.train_data)
    source.prepare(brought.NUM_SAMPLES, data, 5, shuffle=True)
    sampler = Sampler(brought.NUM_SAMPLES, data, 5, source.order(5))
    firsts = brought.inputs()[:, 0].tolist()
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
            for index in range(data.num_micro_batches):
                indices = sampler.indices(step, index)
                if len(indices):
                    inputs, _ = source.batch(indices)
                    seen += inputs[:, 0].tolist()
        orders.append(seen)
        if kind == "drop_last":
            assert len(seen) == len(set(seen)) == 60
        else:
            assert sorted(seen) == sorted(firsts)
    assert orders[0] != orders[1]
    assert orders[0] != firsts


def test_a_stream_can_be_read_from_any_position_again() -> None:
    data = DataSpec(global_batch=4, micro_batch=2, evaluation_batch=4, shuffle_buffer=9)
    ahead, behind = (source_of(brought.stream().train_data) for _ in range(2))
    for source in (ahead, behind):
        source.prepare(brought.NUM_SAMPLES, data, 3, shuffle=True)
    late = ahead.batch(np.array([60, 61]))
    early = ahead.batch(np.array([1, 2]))
    assert np.array_equal(behind.batch(np.array([1, 2]))[0], early[0])
    assert np.array_equal(behind.batch(np.array([60, 61]))[0], late[0])


def test_a_stream_that_ends_early_says_so() -> None:
    source = source_of(brought.stream().train_data)
    source.prepare(brought.NUM_SAMPLES + 5, DataSpec(), 0, shuffle=False)
    with pytest.raises(Exception, match="ended after 64 of the 69 samples that they had when the job was submitted"):
        source.batch(np.arange(60, 69))
