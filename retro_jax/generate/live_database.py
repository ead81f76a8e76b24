"""A retrieval database as generation asks it: chunks in, neighbours out, with their places.

data_pipelines implements both protocols (data_pipelines/live).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from retro_jax.batch import Neighbour
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.generate.mixture import AskVotes, Mixture


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """How one request retrieves.

    Attributes:
      k: neighbours of a chunk; None as in training, 0 for none.
      exclude: documents that are never retrieved, as CORPUS/ID.
      stride: tokens between retrievals, a divisor of a chunk's; 0 for a chunk, as in training.
      tokens: whether the model is mixed with the database's token memory.
    """

    k: int | None = None
    exclude: tuple[str, ...] = ()
    stride: int = 0
    tokens: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        require(self.k is None or self.k >= 0, self, "k", "a number of neighbours, or None")
        require(self.stride >= 0, self, "stride", "a number of tokens, or 0")
        for field in ("exclude", "stride", "tokens"):
            given = bool(getattr(self, field))
            require(self.k != 0 or not given, self, field, "none where k is 0")


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

    def without(self, documents: Sequence[str]) -> "LiveDatabase":
        """The same, but for documents as CORPUS/ID; a UserError where there is no such document."""
        ...

    def votes(self) -> AskVotes | None:
        """What asks its token memory; None where it has none."""
        ...

    def library(self) -> Any:
        """What a page of traces asks of it: retro_jax.report.trace_value.SourceLibrary."""
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
      stride: tokens between retrievals; 0 for a chunk. mixture: the token memory that is mixed in.
    """

    def __init__(
        self, database: LiveDatabase, k: int, *, stride: int = 0, mixture: Mixture | None = None
    ) -> None:
        self.database, self.k, self.stride, self.mixture = database, k, stride, mixture
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

    def found(self, chunk: np.ndarray | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids and scores [k] of a chunk's neighbours, -1 for none; [0] where it was not asked for."""
        return self._found.get(_key(chunk), (np.zeros(0, np.int64), np.zeros(0, np.float32)))

    def ids(self) -> np.ndarray:
        """[n, k] ids of all that was found so far."""
        return np.array([ids for ids, _ in self._found.values()], np.int64).reshape(-1, self.k)

    def neighbours(self, chunk: np.ndarray | Sequence[int]) -> list[Neighbour]:
        """The neighbours of a chunk that was asked for; none where it was not."""
        ids, scores = self.found(chunk)
        pairs = zip(ids.tolist(), scores.tolist(), strict=True)
        return [self.database.neighbour(chunk, score) for chunk, score in pairs if chunk >= 0]

    def by_chunk(self, tokens: Sequence[int] | np.ndarray, length: int) -> list[list[Neighbour]]:
        """The neighbours of every complete chunk of a text; with a stride of every query."""
        ends = range(length, len(tokens) + 1, self.stride or length)
        return [self.neighbours(tokens[end - length : end]) for end in ends]


def _key(chunk: np.ndarray | Sequence[int]) -> bytes:
    """A chunk as a dictionary's key."""
    return np.asarray(chunk, np.int32).tobytes()
