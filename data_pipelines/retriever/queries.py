"""Chunks to search for: stored ones of a split, or new ones as they come while sampling."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.keys import Keys

Queries = Keys | ChunkDatabase  # chunks to search for, with embeddings or without


class QueryChunks(Protocol):
    """Chunks to search for; each property is read when it is needed."""

    @property
    def tokens(self) -> np.ndarray:
        """[n, 64] int32."""
        ...

    @property
    def embeddings(self) -> np.ndarray:
        """[n, d] float32; a row of NaN for a chunk without text."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredChunks:
    """Chunks `ids` [n] of a split."""

    queries: Queries
    ids: np.ndarray

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """As `QueryChunks`."""
        return chunks_of(self.queries).chunks(self.ids)

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        """As `QueryChunks`, as they are stored."""
        assert isinstance(self.queries, Keys)
        return self.queries.rows(self.ids)


@dataclasses.dataclass(frozen=True)
class NewChunks:
    """Tokens [n, 64] and what embeds them."""

    tokens: np.ndarray
    embed: Callable[[np.ndarray], np.ndarray]

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        """As `QueryChunks`."""
        return self.embed(self.tokens)


class OwnDocuments:
    """The retrieval database's number of each chunk's own document."""

    def __init__(self, queries: ChunkDatabase, database: ChunkDatabase) -> None:
        """Finds the documents of the queries in the database, by corpus and id."""
        self._queries = queries
        self._numbers: np.ndarray | None = None
        if queries.manifest.hash != database.manifest.hash:
            self._numbers = _same_documents(queries, database)

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[n] int64 numbers for chunks [n] of the queries; -1 where the database lacks the document."""
        documents = self._queries.documents(ids)
        return documents if self._numbers is None else self._numbers[documents]


def chunks_of(queries: Queries) -> ChunkDatabase:
    """The chunks that are searched for."""
    return queries.database if isinstance(queries, Keys) else queries


def _same_documents(queries: ChunkDatabase, database: ChunkDatabase) -> np.ndarray:
    """[documents of queries] int64: the number of the same document in the database, or -1."""
    positions = {(r.corpus, r.id): i for i, r in enumerate(queries.records())}
    numbers = np.full(len(positions), -1, np.int64)
    for number, record in enumerate(database.records()):
        i = positions.get((record.corpus, record.id))
        if i is not None:
            numbers[i] = number
    return numbers
