"""The ways to find the chunks of a database that are near others, behind one protocol.

Dense      the nearest by their embeddings
Reranked   so many nearest by their embeddings, the best of these by BM25
Bm25       the best by BM25 (bm25.py); there need not be any keys
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.retriever.bm25 import Bm25
from data_pipelines.retriever.candidates import Found, merge
from data_pipelines.retriever.exact import squared_distances
from data_pipelines.retriever.index_shard import compare_all
from data_pipelines.retriever.queries import QueryChunks
from data_pipelines.retriever.retrieval_database import Database
from retro_jax.errors import UserError

_TRUTH_CHUNKS = 1 << 17  # that a worker compares with some queries at once, at least


class ChunkSearch(Protocol):
    """Finds chunks near others. `exclude` [n] are documents to leave out; -1, or None, for none.

    A search is cut into parts, of which one is in memory at a time: `candidates` of each part, then
    `merged`, then `ranked`. `find` is all of these at once.

    Attributes:
      parts: of the database, searched one after the other.
    """

    @property
    def parts(self) -> Sequence[Any]: ...

    def parents(self) -> dict[str, tuple[Manifest, Path]]:
        """Role -> what its results were made from, beside the chunks."""
        ...

    def candidates(
        self, part: Any, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """What one part finds: candidates [n, m], and scores, of which `ranked` chooses k."""
        ...

    def merged(self, found: Sequence[Found], k: int) -> Found:
        """The best candidates [n, m] of several parts."""
        ...

    def ranked(self, found: Found, chunks: QueryChunks, k: int) -> Found:
        """The first k [n, k] of candidates, and their scores."""
        ...

    def find(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """Ids [n, k] int64 of the nearest chunks, nearest first, -1 for none, and scores [n, k]."""
        ...

    @property
    def truth_ranges(self) -> Sequence[range]:
        """The ranges of chunk ids of which workers find the truth; none where `truth` finds all."""
        ...

    def truth_within(
        self, ids: range, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """The candidates of a range by comparing everything, for `merged` and `ranked`."""
        ...

    def truth(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `find`, by comparing every key."""
        ...

    def scores_of(self, chunks: QueryChunks, found: np.ndarray) -> np.ndarray:
        """[n, k] float32: the scores of given neighbours [n, k]."""
        ...

    def has_text(self, chunks: QueryChunks) -> np.ndarray:
        """[n] bool: which of the chunks can be searched for."""
        ...


class Dense:
    """As `ChunkSearch`, by squared distances of embeddings."""

    def __init__(self, database: Database) -> None:
        """Opens keys and index."""
        self._keys, self._index = database.keys, database.index

    @property
    def parts(self) -> Sequence[Any]:
        """The index's shards."""
        return self._index.shards

    def parents(self) -> dict[str, tuple[Manifest, Path]]:
        """As `ChunkSearch`."""
        return {
            "keys": (self._keys.manifest, self._keys.directory),
            "index": (self._index.manifest, self._index.directory),
        }

    def candidates(
        self, part: Any, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `ChunkSearch`."""
        return part.search(chunks.embeddings, _positive(k), exclude)

    def merged(self, found: Sequence[Found], k: int) -> Found:
        """As `ChunkSearch`."""
        return merge(found, k)

    def ranked(self, found: Found, chunks: QueryChunks, k: int) -> Found:
        """As `ChunkSearch`."""
        return found[0][:, :k], found[1][:, :k]

    def find(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `ChunkSearch`."""
        return self._index.search(chunks.embeddings, k, exclude)

    @property
    def truth_ranges(self) -> Sequence[range]:
        """As `ChunkSearch`: of the keys' shards, small ones together."""
        return _joined(self._keys.database.shards, _TRUTH_CHUNKS)

    def truth_within(
        self, ids: range, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `ChunkSearch`."""
        return compare_all(self._keys, chunks.embeddings, k, exclude, ids)

    def truth(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `ChunkSearch`."""
        return compare_all(self._keys, chunks.embeddings, k, exclude)

    def scores_of(self, chunks: QueryChunks, found: np.ndarray) -> np.ndarray:
        """As `ChunkSearch`."""
        return squared_distances(self._keys.rows, chunks.embeddings, found)

    def has_text(self, chunks: QueryChunks) -> np.ndarray:
        """As `ChunkSearch`."""
        return ~np.isnan(chunks.embeddings[:, 0])


class Reranked:
    """As `ChunkSearch`: the best by BM25 of so many candidates by their embeddings."""

    def __init__(self, dense: Dense, bm25: Bm25, candidates: int) -> None:
        """Takes what finds candidates, what judges them, and how many there are."""
        self._dense, self._bm25, self._candidates = dense, bm25, candidates

    @property
    def parts(self) -> Sequence[Any]:
        """The index's shards."""
        return self._dense.parts

    def parents(self) -> dict[str, tuple[Manifest, Path]]:
        """As `ChunkSearch`."""
        return self._dense.parents() | self._bm25.parents()

    def candidates(
        self, part: Any, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `ChunkSearch`."""
        return self._dense.candidates(part, chunks, self._count(k), exclude)

    def merged(self, found: Sequence[Found], k: int) -> Found:
        """As `ChunkSearch`."""
        return merge(found, self._count(k))

    def ranked(self, found: Found, chunks: QueryChunks, k: int) -> Found:
        """As `ChunkSearch`."""
        return self._bm25.best_of(chunks.tokens, found[0], k)

    def find(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `ChunkSearch`."""
        return self.ranked(self._dense.find(chunks, self._count(k), exclude), chunks, k)

    @property
    def truth_ranges(self) -> Sequence[range]:
        """As `ChunkSearch`."""
        return self._dense.truth_ranges

    def truth_within(
        self, ids: range, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `ChunkSearch`."""
        return self._dense.truth_within(ids, chunks, self._count(k), exclude)

    def truth(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `ChunkSearch`."""
        return self.ranked(self._dense.truth(chunks, self._count(k), exclude), chunks, k)

    def scores_of(self, chunks: QueryChunks, found: np.ndarray) -> np.ndarray:
        """As `ChunkSearch`."""
        return self._bm25.scores_of(chunks, found)

    def has_text(self, chunks: QueryChunks) -> np.ndarray:
        """As `ChunkSearch`."""
        return self._dense.has_text(chunks)

    def _count(self, k: int) -> int:
        """How many candidates a search for k neighbours begins with."""
        return max(_positive(k), self._candidates)


def _joined(ranges: Sequence[range], least: int) -> list[range]:
    """Ranges that follow each other, joined until each but the last has so many members."""
    joined = list[range]()
    for part in ranges:
        if joined and len(joined[-1]) < least:
            joined[-1] = range(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return joined


def _positive(k: int) -> int:
    """k, or a UserError."""
    if k < 1:
        raise UserError(f"k is {k}: expected at least one neighbour")
    return k
