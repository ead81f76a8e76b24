"""A retrieval database as generation asks it: chunks in, neighbours out, with their places.

data_pipelines implements both protocols (data_pipelines/retriever/live_database.py).
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from retro_jax.batch import Neighbour
from retro_jax.errors import UserError


class LiveDatabase(Protocol):
    """A database at one revision, which does not change."""

    @property
    def revision(self) -> int:
        """Its number."""
        ...

    @property
    def digest(self) -> str:
        """Its hash."""
        ...

    def find(self, chunks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores [n, k] of the nearest chunks of chunks [n, M]; the id -1 is none."""
        ...

    def values(self, ids: np.ndarray) -> np.ndarray:
        """[n, k, R] tokens of neighbours, as the model reads them."""
        ...

    def neighbour(self, chunk: int, score: float) -> Neighbour:
        """Where a chunk is from."""
        ...


class LiveDatabases(Protocol):
    """The revisions of one database."""

    def newest(self) -> LiveDatabase:
        """The newest one that is open."""
        ...

    def at(self, revision: int) -> LiveDatabase:
        """One of them; a UserError where it is gone, or has not come yet."""
        ...

    def refresh(self) -> bool:
        """Takes up the newest revision that was published; whether it is another one."""
        ...

    def warm_up(self) -> None:
        """Compiles what searching needs, so that the first requests need not wait for it."""
        ...


class Lookup:
    """The retrievals of one request: asks one revision, and remembers what it found.

    Attributes:
      database: the revision. k: neighbours of a chunk.
    """

    def __init__(self, database: LiveDatabase, k: int) -> None:
        self.database, self.k = database, k
        self._found: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """The neighbours [n, k, R] of chunks [n, M]."""
        if not len(chunks):
            raise UserError("no chunk to find neighbours of: expected one at least")
        unknown = {key: chunk for chunk in chunks if (key := _key(chunk)) not in self._found}
        if unknown:
            ids, scores = self.database.find(np.stack(list(unknown.values())), self.k)
            self._found.update(zip(unknown, zip(ids, scores, strict=True), strict=True))
        return self.database.values(np.stack([self._found[_key(chunk)][0] for chunk in chunks]))

    def neighbours(self, chunk: np.ndarray | Sequence[int]) -> list[Neighbour]:
        """The neighbours of a chunk that was asked for; none where it was not."""
        ids, scores = self._found.get(_key(chunk), (np.zeros(0, np.int64), np.zeros(0)))
        pairs = zip(ids.tolist(), scores.tolist(), strict=True)
        return [self.database.neighbour(chunk, score) for chunk, score in pairs if chunk >= 0]

    def by_chunk(self, tokens: Sequence[int] | np.ndarray, length: int) -> list[list[Neighbour]]:
        """The neighbours of every complete chunk of a text."""
        ends = range(length, len(tokens) + 1, length)
        return [self.neighbours(tokens[end - length : end]) for end in ends]


def _key(chunk: np.ndarray | Sequence[int]) -> bytes:
    """A chunk as a dictionary's key."""
    return np.asarray(chunk, np.int32).tobytes()
