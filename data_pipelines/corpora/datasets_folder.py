"""A folder that Hugging Face's `datasets` wrote: Arrow's streams, one document a row.

    Dataset.save_to_disk("mine")       mine/data-00000-of-00001.arrow  state.json  dataset_info.json
    DatasetDict.save_to_disk("mine")   mine/dataset_dict.json  train/...  test/...

What `datasets` keeps beside them for itself (cache-*.arrow) is no part of the data. Arrow's other form
of file, which Feather is, is read too.
"""

import pathlib
from collections.abc import Iterator
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
from retro_jax.storage import files

_FILE_MAGIC = b"ARROW1"
_END = b"\xff" * 4 + bytes(4)  # with which a stream ends that was closed
_ROWS = 1024  # that are plain Python objects at once


def read_arrow(config: CorpusConfig, file: SourceFile, reading: Reading) -> Iterator[Record]:
    """The rows of one file; without an id_field a hash of the text is the id."""
    pyarrow, _ = import_pyarrow()
    with open_file(file) as opened:
        try:
            schema, batches = _open(pyarrow, file, opened)
            for name in text_columns(config):
                check_column(name, schema, file.path)
            number = 0
            for batch in batches:
                rows = f"row {number + 1:,} to {number + batch.num_rows:,}"
                whole = _checked(
                    pyarrow, batch, config, f"{file.path} is damaged from {rows}", reading
                )
                for record, _ in read_batches(whole, number, config, file, reading):
                    yield record
                number += batch.num_rows
        except UserError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
            reason = str(error).split("\n")[0].rstrip(".")
            raise UserError(
                f"{file.path} is damaged ({reason}): expected a whole Arrow file"
            ) from error


def _open(pyarrow: Any, file: SourceFile, opened: BinaryIO) -> tuple[Any, Iterator[Any]]:
    """The schema and the batches of a file in either form."""
    is_file = opened.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    if not is_file:
        opened.seek(-min(len(_END), opened.seek(0, 2)), 2)
        if opened.read() != _END:  # else a file that was cut between batches would be read as whole
            raise UserError(f"{file.path} is cut off: expected a whole Arrow stream")
    opened.seek(0)
    if is_file:
        reader = pyarrow.ipc.open_file(opened)
        return reader.schema, _small(map(reader.get_batch, range(reader.num_record_batches)))
    reader = pyarrow.ipc.open_stream(opened)
    return reader.schema, _small(iter(reader))


def _small(batches: Iterator[Any]) -> Iterator[Any]:
    """The rows of batches, some at a time; their number is right before rows are looked at."""
    for batch in batches:
        batch.validate()
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS)


def _checked(
    pyarrow: Any, batch: Any, config: CorpusConfig, damaged: str, reading: Reading
) -> list[Any]:
    """The columns of a batch that are read, if their offsets stay within their bytes; else no batch.

    Arrow maps them as they are: of a damaged file they could be anywhere in memory. Text that is no
    UTF-8 is the fault of a row, not of the file, so its bytes alone are checked.
    """
    wanted = text_columns(config)
    names = [
        n for n in batch.schema.names if n in wanted or any(w.startswith(f"{n}.") for w in wanted)
    ]
    batch = batch.select(names)
    as_bytes = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
    }
    try:
        for column in batch.columns:
            kind = as_bytes.get(column.type)
            (column if kind is None else column.view(kind)).validate(full=True)
    except (pyarrow.ArrowException, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        reading.bad(f"{damaged} ({reason}): expected a whole Arrow file", batch.num_rows)
        return []
    return [batch]


def check_folder(config: CorpusConfig) -> None:
    """Raises unless all files that a folder of `datasets` lists are there, and it has one split.

    A URL and a file are taken as they are.
    """
    folder = pathlib.Path(str(config.path))
    splits = folder / "dataset_dict.json"
    if splits.is_file() and config.include is None:
        names = files.read_json(splits).get("splits")
        first = names[0] if isinstance(names, list) and names else "train"
        raise UserError(
            f"corpus {config.name!r}: {folder} has the splits {names!a}: expected one corpus for each,"
            f" such as {folder / str(first)}"
        )
    state = folder / "state.json"
    listed = files.read_json(state).get("_data_files") if state.is_file() else None
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not (isinstance(name, str) and "\0" not in name and (folder / name).is_file()):
            raise UserError(f"{state} lists {name!a}: expected that file beside it")
