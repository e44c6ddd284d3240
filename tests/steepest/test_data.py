from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import steepest
from worker.data.sources import source_of
from worker.data.streams import is_stream


def _table(first: int, rows: int) -> Any:
    numbers = np.arange(first, first + rows)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(numbers, 3).astype(np.float32)), 3)
    return pa.table({"x": vectors, "y": numbers, "text": [f"row {n}" for n in numbers]})


def _files(directory: Path) -> None:
    parquet.write_table(_table(0, 2500), directory / "a.parquet", row_group_size=700)
    parquet.write_table(_table(2500, 10), directory / "b.parquet")


def test_parquet_files_are_streamed_in_order(tmp_path: Path) -> None:
    _files(tmp_path)
    data = steepest.ParquetData(tmp_path, columns=("x", "y"))
    assert is_stream(data)
    assert len(data) == 2510
    for _ in range(2):
        rows = list(data)
        assert [int(y) for _, y in rows] == list(range(2510))
        assert rows[7][0].tolist() == [7.0] * 3
    row = next(iter(steepest.ParquetData(tmp_path / "b.parquet")))
    assert (row["text"], row["y"]) == ("row 2500", 2500)


def test_parquet_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file in"):
        steepest.ParquetData(tmp_path)
    _files(tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'z'"):
        steepest.ParquetData(tmp_path, columns=("x", "z"))


def test_samples_of_a_tar_are_files_of_one_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        for key in ("a/0001", "a/0002"):
            for extension, content in (("cls", key[-1:]), ("seg.txt", f"text of {key}")):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content.encode()))
    samples = list(steepest.TarData(tmp_path))
    assert [sample["__key__"] for sample in samples] == ["a/0001", "a/0002"]
    assert samples[1] == {"__key__": "a/0002", "cls": b"2", "seg.txt": b"text of a/0002"}
    decoded = steepest.TarData(tmp_path, decode=lambda sample: int(sample["cls"]))
    assert list(decoded) == [1, 2] == list(decoded)
    with pytest.raises(ValueError, match="no file in"):
        steepest.TarData()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_mapped_array_is_read_as_it_is_needed(tmp_path: Path) -> None:
    rows, width = 60_000, 1024
    written = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(rows, width))
    written[:, 0] = np.arange(rows)
    written.flush()
    del written
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    source = source_of(steepest.ArrayData(mapped, np.arange(rows)))
    before = _resident()
    for start in range(0, rows, 500):
        x, y = source.batch(np.arange(start, start + 500))
        assert isinstance(x, torch.Tensor)
        assert torch.equal(x[:, 0].long(), y)
    assert _resident() - before < rows * width * 4 // 2
