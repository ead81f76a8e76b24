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
_BLOCK = 1 << 20


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
    with open_file(file) as opened:
        try:
            table = parquet.ParquetFile(opened, page_checksum_verification=True)
            for name in names or text_columns(config):
                check_column(name, table.schema_arrow, file.path)
            columns = None if names is None else list(names)
            groups = range(file.start, file.stop or table.num_row_groups)
            number = sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
            for group in groups:
                batches = table.iter_batches(
                    _ROWS, row_groups=[group], columns=columns, use_threads=False
                )
                damage = _Damage(opened, table.metadata.row_group(group), file.path, number)
                whole = damage.passed_by(batches, reading)
                yield from read_batches(whole, number, config, file, reading)
                number += damage.rows
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise UserError(
                f"{file.path} is damaged ({reason}): expected a whole Parquet file"
            ) from error


class _Damage:
    """What a damaged page makes of its row group: the rows from there on are bad.

    Attributes:
      rows: of the row group.
    """

    def __init__(self, opened: BinaryIO, group: Any, path: str, before: int) -> None:
        """Takes an open file, a row group's metadata, the file's path, and the rows before the group."""
        self.rows: int = group.num_rows
        self._opened, self._group, self._path, self._before = opened, group, path, before

    def passed_by(self, batches: Iterator[Any], reading: Reading) -> Iterator[Any]:
        """The batches that can be read; all rows after them are one bad document each."""
        pyarrow, _ = import_pyarrow()
        count, reason = 0, "it has fewer rows than it states"
        try:
            for batch in batches:
                yield batch
                count += batch.num_rows
        except MemoryError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            self._read_bytes()  # that cannot be read at all are no damaged page
            reason = str(error).split("\n")[0].rstrip(".")
        if count < self.rows:
            first, last = self._before + count + 1, self._before + self.rows
            reading.bad(
                f"{self._path} is damaged from row {first:,} to {last:,} ({reason}): expected a whole"
                " Parquet file",
                self.rows - count,
            )

    def _read_bytes(self) -> None:
        """Reads the row group's bytes; raises what that raises."""
        columns = [self._group.column(i) for i in range(self._group.num_columns)]
        for column in columns:
            offsets = (column.dictionary_page_offset, column.data_page_offset)
            self._opened.seek(min(offset for offset in offsets if offset is not None))
            rest = column.total_compressed_size
            while rest > 0 and (block := self._opened.read(min(rest, _BLOCK))):
                rest -= len(block)


def parts_of_rows(file: SourceFile, most: int) -> Iterator[SourceFile]:
    """A file in parts of some row groups each, of about so many bytes or one row group."""
    pyarrow, parquet = import_pyarrow()
    try:
        with open_file(file) as opened:
            count = parquet.ParquetFile(opened).num_row_groups
    except (pyarrow.ArrowException, OSError):
        count = 0  # whoever reads it reports that
    parts = min(count, -(-file.size // most))
    if parts < 2:
        yield file
        return
    cuts = [count * i // parts for i in range(parts + 1)]
    for start, stop in itertools.pairwise(cuts):
        size = file.size * (stop - start) // count
        yield dataclasses.replace(file, size=size, start=start, stop=stop)
