"""Data in files, read a piece at a time: Parquet and tar. Both are streams, which iterate anew each time."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROWS_AT_A_TIME = 1024


class ParquetData:
    """The rows of Parquet files, in order.

    paths: of files, or of directories with files. columns: which ones, as a tuple in this order; without it, each row
    is a dict of all columns. Columns of numbers give NumPy scalars, columns of lists of numbers arrays.

    Raises ValueError when there are no files, or a column is not in all of them.
    """

    def __init__(self, *paths: str | Path, columns: Sequence[str] | None = None) -> None:
        self.files = [file for path in map(Path, paths) for file in _files(path, "*.parquet")]
        self.columns = columns
        if not self.files:
            raise ValueError(f"ParquetData: there is no file in {', '.join(map(str, paths)) or 'nothing'}")
        for file in self.files:
            missing = set(columns or ()) - set(self._open(file).schema_arrow.names)
            if missing:
                raise ValueError(f"ParquetData: {file} has no column {min(missing)!r}")

    @staticmethod
    def _open(file: Path) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(file, memory_map=False)

    def __len__(self) -> int:
        return sum(self._open(file).metadata.num_rows for file in self.files)

    def __iter__(self) -> Iterator[Any]:
        columns = None if self.columns is None else list(self.columns)
        for file in self.files:
            with self._open(file) as opened:
                for piece in opened.iter_batches(batch_size=ROWS_AT_A_TIME, columns=columns):
                    yield from self._rows(piece)

    def _rows(self, piece: Any) -> Iterator[Any]:
        names = piece.schema.names if self.columns is None else self.columns
        values = [_column(piece.column(name)) for name in names]
        for row in zip(*values, strict=True):
            yield row if self.columns is not None else dict(zip(names, row, strict=True))


def _column(column: Any) -> Any:
    """The values of a column, one for each row."""
    import numpy as np
    import pyarrow as pa

    kind = column.type
    if pa.types.is_fixed_size_list(kind):
        return np.asarray(column.flatten()).reshape(len(column), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [np.asarray(value) for value in column.to_numpy(zero_copy_only=False)]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return column.to_numpy(zero_copy_only=False)
    return column.to_pylist()


class TarData:
    """The samples of tar files as webdataset writes them: files whose names differ only after the first dot are one.

    paths: of files, or of directories with files. decode: `decode(sample)` -> what the task takes; a sample is a dict
    with the bytes of each file by what follows the first dot, and "__key__".

    Raises ValueError when there are no files.
    """

    def __init__(self, *paths: str | Path, decode: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.files = [file for path in map(Path, paths) for file in _files(path, "*.tar")]
        self.decode = decode
        if not self.files:
            raise ValueError(f"TarData: there is no file in {', '.join(map(str, paths)) or 'nothing'}")

    def __iter__(self) -> Iterator[Any]:
        for file in self.files:
            sample: dict[str, Any] = {}
            with tarfile.open(file, "r|*") as archive:
                for member in archive:
                    content = archive.extractfile(member)
                    if content is None:
                        continue
                    folder, _, name = member.name.rpartition("/")
                    base, _, extension = name.partition(".")
                    key = f"{folder}/{base}" if folder else base
                    if sample and sample["__key__"] != key:
                        yield self._decoded(sample)
                        sample = {}
                    sample["__key__"] = key
                    sample[extension] = content.read()
            if sample:
                yield self._decoded(sample)

    def _decoded(self, sample: dict[str, Any]) -> Any:
        return sample if self.decode is None else self.decode(sample)


def _files(path: Path, pattern: str) -> list[Path]:
    return sorted(path.glob(pattern)) if path.is_dir() else [path]
