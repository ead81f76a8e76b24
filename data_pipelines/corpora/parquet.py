"""Parquet files, as Hugging Face's datasets are published: one document a row, its text in a column."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record, record_of
from data_pipelines.corpora.sources import SourceFile, open_file
from retro_jax.errors import UserError

_ROWS = 1024  # that are plain Python objects at once


def read_parquet(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The rows of one file, row group by row group; without an id_field file and row are the id."""
    for record, _ in read_parquet_objects(config, file, reading, _columns(config)):
        yield record


def read_parquet_objects(
    config: CorpusConfig, file: SourceFile, reading: Reading, names: Sequence[str] | None = None
) -> Iterator[tuple[Record, dict[str, Any]]]:
    """The documents of one file with the rows that they are from.

    Args:
      config: which column is what. file: the file. reading: what is done with bad documents.
      names: columns that are read; None for all.
    """
    pyarrow, parquet = _import_pyarrow()
    with open_file(file) as opened:
        try:
            table = parquet.ParquetFile(opened)
            for name in names or _columns(config):
                check_column(name, table.schema_arrow, file.path)
            columns = None if names is None else list(names)
            groups = range(file.start, file.stop or table.num_row_groups)
            number = sum(table.metadata.row_group(i).num_rows for i in range(groups.start))
            for group in groups:
                batches = table.iter_batches(
                    _ROWS, row_groups=[group], columns=columns, use_threads=False
                )
                for batch in batches:
                    for fields in _rows(batch, f"{file.path}", number, reading):
                        number += 1
                        location = f"{file.path}:{number}"
                        if fields is None:
                            continue
                        record = record_of(
                            fields, f"{file.name}:{number}", location, config, reading
                        )
                        if record is not None:
                            yield record, fields
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise UserError(
                f"{file.path} is damaged ({reason}): expected a whole Parquet file"
            ) from error


def parts_of_rows(file: SourceFile, most: int) -> Iterator[SourceFile]:
    """A file in parts of some row groups each, of about so many bytes or one row group."""
    pyarrow, parquet = _import_pyarrow()
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


def _rows(batch: Any, path: str, before: int, reading: Reading) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch as Python objects; None for a bad one.

    Args:
      batch: of Arrow. path: the file. before: rows of the file before the batch.
      reading: what is done with bad documents.
    """
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError, TypeError):  # of some row, and it is not said of which
        pass
    for i in range(batch.num_rows):
        try:
            row = batch.slice(i, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            location = f"{path}:{before + i + 1}"
            reading.bad(f"{location} has byte 0x{byte:02x}: expected UTF-8")
            row = None
        except (ValueError, OverflowError, TypeError) as error:
            reason = str(error).split("\n")[0]
            location = f"{path}:{before + i + 1}"
            reading.bad(f"{location} cannot be read ({reason}): expected plain values")
            row = None
        yield row


def _columns(config: CorpusConfig) -> list[str]:
    """The columns that are read."""
    names = (config.text_field, config.id_field, config.label_path)
    return [name for name in names if name]


def check_column(name: str, schema: Any, path: str) -> None:
    """Raises unless an Arrow schema has a column, or a field within one ("a.b")."""
    fields = list(schema)
    for part in [name] if name in schema.names else name.split("."):
        found = [field for field in fields if field.name == part]
        if len(found) > 1:
            raise UserError(f"{path} has {len(found)} columns {name!r}: expected one")
        if not found:
            columns = ", ".join(schema.names)
            raise UserError(f"{path} has no column {name!r}: expected one of {columns}")
        kind = found[0].type
        # Of types with fields inside, only structs have names to look up.
        fields = [kind.field(i) for i in range(kind.num_fields)] if _is_struct(kind) else []


def _is_struct(kind: Any) -> bool:
    """Whether an Arrow type is that of objects."""
    pyarrow, _ = _import_pyarrow()
    return bool(pyarrow.types.is_struct(kind))


def _import_pyarrow() -> tuple[Any, Any]:
    """pyarrow, which only this reader needs."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"pyarrow cannot be imported ({error}): expected the extra retro-jax[parquet]"
        ) from None
    return pyarrow, parquet
