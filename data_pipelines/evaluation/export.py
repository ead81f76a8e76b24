"""Chunks, neighbours and scores as Parquet or Arrow files, for pandas, DuckDB and the like.

    export_chunks(W, "train", "chunks.parquet")

    chunks       chunk, document, corpus, first (of its document), text, tokens (a list of 64)
    neighbours   chunk, document, rank, neighbour, neighbour_document, neighbour_corpus, score
    scores       condition, chunk, document, corpus, tokens (that were scored), nats, bits_per_token

A row group has the rows of 8,192 chunks, so memory does not grow with the database.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.corpora.arrow_rows import import_pyarrow
from data_pipelines.evaluation.splits import Split, open_split
from data_pipelines.retriever.given_keys import ADDED, added_chunks
from retro_jax.errors import UserError
from retro_jax.report.result_files import read_losses
from retro_jax.storage import files

_CHUNKS = 8192  # whose rows are in memory at once
Rows = Mapping[str, Any]  # columns by name


def export_chunks(data: pathlib.Path, split: str, path: pathlib.Path) -> int:
    """Writes every chunk of a split with its text; returns the number of rows.

    Args:
      data: W. split: of it, or an evaluation text that was prepared, or "added" for the documents that an
        unfinished --append adds (data_pipelines/retriever/given_keys.py). path: *.parquet, *.arrow,
        *.feather.

    Raises:
      UserError: no such split, another kind of file, or no pyarrow.
    """
    if split == ADDED:
        database = added_chunks(data)
        chosen = np.arange(len(database))
    else:
        opened = open_split(data, split, neighbours=0)
        database, chosen = opened.database, opened.ids
    tokenizer = Tokenizer.open(data / "tokenizer")

    def rows(ids: np.ndarray) -> Rows:
        tokens, about = database.chunks(ids), _documents(database, ids)
        before = database.documents(np.maximum(ids - 1, 0))
        first = (ids == 0) | (before != database.documents(ids))
        text = [tokenizer.decode(row[row != database.pad_id]) for row in tokens]
        return {"chunk": ids, **about, "first": first, "text": text, "tokens": tokens.tolist()}

    return _write(path, map(rows, _blocks(chosen)))


def export_neighbours(data: pathlib.Path, split: str, path: pathlib.Path) -> int:
    """Writes a row for each neighbour of each chunk of a split, the nearest first; as `export_chunks`.

    The score is a squared distance, or BM25's. Chunks without neighbours have no row.
    """
    opened = open_split(data, split, neighbours=1)
    table, retrieval = opened.table, opened.retrieval
    assert table is not None and retrieval is not None

    def rows(ids: np.ndarray) -> Rows:
        found, scores = table.ids(ids), table.scores(ids)
        there = found >= 0
        row, rank = np.nonzero(there)
        others = _documents(retrieval, found[there])
        return {
            "chunk": ids[row],
            "document": _documents(opened.database, ids[row])["document"],
            "rank": rank,
            "neighbour": found[there],
            **{f"neighbour_{name}": values for name, values in others.items()},
            "score": scores[there],
        }

    return _write(path, map(rows, _blocks(opened.ids)))


def export_scores(
    results: Mapping[str, Any],
    folder: pathlib.Path,
    split: Split,
    path: pathlib.Path,
    text: np.ndarray,
) -> int:
    """Writes a row for each condition and chunk of an evaluation; as `export_chunks`.

    Args:
      results: of launch.evaluate, by condition. folder: where it wrote them.
      split: that was scored. path: as for `export_chunks`. text: [n, 64] bool, the tokens that count.

    Raises:
      UserError: a file of losses is missing, or is of other chunks.
    """

    def every() -> Iterator[Rows]:
        for condition, result in results.items():
            losses = read_losses(folder, result)
            if losses.shape != text.shape:
                raise UserError(
                    f"{folder / result['nll']} has shape {losses.shape}: expected {text.shape}, all"
                    f" chunks of {split.name}"
                )
            for start in range(0, len(split.ids), _CHUNKS):
                part = slice(start, start + _CHUNKS)
                ids, count = split.ids[part], text[part].sum(1)
                nats = np.where(text[part], losses[part], 0).sum(1, dtype=np.float64)
                bits = nats / np.log(2) / np.maximum(count, 1)
                scores = {"tokens": count, "nats": nats, "bits_per_token": bits}
                names = {"condition": [condition] * len(ids), "chunk": ids}
                yield names | _documents(split.database, ids) | scores

    return _write(path, every())


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Chunk ids, some at a time."""
    return (ids[start : start + _CHUNKS] for start in range(0, len(ids), _CHUNKS))


def _documents(database: ChunkDatabase, ids: np.ndarray) -> dict[str, list[str]]:
    """The document's id and corpus of each chunk."""
    numbers = database.documents(ids)
    records = {number: database.record(number) for number in np.unique(numbers).tolist()}
    every = [records[number] for number in numbers.tolist()]
    return {"document": [r.id for r in every], "corpus": [r.corpus for r in every]}


def _write(path: pathlib.Path, blocks: Iterable[Rows]) -> int:
    """Writes blocks of columns into a file of the form that its name tells; returns the rows."""
    pyarrow, parquet = import_pyarrow()
    writers: dict[str, Callable[[Any, Any], Any]] = {
        ".parquet": parquet.ParquetWriter,
        ".arrow": pyarrow.ipc.new_file,
        ".feather": pyarrow.ipc.new_file,
    }
    if path.suffix not in writers:
        raise UserError(
            f"{path} has no known form: expected a name with one of {', '.join(writers)}"
        )
    count, writer = 0, None
    with files.writing(path), files.temporary_name(path) as temporary:
        try:
            for block in blocks:
                table = pyarrow.table(dict(block))
                writer = writer or writers[path.suffix](str(temporary), table.schema)
                writer.write_table(table)
                count += table.num_rows
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise UserError(f"{path}: there is nothing to write: expected some chunks")
        temporary.rename(path)
    return count
