"""Neighbours while a text is generated: of its chunks as they are completed."""

import numpy as np

from data_pipelines.batches.batches import keep_part
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.retriever import Retriever


class LiveRetrieval:
    """Retrieves neighbours for a generator, and remembers which they were.

    Attributes:
      score: what the second array of `found` is: "squared_l2" or "bm25".
    """

    def __init__(self, retriever: Retriever, database: ChunkDatabase, k: int, part: str = "both"):
        """Takes a database that is open.

        Args:
          retriever: searches the database. database: gives the neighbours' tokens.
          k: neighbours of a chunk. part: BatchConfig.neighbour_part, as the model was trained.
        """
        self._retriever, self._database, self._k, self._part = retriever, database, k, part
        self.score: str = retriever.ranking.settings["score"]
        self._found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """The neighbours [n, k, R] of chunks [n, 64]."""
        ids, distances = self._retriever.neighbours(chunks, self._k)
        for chunk, *neighbours in zip(chunks, ids, distances, strict=True):
            self._found[_key(chunk)] = tuple(neighbours)
        return keep_part(self._database.values(ids), self._part, self._database.pad_id)

    def found(self, chunk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and distances [k] of the neighbours of a chunk that was asked for."""
        return self._found[_key(chunk)]


def _key(chunk: np.ndarray) -> bytes:
    """A chunk as a dictionary's key."""
    return np.ascontiguousarray(chunk, np.int32).tobytes()
