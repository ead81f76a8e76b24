"""Parquet files, as Hugging Face's datasets are published: one document a row, its text in a column."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from data_pipelines.corpora.arrow_rows import (
    check_column,
    import_pyarrow,
    read_batches,
    text_columns,
)
from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record
from data_pipelines.corpora.sources import SourceFile, open_file
from retro_jax.errors import UserError

_ROWS = 1024  # that are plain Python objects at once
_DAMAGE = (OSError, ValueError, RuntimeError)  # what is raised besides Arrow's own errors


def read_parquet(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The rows of one file, row group by row group; without an id_field file and row are the id."""
    for record, _ in read_parquet_objects(config, file, reading, text_columns(config)):
        yield record


def read_parquet_objects(
    config: CorpusConfig, file: SourceFile, reading: Reading, names: Sequence[str] | None = None
) -> Iterator[tuple[Record, dict[str, Any]]]:
    """The documents of one file with the rows that they are from.

    Args:
      config: which column is what. file: the file. reading: what is done with bad documents.
      names: columns that are read; None for all.
    """
    pyarrow, parquet = import_pyarrow()
    with open_file(file) as bytes_of_it:
        opened = _Watched(bytes_of_it)
        try:
            table = parquet.ParquetFile(opened, page_checksum_verification=True)
            for name in names or text_columns(config):
                check_column(name, table.schema_arrow, file.path)
            columns = None if names is None else list(names)
            groups = range(file.start, file.stop or table.num_row_groups)
            number = sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
            for group in groups:
                rows = range(number, number + table.metadata.row_group(group).num_rows)
                batches = table.iter_batches(
                    _ROWS, row_groups=[group], columns=columns, use_threads=False
                )
                whole = _whole_batches(batches, rows, file, opened, reading)
                yield from read_batches(whole, number, config, file, reading)
                number = rows.stop
        except UserError:
            raise
        except (pyarrow.ArrowException, *_DAMAGE, MemoryError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            if opened.error is not None:
                raise UserError(f"{file.path} cannot be read: {reason}") from error
            raise UserError(
                f"{file.path} is damaged ({reason}): expected a whole Parquet file"
            ) from error


class _Watched:
    """An open file that remembers the error with which reading it failed.

    Attributes:
      error: the last one; None while all bytes could be read.
    """

    def __init__(self, opened: BinaryIO) -> None:
        self._opened = opened
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """As any file; Arrow reads by this method alone."""
        try:
            return self._opened.read(size)
        except Exception as error:
            self.error = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)


def _whole_batches(
    batches: Iterator[Any], rows: range, file: SourceFile, opened: _Watched, reading: Reading
) -> Iterator[Any]:
    """The batches of a row group up to a damaged page; each row after them is a bad document.

    Args:
      batches: of the row group. rows: its rows in the file.
      file: for messages. opened: its bytes: that they cannot be read is no damage.
      reading: what is done with bad documents.
    """
    pyarrow, _ = import_pyarrow()
    count, reason = 0, "it has fewer rows than it states"
    try:
        for batch in batches:
            yield batch
            count += batch.num_rows
    except MemoryError:
        raise
    except (pyarrow.ArrowException, *_DAMAGE) as error:
        if opened.error is not None:
            raise
        reason = str(error).split("\n")[0].rstrip(".")
    left = rows.stop - rows.start - count  # len(rows) has no room for what damaged metadata states
    if left > 0:
        reading.bad(
            f"{file.path} is damaged from row {rows.start + count + 1:,} to {rows.stop:,} ({reason}):"
            " expected a whole Parquet file",
            left,
        )


def parts_of_rows(file: SourceFile, most: int) -> Iterator[SourceFile]:
    """A file in parts of some row groups each, of about so many bytes or one row group."""
    pyarrow, parquet = import_pyarrow()
    try:
        with open_file(file) as opened:
            count = parquet.ParquetFile(opened).num_row_groups
    except (pyarrow.ArrowException, *_DAMAGE):
        count = 0  # whoever reads it reports that
    parts = min(count, -(-file.size // most))
    if parts < 2:
        yield file
        return
    cuts = [count * i // parts for i in range(parts + 1)]
    for start, stop in itertools.pairwise(cuts):
        size = file.size * (stop - start) // count
        yield dataclasses.replace(file, size=size, start=start, stop=stop)
