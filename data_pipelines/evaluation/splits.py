"""A split of the documents and its neighbours, as evaluation and the report read them."""

import dataclasses
import pathlib

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.evaluation.texts import MEASURE_NAMES, read_measures
from data_pipelines.retriever.filled_slots import share_of_ids
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.revisions import latest, open_database
from retro_jax.batch import ChunkText, SizedDocument, text_mask
from retro_jax.errors import UserError

_COUNTED_CHUNKS = 200_000  # of a split, whose tokens or neighbours are counted


@dataclasses.dataclass(frozen=True)
class Measured:
    """A document's corpus, and the denominators of what is scored of it."""

    corpus: str
    bytes: int
    words: int
    lines: int


@dataclasses.dataclass(frozen=True)
class Split:
    """Some documents of a split; for retrieval, also its table and the database that it points into.

    Attributes:
      name: of the split.
      ids: [n] int64, the chunks of the chosen documents, ascending.
      measures: [documents, 4] of a slice (data_pipelines.evaluation.texts), where they are not the text's own.
      wanted: [n] bool, the chunks that are scored of a sample; None for all.
    """

    name: str
    database: ChunkDatabase
    table: NeighbourTable | None
    retrieval: ChunkDatabase | None
    ids: np.ndarray
    measures: np.ndarray | None = None
    wanted: np.ndarray | None = None

    @property
    def is_database(self) -> bool:
        """Whether it is the retrieval database itself, as far as it was opened."""
        retrieval = self.retrieval
        return retrieval is not None and retrieval.manifest.hash == self.database.manifest.hash

    def records(self) -> dict[int, SizedDocument]:
        """The chosen documents by number, with the denominators of what is scored."""
        numbers = np.unique(self.database.documents(self.ids)).tolist()
        records = {number: self.database.record(number) for number in numbers}
        if self.measures is None:
            return dict(records)
        rows = {number: self.measures[number].tolist() for number in numbers}
        return {n: Measured(records[n].corpus, *row[:3]) for n, row in rows.items()}

    def text_mask(self, byte_lengths: np.ndarray) -> np.ndarray:
        """[n, 64] bool: the tokens of ids that are scored; byte_lengths [V] are the tokenizer's.

        A token across the place where scoring begins counts.
        """
        database = self.database
        tokens, owners = database.chunks(self.ids), database.documents(self.ids)
        mask = text_mask(tokens, owners, eos_id=database.eos_id, pad_id=database.pad_id)
        wanted = True if self.wanted is None else self.wanted[:, None]
        if self.measures is None:
            return mask & wanted
        ends = np.cumsum(np.where(mask, byte_lengths[tokens], 0)).reshape(tokens.shape)
        first = np.searchsorted(owners, owners)  # of each chunk's document; numbers ascend
        before = np.where(first > 0, ends[first - 1, -1], 0)
        start = self.measures[owners, MEASURE_NAMES.index("scored_from")]
        return mask & (ends - before[:, None] > start[:, None]) & wanted

    def text(self, k: int) -> ChunkText:
        """What is scored, with k neighbours a chunk; 0 for retrieval off."""
        return ChunkText(
            ids=self.ids,
            documents=self.database.documents(self.ids),
            chunks=self.database.chunks,
            neighbours=(lambda ids: self.neighbours(ids, k)) if k else None,
            pad_id=self.database.pad_id,
            wanted=self.wanted,
        )

    def neighbours(self, ids: np.ndarray, k: int) -> np.ndarray:
        """[n, k, R] int32: the neighbours of chunks `ids` [n]; padding for -1."""
        if self.table is None or self.retrieval is None:
            raise ValueError("the split was opened without neighbours")
        return self.values(ids, self.table.ids(np.maximum(ids, 0), k))

    def values(self, ids: np.ndarray, found: np.ndarray) -> np.ndarray:
        """[n, k, R] int32: the retrieval database's chunks `found` [n, k]; padding where ids is -1."""
        if self.retrieval is None:
            raise ValueError("the split was opened without neighbours")
        return self.retrieval.values(np.where(ids[:, None] >= 0, found, -1))

    def slots_filled(self, k: int) -> float | None:
        """The share of the k neighbour slots of its chunks that have a neighbour; None without a table."""
        if self.table is None or not k:
            return None
        sample = self.ids[:: 1 + len(self.ids) // _COUNTED_CHUNKS]
        return share_of_ids(self.table.ids(sample, k))

    def read_documents(self, k: int) -> np.ndarray:
        """[n, k] int64: documents of the neighbours that are read while each of ids is predicted.

        These are the neighbours of the chunk before it; -1 for the first chunk of a document.
        """
        assert self.table is not None and self.retrieval is not None
        owners = self.database.documents(self.ids)
        before = np.maximum(self.ids - 1, 0)
        follows = (self.ids > 0) & (self.database.documents(before) == owners)
        ids = np.where(follows[:, None], self.table.ids(before, k), -1)
        return np.where(ids >= 0, self.retrieval.documents(ids), -1)

    def hashes(self, with_neighbours: bool) -> dict[str, str]:
        """Hashes of the artefacts that a result depends on."""
        used = {"chunks": self.database.manifest.hash}
        if with_neighbours and self.table is not None:
            used["neighbours"] = self.table.manifest.hash
        return used


def open_split(
    data: pathlib.Path,
    name: str,
    *,
    neighbours: int,
    max_documents: int | None = None,
    revision: int | None = None,
) -> Split:
    """Opens a split.

    Args:
      data: W, or the directory of the prepared data. name: of the split.
      neighbours: how many the table must have; 0 for no table at all.
      max_documents: only the first so many documents of each corpus (they are in random order).
      revision: of the database that is retrieved from; None for the newest.

    Raises:
      UserError: an unknown or empty split, no table or too small a one, artefacts that do not
        belong together.
    """
    places = places_of(data, name, revision)
    is_train = name == "train"
    database = open_database(data, revision) if is_train else ChunkDatabase.open(places.chunks)
    ids = choose_chunks(database, max_documents)
    if not len(ids):
        left = " that was not removed" if database.num_documents else ""
        raise UserError(f"{places.chunks} holds no document{left}: expected some to score")
    measures = read_measures(places.measures) if places.measures else None
    if not neighbours:
        return Split(name, database, None, None, ids, measures)
    retrieval = open_database(data, revision)
    if places.measures:
        if not (places.neighbours / MANIFEST_FILE).is_file():
            raise UserError(
                f"{places.neighbours} is missing: the database is at revision"
                f" {retrieval.manifest.revision} now; expected launch.evaluate --slices={name}, which"
                " finds the slice's neighbours in it"
            )
        table = NeighbourTable.open(places.neighbours, database, retrieval)
    else:
        table = NeighbourTable.of(data, name, database, retrieval)
    if neighbours > table.k:
        raise UserError(
            f"{table.directory} holds {table.k} neighbours a chunk: expected {neighbours} at least"
        )
    return Split(name, database, table, retrieval, ids, measures)


def first_documents(split: Split, chunks: int) -> tuple[Split, np.ndarray]:
    """A split cut to its first documents, the last of which contains chunk number `chunks`.

    Returns:
      The split, and [n, 64] bool: the tokens of its text.
    """
    database = split.database
    owners = database.documents(split.ids)
    ids = split.ids[owners <= owners[min(chunks, len(owners)) - 1]]
    mask = text_mask(
        database.chunks(ids),
        database.documents(ids),
        eos_id=database.eos_id,
        pad_id=database.pad_id,
    )
    return dataclasses.replace(split, ids=ids), mask


@dataclasses.dataclass(frozen=True)
class Places:
    """The directories of a split; of a slice also the one with its measures."""

    chunks: pathlib.Path
    keys: pathlib.Path
    neighbours: pathlib.Path
    measures: pathlib.Path | None


def places_of(data: pathlib.Path, name: str, revision: int | None = None) -> Places:
    """Where a split of the prepared data is, or a slice that evaluation prepared.

    The neighbours of a slice are those in a revision of the database; None for the newest.

    Raises:
      UserError: there is neither.
    """
    splits = sorted(path.name for path in (data / "chunks").glob("*") if path.is_dir())
    slices = sorted(path.parent.name for path in (data / "slices").glob("*/chunks"))
    if name in splits:
        return Places(
            data / "chunks" / name, data / "keys" / name, data / "neighbours" / name, None
        )
    if name in slices:
        folder = data / "slices" / name
        table = slice_table(folder, latest(data) if revision is None else revision)
        return Places(folder / "chunks", folder / "keys", table, folder)
    splits += slices
    expected = f"one of {', '.join(splits)}" if splits else "what launch.prepare makes"
    raise UserError(f"--split={name}: there is no {data / 'chunks' / name}, expected {expected}")


def slice_table(folder: pathlib.Path, revision: int) -> pathlib.Path:
    """Where a slice's table against a revision of the database is."""
    return folder / (f"neighbours-{revision:05d}" if revision else "neighbours")


def token_counts(database: ChunkDatabase) -> np.ndarray:
    """[vocab_size + 1] float64: how often each token is in a database, by a sample of its chunks.

    Removed documents are not in the sample.
    """
    live = database.live_chunks
    count = min(live, _COUNTED_CHUNKS)
    sample = database.live_ids(np.linspace(0, max(0, live - 1), count).astype(np.int64))
    times = np.bincount(database.chunks(sample).ravel(), minlength=database.vocab_size + 1)
    return times * (live / max(1, count))


def choose_chunks(database: ChunkDatabase, max_documents: int | None) -> np.ndarray:
    """[n] int64 ids of the chunks of each corpus's first documents, ascending; None for all."""
    parts = [np.zeros(0, np.int64)]
    for ranges in database.corpora.values():
        limit = max_documents
        for part in ranges:
            ids = np.arange(part.start, part.stop, dtype=np.int64)
            if limit is not None:
                owners = database.documents(ids)
                documents = np.unique(owners)[:limit]
                ids = ids[np.isin(owners, documents)]
                limit -= len(documents)
            parts.append(ids)
    return np.sort(np.concatenate(parts))
