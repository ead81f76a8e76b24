"""The neighbour table: for each chunk of a split, its nearest chunks in the retrieval database.

The retrieval database is made of training documents. A chunk is never given a neighbour of its own
document: corpus and id identify a document, so that this is true of every split.

Where the index has several shards, one of them is in memory at a time:

    query shard q --routes--> .tmp-visited-q                     the index shards of each query, if few
    some query shards g, index shard s --search--> .tmp-found-s-g    for every g, then the next s
    .tmp-found-0-g, .tmp-found-1-g, ... --merge--> shard q of the table, q in g

The table of a database that was updated is made from the one before: of its rows, neighbours that were
removed go, what the new index shards find comes in, and only rows that lost a neighbour are searched
for anew.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from data_pipelines.artefacts import bucket_copy, mapped_arrays
from data_pipelines.artefacts.manifest import Manifest, Parents, Path, Stage, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.sharded_rows import ShardedRows
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.candidates import Found, nothing
from data_pipelines.retriever.keys import BLOCK, BlockSource, Keys
from data_pipelines.retriever.queries import OwnDocuments, Queries, StoredChunks, chunks_of
from data_pipelines.retriever.retriever import RETRIEVERS, Ranking, Retriever
from data_pipelines.retriever.revisions import folder_of
from data_pipelines.retriever.sampling import sample_ids
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "neighbours"
IDS, SCORES = "neighbours", "scores"
_MOST_SEARCHES = 20_000  # searches of an index shard for some query shards, each of which is a task
_SOURCE_ROWS = 20_000  # that say how many neighbours belong to their query's corpus
_QUANTILE_ROWS = 10_000_000  # of a larger table every so many-th row


@dataclasses.dataclass(frozen=True)
class NeighboursConfig:
    """How many neighbours are kept, by split, which ones, and how many queries measure the recall.

    Attributes:
      train: neighbours per chunk in the training split's table.
      validation: neighbours per chunk in the validation split's table.
      test: neighbours per chunk in the test split's table.
      recall_queries: chunks of each split for which every key is compared, to measure recall.
      retriever: "dense" (the nearest keys), "bm25" (the best by BM25), or "dense+bm25": the best by
        BM25 of the nearest keys.
      candidates: nearest keys among which "dense+bm25" chooses.
    """

    train: int = 4
    validation: int = 40
    test: int = 40
    recall_queries: int = 500
    retriever: str = "dense"
    candidates: int = 100

    def __post_init__(self) -> None:
        for field in ("train", "validation", "test"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, self, field, "a positive integer")
        require(self.recall_queries >= 0, self, "recall_queries", "a number of chunks")
        require(self.retriever in RETRIEVERS, self, "retriever", f"one of {RETRIEVERS}")
        require(self.candidates > 0, self, "candidates", "a positive number")

    @property
    def ranking(self) -> Ranking:
        """What is near."""
        return Ranking(self.retriever, self.candidates)


def prepare_neighbours(
    directory: Path,
    queries: Queries,
    retriever: Retriever,
    *,
    k: int,
    recall_queries: int,
    base: "NeighbourTable | None" = None,
    runner: Runner = InProcess(),
) -> Manifest:
    """Makes the table of one split, or the shards that are missing of it.

    Args:
      directory: where it goes.
      queries: the split's chunks; their keys, made as the retrieval database's were, where it has any.
      retriever: the retrieval database.
      k: neighbours a chunk.
      recall_queries: sample size of the measured recall.
      base: the split's table against the database's previous revision, of the same k; of keys only.
      runner: where shards are made; given the index, the bytes do not depend on it.

    Returns:
      The manifest. Facts: chunks; queries (chunks with text); filled, for each slot the share of
      queries that have a neighbour in it; nearest, quantiles of the first slot's score; same_corpus,
      the share of neighbours of their query's own corpus; retriever; recall, with its k and its number
      of queries: the share of the true neighbours in the table; database, the chunk ids that it points
      into. The recall is None where no query has any neighbour.
    """
    chunks = chunks_of(queries)
    settings = {"k": k, "recall_queries": recall_queries} | retriever.ranking.settings
    stage = Stage(directory, KIND, settings, table_parents(queries, retriever, base))
    if stage.done:
        return stage.manifest()
    if isinstance(queries, Keys):
        _check_alike(queries, retriever.keys)
    names = [_shard_names(i) for i in range(len(chunks.shards))]
    missing = [i for i, pair in enumerate(names) if stage.missing(pair)]
    owners = OwnDocuments(chunks, retriever.database)
    work = NeighbourShard(
        files.absolute(directory), queries, retriever, k, owners, base, _MOST_SEARCHES
    )
    sizes = [len(ids) for ids in chunks.shards]
    if len(retriever.search.parts) > 1:
        _find_candidates(work, missing, sizes, runner)
    run_counted(runner, work, missing, sizes, what="neighbours", unit="chunk")
    ordered = [ids for ids, _ in names] + [scores for _, scores in names]
    facts = _facts(stage, names, work, recall_queries, runner)
    return stage.finish(facts, ordered, revision=retriever.database.manifest.revision)


def _find_candidates(
    work: "NeighbourShard", missing: Sequence[int], sizes: Sequence[int], runner: Runner
) -> None:
    """Searches every index shard for the chunks that visit it."""
    if work.routed:
        unknown = [q for q in missing if not mapped_arrays.there(work.visited_path(q), 1)]
        run_counted(runner, VisitShard(work), unknown, sizes, what="routes", unit="chunk")
    groups, parts = work.groups, range(len(work.retriever.search.parts))
    wanted = [g for g in range(len(groups)) if set(groups[g]) & set(missing)]
    pairs = [(s, g) for s in parts for g in wanted if work.asks(s, groups[g])]
    searches = [i for i, (s, g) in enumerate(pairs) if not work.has_found(s, g)]
    of_pairs = [sum(sizes[q] for q in groups[g]) for _, g in pairs]
    search = FindShard(work, tuple(pairs))
    run_counted(runner, search, searches, of_pairs, what="candidates", unit="chunk")


def table_parents(queries: Queries, retriever: Retriever, base: "NeighbourTable | None") -> Parents:
    """What a table is made from."""
    chunks = chunks_of(queries)
    parents = {
        "chunks": (chunks.manifest, chunks.directory),
        "database": (retriever.database.manifest, retriever.database.directory),
        **retriever.search.parents(),
    }
    if isinstance(queries, Keys) and queries.manifest.hash != retriever.keys.manifest.hash:
        parents["queries"] = (queries.manifest, queries.directory)
    if base is not None:
        parents["base"] = (base.manifest, base.directory)
    return parents


class NeighbourTable:
    """A split's neighbour table, read from memory maps.

    Attributes:
      directory, manifest: where it is from.
      k: neighbours a chunk, at most.
      database: chunks of the retrieval database that its ids point into; 0 in a table that does not say.
      score: "squared_l2" or "bm25". retriever: what found them.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.k: int = manifest.settings["k"]
        self.database: int = manifest.facts.get("database", 0)
        self.score: str = manifest.settings["score"]
        self.retriever: str = manifest.settings.get("retriever", "dense")
        self._ids = self._opened(manifest.shard_names(f"{IDS}-"))

    @classmethod
    def open(
        cls,
        directory: Path,
        queries: ChunkDatabase | None = None,
        retrieval: ChunkDatabase | None = None,
        *,
        verify: bool = False,
    ) -> "NeighbourTable":
        """Opens a table.

        Args:
          directory: where it is.
          queries: the chunks it must belong to.
          retrieval: the database its ids must point into.
          verify: hash every shard again.

        Raises:
          UserError: none there, damaged, or one of other databases; it names the directories.
        """
        databases = {"chunks": queries, "database": retrieval}
        parents = {role: (db.manifest, db.directory) for role, db in databases.items() if db}
        return cls(directory, Manifest.open(directory, KIND, parents, verify))

    @classmethod
    def of(
        cls, workdir: Path, split: str, queries: ChunkDatabase, database: ChunkDatabase
    ) -> "NeighbourTable":
        """Opens the table of a split of a workdir against a database, whatever its revision is.

        Raises:
          UserError: none there, damaged, or one of other databases; it names the directories.
        """
        path = folder_of(workdir, database.manifest.revision) / KIND / split
        return cls.open(path, queries, database)

    def __reduce__(self) -> tuple[Callable[..., "NeighbourTable"], tuple[str, Manifest]]:
        """Pickles by its place, so that worker processes map the files themselves."""
        return NeighbourTable, (files.absolute(self.directory), self.manifest)

    def __len__(self) -> int:
        """Chunks."""
        return len(self._ids)

    def ids(self, chunk_ids: np.ndarray, k: int | None = None) -> np.ndarray:
        """[..., k] int64 neighbours of chunks [...], nearest first; -1 for none.

        Raises:
          UserError: k is larger than the table's.
        """
        return self._gather(self._ids, chunk_ids, k)

    def scores(self, chunk_ids: np.ndarray, k: int | None = None) -> np.ndarray:
        """[..., k] float32: squared L2 distances, ascending, or BM25's scores, descending.

        Infinity, or minus infinity, where there is no neighbour.
        """
        return self._gather(self._scores, chunk_ids, k)

    @functools.cached_property
    def _scores(self) -> ShardedRows:
        """Training does without them, and so does its copy of a table."""
        names = self.manifest.shard_names(f"{SCORES}-")
        return self._opened([bucket_copy.fetch(self.directory, name).name for name in names])

    def _opened(self, names: Sequence[str]) -> ShardedRows:
        """Shards of k columns."""
        shards = ShardedRows([self.directory / name for name in names])
        for name, shape in zip(names, shards.shapes, strict=True):
            if shape[1:] != (self.k,):
                raise UserError(
                    f"{self.directory / name} has shape {shape}: expected [n, {self.k}]"
                )
        return shards

    def _gather(self, shards: ShardedRows, chunk_ids: np.ndarray, k: int | None) -> np.ndarray:
        """The first k columns of some rows."""
        k = self.k if k is None else k
        if not 0 < k <= self.k:
            raise UserError(f"k is {k}: expected at most {self.k}, which {self.directory} holds")
        chunk_ids = np.asarray(chunk_ids, np.int64)
        flat = chunk_ids.ravel()
        if flat.size and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(
                f"chunk {flat.min()} or {flat.max()} of {len(self)} in {self.directory}"
            )
        rows = np.empty((flat.size, k), shards.dtype)
        shards.gather(flat, rows)
        return rows.reshape(*chunk_ids.shape, k)


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
    base: "NeighbourTable | None" = None
    most_searches: int = _MOST_SEARCHES

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
            live = _is_live(self.database, block)
            has_text = self.retriever.search.has_text(StoredChunks(self.queries, block))
            count += int((has_text & live).sum())
            filled += (ids[block - self.database.shards[index].start][live] >= 0).sum(0)
        names = _shard_names(index)
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
    def groups(self) -> list[range]:
        """The query shards that are searched for together: few enough tasks and files."""
        shards, parts = len(self.database.shards), len(self.retriever.search.parts)
        size = max(1, -(-shards * parts // self.most_searches))
        return [range(q, min(q + size, shards)) for q in range(0, shards, size)]

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
        chunks = self.database.shards[index]
        group = next(g for g, members in enumerate(self.groups) if index in members)
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

    def recall(self, table: ShardedRows, sample: int, runner: Runner) -> dict[str, Any]:
        """How many of the true neighbours of some queries the table's scores contain."""
        ids = sample_live(self.database, sample)
        if not len(ids):
            return {"k": self.k, "queries": 0, "recall": None}
        search = self.retriever.search
        ids = ids[search.has_text(StoredChunks(self.queries, ids))]
        _, truth = self._truth(ids, runner)
        table_scores = np.empty(truth.shape, np.float32)
        table.gather(ids, table_scores)
        by_terms = self.retriever.ranking.by_terms
        share = recall(table_scores, truth, by_terms) if np.isfinite(truth).any() else None
        return {"k": self.k, "queries": len(ids), "recall": share}

    def _truth(self, ids: np.ndarray, runner: Runner) -> Found:
        """The true neighbours of some queries: every key is compared, a range of them by each worker."""
        search, chunks = self.retriever.search, StoredChunks(self.queries, ids)
        ranges = search.truth_ranges
        if runner.in_process or len(ranges) < 2:
            return search.truth(chunks, self.k, self.own.of(ids))
        work = TruthOfRange(self.queries, self.retriever, self.k, ids, self.own.of(ids))
        parts = [found for _, found in runner.run(work, ranges)]
        return search.ranked(search.merged(parts, self.k), chunks, self.k)


@dataclasses.dataclass(frozen=True)
class TruthOfRange:
    """Compares some queries with every key of a range of the database's chunks.

    Attributes:
      queries, retriever, k: as for `prepare_neighbours`.
      ids: [n] of the queries. own: [n] their documents in the database.
    """

    queries: Queries
    retriever: Retriever
    k: int
    ids: np.ndarray
    own: np.ndarray

    wants_accelerator: ClassVar[bool] = True

    def __call__(self, chunks: range) -> Found:
        """The nearest chunks of the range."""
        queries = StoredChunks(self.queries, self.ids)
        return self.retriever.search.truth_within(chunks, queries, self.k, self.own)


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
        none = self.work.retriever.index.visited(np.zeros((0, queries.dimension), np.float32))
        visited = np.concatenate([none.astype(np.int32), *parts])
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


def sample_live(database: ChunkDatabase, sample: int, seed: int = 0) -> np.ndarray:
    """Some chunks of documents that were not removed, in order; the same ones each time."""
    if not len(database.removed):
        return sample_ids(len(database), sample, seed)
    return database.live_ids(sample_ids(database.live_chunks, sample, seed))


def _is_live(database: ChunkDatabase, ids: np.ndarray) -> np.ndarray:
    """[n] bool: which chunks belong to documents that were not removed."""
    if not len(database.removed):
        return np.ones(len(ids), bool)
    return database.live_documents(ids) >= 0


def recall(found: np.ndarray, truth: np.ndarray, descending: bool = False) -> float:
    """The share of the true neighbours that were found.

    Scores are compared, not ids: of chunks at one distance, any is a true neighbour.

    Args:
      found, truth: [n, k] squared distances, infinity where there are no more; or scores.
      descending: whether they are scores, of which larger ones are better, and minus infinity none.
    """
    if descending:
        found, truth = -found, -truth
    there = np.isfinite(truth).sum(1)
    furthest = np.where(np.isfinite(truth), truth, -np.inf).max(1, initial=-np.inf)
    furthest = np.where(there > 0, furthest, 0)
    hits = (found <= (furthest + 1e-5 * np.abs(furthest) + 1e-6)[:, None]).sum(1)
    return float(np.minimum(hits, there).sum() / there.sum()) if there.sum() else 1.0


def _check_alike(queries: Keys, keys: Keys) -> None:
    """Raises unless queries were made as the keys that they are compared with."""
    without = {"prefix": ""}  # of queries and of the database, which may differ
    if queries.manifest.settings | without != keys.manifest.settings | without:
        raise UserError(
            f"{queries.directory} and {keys.directory} do not belong together: expected keys of the"
            " same model and precision"
        )


def _facts(
    stage: Stage,
    names: list[tuple[str, str]],
    work: NeighbourShard,
    recall_queries: int,
    runner: Runner,
) -> dict[str, Any]:
    """What the manifest states, from the shards' facts and the table itself."""
    shards = [stage.shard_facts(ids) for ids, _ in names]
    count = sum(shard["queries"] for shard in shards)
    filled = [sum(slot) for slot in zip(*(shard["filled"] for shard in shards))]
    scores = ShardedRows([stage.directory / name for _, name in names])
    stride = 1 + count // _QUANTILE_ROWS
    parts = [np.empty(0, np.float32)]
    for ids in work.database.shards:
        every = np.array(ids[::stride])
        rows = np.empty((len(every), 1), np.float32)
        scores.gather(every, rows)
        parts.append(rows[_is_live(work.database, every), 0])
    nearest = np.concatenate(parts)
    nearest = nearest[np.isfinite(nearest)]
    steps = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles: Any = np.quantile(nearest, steps) if len(nearest) else []
    return {
        "chunks": len(work.queries),
        "retriever": work.retriever.ranking.retriever,
        "database": len(work.retriever.database),
        "queries": count,
        "filled": [slot / count if count else 0.0 for slot in filled],
        "nearest": {f"{step:g}": float(value) for step, value in zip(steps, quantiles)},
        "same_corpus": _same_corpus(stage, [ids for ids, _ in names], work),
        "recall": work.recall(scores, recall_queries, runner),
    }


def _same_corpus(stage: Stage, names: list[str], work: NeighbourShard) -> float:
    """The share of neighbours, of all slots of some rows, that belong to their query's corpus."""
    queries, database = work.database, work.retriever.database
    table = ShardedRows([stage.directory / name for name in names])
    rows = sample_live(queries, _SOURCE_ROWS)
    neighbours = np.empty((len(rows), work.k), np.int64)
    table.gather(rows, neighbours)
    same = database.corpus_of(neighbours) == queries.corpus_of(rows)[:, None]
    there = neighbours >= 0
    return float(same[there].mean()) if there.any() else 0.0


def _shard_names(index: int) -> tuple[str, str]:
    """The two files of a shard: ids, and their scores."""
    return shard_name(IDS, index), shard_name(SCORES, index)
