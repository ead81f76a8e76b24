"""Rows of Arrow: the documents of record batches, whatever file they are from."""

from collections.abc import Iterable, Iterator
from typing import Any

from data_pipelines.corpora.config import CorpusConfig
from data_pipelines.corpora.document import Reading, Record, record_of
from data_pipelines.corpora.sources import SourceFile
from retro_jax.errors import UserError


def read_batches(
    batches: Iterable[Any], before: int, config: CorpusConfig, file: SourceFile, reading: Reading
) -> Iterator[tuple[Record, dict[str, Any]]]:
    """The documents of record batches, with the rows that they are from.

    Args:
      batches: of Arrow. before: rows of the file before them.
      config: which column is what. file: where they are from. reading: what is done with bad documents.
    """
    number = before
    for batch in batches:
        for fields in _rows(batch, file.path, number, reading):
            number += 1
            location = f"{file.path}:{number}"
            if fields is None:
                continue
            record = record_of(fields, f"{file.name}:{number}", location, config, reading)
            if record is not None:
                yield record, fields


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


def text_columns(config: CorpusConfig) -> list[str]:
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
    pyarrow, _ = import_pyarrow()
    return bool(pyarrow.types.is_struct(kind))


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet, which only the readers of rows need."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"pyarrow cannot be imported ({error}): expected the extra retro-jax[parquet]"
        ) from None
    return pyarrow, parquet
