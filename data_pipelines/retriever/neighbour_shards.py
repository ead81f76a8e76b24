"""The work of a neighbour table, as tasks: a shard of it, the routes of its queries, and candidates.

Where the index has several shards, one of them is in memory at a time:

    query shard q --routes--> .tmp-visited-q                     the index shards of each query, if few
    some query shards g, index shard s --search--> .tmp-found-s-g    for every g, then the next s
    .tmp-found-0-g, .tmp-found-1-g, ... --merge--> shard q of the table, q in g
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines.artefacts import mapped_arrays
from data_pipelines.artefacts.runner import silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.candidates import Found, nothing
from data_pipelines.retriever.keys import BLOCK, BlockSource, Keys
from data_pipelines.retriever.neighbour_table import NeighbourTable, shard_names
from data_pipelines.retriever.queries import OwnDocuments, Queries, StoredChunks, chunks_of
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.sampling import is_live
from retro_jax.storage import files


@dataclasses.dataclass(frozen=True)
class NeighbourShard:
    """Makes one shard of the table: searches with the keys of one chunk shard.

    Attributes:
      directory: the table's.
      queries, retriever, k, base: as for `prepare_neighbours`.
      own: the documents of the queries.
      most_searches: of an index shard for some query shards, each of which is a task.
    """

    directory: str
    queries: Queries
    retriever: Retriever
    k: int
    own: OwnDocuments
    base: NeighbourTable | None
    most_searches: int

    @property
    def wants_accelerator(self) -> bool:
        """Whether keys are compared, which is faster on one."""
        return self.retriever.ranking.by_keys

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its number of rows."""
        stage = Stage.attach(self.directory)
        parts = self.retriever.search.parts
        numbers = [s for s in range(len(parts)) if self.asks(s, [index])]
        if len(parts) > 1:
            results = [self._collected(index, numbers)] if numbers else []
        else:
            results = [self.find(parts[s], index, report) for s in numbers]
        if self._is_old(index):
            results.append(self._kept(index))
        ids, scores = self._ranked(index, results)
        rows, count, filled = len(ids), 0, np.zeros(self.k, np.int64)
        for block in self._blocks(index):
            live = is_live(self.database, block)
            has_text = self.retriever.search.has_text(StoredChunks(self.queries, block))
            count += int((has_text & live).sum())
            filled += (ids[block - self.database.shards[index].start][live] >= 0).sum(0)
        names = shard_names(index)
        facts = {"queries": count, "filled": filled.tolist()}
        stage.write_array(names[1], scores)
        stage.write_array(names[0], ids, facts)
        if len(parts) > 1 or not numbers:
            report(rows)
        return rows

    def _ranked(self, index: int, parts: list[Found]) -> Found:
        """The table's rows of query shard `index`, from what each part of the database found."""
        search, rows = self.retriever.search, len(self.database.shards[index])
        ids, scores = np.empty((rows, self.k), np.int64), np.empty((rows, self.k), np.float32)
        offset, results = 0, search.merged(parts, self.k)
        for block in self._blocks(index):
            part = slice(offset, offset + len(block))
            of_block, chunks = (
                (results[0][part], results[1][part]),
                StoredChunks(self.queries, block),
            )
            ids[part], scores[part] = search.ranked(of_block, chunks, self.k)
            offset += len(block)
        return ids, scores

    @property
    def database(self) -> ChunkDatabase:
        """The chunks that are searched for."""
        return chunks_of(self.queries)

    def asks(self, shard: int, queries: Sequence[int]) -> list[int]:
        """Those of some query shards that index shard `shard` is searched for."""
        if self.base is None or self.retriever.search.parts[shard].ids.start >= self.base.database:
            return list(queries)
        return [q for q in queries if not self._is_old(q)]

    def find(
        self,
        part: Any,
        index: int,
        report: Callable[[int], object],
        visitors: np.ndarray | None = None,
    ) -> Found:
        """The candidates of one part of the database for query shard `index`, or some chunks of it."""
        every: list[Found] = []
        for block in self._blocks(index) if visitors is None else _cut(visitors):
            chunks = StoredChunks(self.queries, block)
            own = self.own.of(block)
            every.append(self.retriever.search.candidates(part, chunks, self.k, own))
            report(len(block))
        if not every:
            return nothing(0, self.k)
        return np.concatenate([ids for ids, _ in every]), np.concatenate([s for _, s in every])

    @property
    def routed(self) -> bool:
        """Whether a chunk visits some of the index's shards only."""
        return self.wants_accelerator and bool(self.retriever.index.routed)

    @property
    def visits(self) -> int:
        """How many parts of the database each chunk is compared with."""
        if not self.routed:
            return len(self.retriever.search.parts)
        dimension = self.retriever.keys.dimension
        return self.retriever.index.visited(np.zeros((0, dimension), np.float32)).shape[1]

    @property
    def groups(self) -> list[range]:
        """The query shards that are searched for together: few enough tasks and files."""
        shards, size = len(self.database.shards), self._group_size
        return [range(q, min(q + size, shards)) for q in range(0, shards, size)]

    def group_of(self, index: int) -> int:
        """The number of the group of a query shard."""
        return index // self._group_size

    @property
    def _group_size(self) -> int:
        """Query shards of a group."""
        searches = len(self.database.shards) * len(self.retriever.search.parts)
        return max(1, -(-searches // self.most_searches))

    def visited_path(self, index: int) -> pathlib.Path:
        """Where the index shards that a query shard's chunks visit wait."""
        return pathlib.Path(self.directory, f"{files.TEMPORARY}visited-{index:05d}")

    def visitors(self, shard: int, index: int) -> np.ndarray:
        """[n] int64: the chunks of query shard `index` that visit an index shard."""
        chunks = np.array(self.database.shards[index], np.int64)
        if not self.routed:
            return chunks
        (visited,) = mapped_arrays.mapped(self.visited_path(index), 1)
        return chunks[(visited == shard).any(1)]

    def found_path(self, shard: int, group: int) -> pathlib.Path:
        """Where the candidates of some query shards from an index shard wait."""
        return pathlib.Path(self.directory, f"{files.TEMPORARY}found-{shard:05d}-{group:05d}")

    def has_found(self, shard: int, group: int) -> bool:
        """Whether they are there: of which chunks, their ids and their scores."""
        return mapped_arrays.there(self.found_path(shard, group), 3)

    def _collected(self, index: int, shards: Sequence[int]) -> Found:
        """The best candidates of query shard `index` from several index shards, one after the other."""
        chunks, group = self.database.shards[index], self.group_of(index)
        best: Found | None = None
        for shard in shards:
            rows, ids, scores = mapped_arrays.mapped(self.found_path(shard, group), 3)
            part = slice(*np.searchsorted(rows, (chunks.start, chunks.stop)).tolist())
            at = rows[part] - chunks.start
            if best is None:
                best = nothing(len(chunks), ids.shape[1])
            old = best[0][at], best[1][at]
            best[0][at], best[1][at] = self.retriever.search.merged(
                [old, (np.array(ids[part]), np.array(scores[part]))], self.k
            )
        assert best is not None
        if self.routed:
            self._fill(best, index)
        return best

    def _fill(self, best: Found, index: int) -> None:
        """Searches all index shards for the chunks that found too few where they looked."""
        assert isinstance(self.queries, Keys)
        lacking = np.flatnonzero(best[0][:, -1] < 0)
        chunks = np.array(self.database.shards[index])[lacking]
        (visited,) = mapped_arrays.mapped(self.visited_path(index), 1)
        found = best[0][lacking], best[1][lacking]
        self.retriever.index.fill(
            found,
            np.array(visited[lacking]),
            self.queries.rows(chunks),
            self.own.of(chunks),
            release=True,
        )
        best[0][lacking], best[1][lacking] = found

    def _is_old(self, index: int) -> bool:
        """Whether the table of the previous revision has the rows of query shard `index`."""
        return self.base is not None and self.database.shards[index].stop <= len(self.base)

    def _kept(self, index: int) -> Found:
        """What stays of the previous table's rows; those that lost a neighbour are found anew."""
        assert self.base is not None and isinstance(self.queries, Keys)
        chunks = np.array(self.database.shards[index])
        ids, scores = self.base.ids(chunks), self.base.scores(chunks)
        database = self.retriever.database
        lost = database.is_removed(database.documents(ids)) & (ids >= 0)
        ids, scores = np.where(lost, -1, ids), np.where(lost, np.inf, scores).astype(np.float32)
        rows = np.flatnonzero(lost.any(1))
        if len(rows):
            own, keys = self.own.of(chunks[rows]), self.queries.rows(chunks[rows])
            found = self.retriever.index.search(keys, self.k, own, release=True)
            ids[rows], scores[rows] = found
        return ids, scores

    def _blocks(self, index: int) -> Iterator[np.ndarray]:
        """The chunk ids of a query shard, some at a time."""
        blocks = BlockSource(self.database.shards[index])
        for i in range(len(blocks)):
            yield blocks[i]


@dataclasses.dataclass(frozen=True)
class VisitShard:
    """Finds the index shards that the chunks of a query shard visit."""

    work: NeighbourShard

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Leaves their numbers in a file."""
        chunks, queries = self.work.database.shards[index], self.work.queries
        assert isinstance(queries, Keys)
        parts = [
            self.work.retriever.index.visited(queries.rows(block)).astype(np.int32)
            for block in _cut(np.array(chunks, np.int64))
        ]
        none = np.zeros((0, self.work.visits), np.int32)
        visited = np.concatenate([none, *parts])
        mapped_arrays.write(self.work.visited_path(index), [visited])
        report(len(chunks))
        return len(chunks)


@dataclasses.dataclass(frozen=True)
class FindShard:
    """Searches one index shard for some query shards, (s, g), and leaves the candidates in files."""

    work: NeighbourShard
    pairs: tuple[tuple[int, int], ...]

    wants_accelerator: ClassVar[bool] = True

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Searches pair `index`; pairs of one index shard follow each other, so one is in memory."""
        (s, g), work = self.pairs[index], self.work
        shards = work.retriever.search.parts
        for other in (*shards[:s], *shards[s + 1 :]):  # a worker keeps what an earlier task loaded
            other.release()
        rows, ids, scores = [np.zeros(0, np.int64)], [], []
        for q in work.asks(s, work.groups[g]):
            visitors = work.visitors(s, q)
            found = work.find(shards[s], q, report, visitors)
            rows.append(visitors)
            ids.append(found[0])
            scores.append(found[1])
        arrays = [np.concatenate(rows), _stacked(ids), _stacked(scores)]
        mapped_arrays.write(work.found_path(s, g), arrays)
        return len(arrays[0])


def _cut(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Chunk ids, some at a time."""
    return (ids[first : first + BLOCK] for first in range(0, len(ids), BLOCK))


def _stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Arrays [n, m] of which those without rows may have another m."""
    filled = [part for part in parts if len(part)]
    return np.concatenate(filled or [parts[0]])
