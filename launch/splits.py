"""A split of the documents and its neighbours, as evaluation and the report read them."""

import dataclasses
import pathlib

import numpy as np

from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.neighbours import NeighbourTable
from retro_jax.errors import UserError
from retro_jax.evaluate.score import ChunkText


@dataclasses.dataclass(frozen=True)
class Split:
    """Some documents of a split; for retrieval, also its table and the database that it points into.

    Attributes:
      ids: [n] int64, the chunks of the chosen documents, ascending.
    """

    database: ChunkDatabase
    table: NeighbourTable | None
    retrieval: ChunkDatabase | None
    ids: np.ndarray

    def text(self, k: int) -> ChunkText:
        """What is scored, with k neighbours a chunk; 0 for retrieval off."""
        return ChunkText(
            ids=self.ids,
            documents=self.database.documents(self.ids),
            chunks=self.database.chunks,
            neighbours=(lambda ids: self.neighbours(ids, k)) if k else None,
            pad_id=self.database.pad_id,
        )

    def neighbours(self, ids: np.ndarray, k: int) -> np.ndarray:
        """[n, k, R] int32: the neighbours of chunks `ids` [n]; padding for -1."""
        if self.table is None or self.retrieval is None:
            raise ValueError("the split was opened without neighbours")
        found = self.table.ids(np.maximum(ids, 0), k)
        return self.retrieval.values(np.where(ids[:, None] >= 0, found, -1))

    def hashes(self, with_neighbours: bool) -> dict[str, str]:
        """Hashes of the artefacts that a result depends on."""
        used = {"chunks": self.database.manifest.hash}
        if with_neighbours and self.table is not None:
            used["neighbours"] = self.table.manifest.hash
        return used


def open_split(
    data: pathlib.Path, name: str, *, neighbours: int, max_documents: int | None = None
) -> Split:
    """Opens a split.

    Args:
      data: W, or the directory of the prepared data. name: of the split.
      neighbours: how many the table must hold; 0 for no table at all.
      max_documents: only the first so many documents of each corpus (they stand in random order).

    Raises:
      UserError: an unknown or empty split, no table or too small a one, artefacts that do not
        belong together.
    """
    folder = data / "chunks"
    known = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if name not in known:
        expected = f"one of {', '.join(known)}" if known else "what launch.prepare makes"
        raise UserError(f"--split={name}: there is no {folder / name}, expected {expected}")
    database = ChunkDatabase.open(folder / name)
    ids = choose_chunks(database, max_documents)
    if not len(ids):
        raise UserError(f"{folder / name} holds no document: expected some to score")
    if not neighbours:
        return Split(database, None, None, ids)
    retrieval = ChunkDatabase.open(data / "chunks" / "train")
    table = NeighbourTable.open(data / "neighbours" / name, database, retrieval)
    if neighbours > table.k:
        raise UserError(
            f"{table.directory} holds {table.k} neighbours a chunk: expected {neighbours} at least"
        )
    return Split(database, table, retrieval, ids)


def choose_chunks(database: ChunkDatabase, max_documents: int | None) -> np.ndarray:
    """[n] int64 ids of the chunks of each corpus's first documents, ascending; None for all."""
    chosen = [np.zeros(0, np.int64)]
    for ranges in database.corpora.values():
        left = max_documents
        for part in ranges:
            ids = np.arange(part.start, part.stop, dtype=np.int64)
            if left is not None:
                owners = database.documents(ids)
                documents = np.unique(owners)[:left]
                ids = ids[np.isin(owners, documents)]
                left -= len(documents)
            chosen.append(ids)
    return np.sort(np.concatenate(chosen))
