"""The neighbour table: for each chunk of a split, its nearest chunks in the retrieval database.

The retrieval database is made of training documents. A chunk is never given a neighbour of its own
document: documents are told apart by corpus and id, so that this holds for every split.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from data_pipelines import files
from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.keys import BlockSource, Keys
from data_pipelines.manifest import Manifest, Path, Stage, shard_name
from data_pipelines.retriever import Retriever
from data_pipelines.runner import InProcess, Runner, run_counted, silent
from retro_jax.config import require
from retro_jax.errors import UserError

KIND = "neighbours"
IDS, SCORES = "neighbours", "scores"
_QUANTILE_ROWS = 10_000_000  # of a larger table every so many-th row


@dataclasses.dataclass(frozen=True)
class NeighboursConfig:
    """How many neighbours are kept, by split, and how many queries measure the recall.

    Attributes:
      train, validation, test: k of the split's table.
      recall_queries: chunks of each split whose neighbours are also found by comparing every key.
    """

    train: int = 4
    validation: int = 40
    test: int = 40
    recall_queries: int = 500

    def __post_init__(self) -> None:
        for field in ("train", "validation", "test"):
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, self, field, "a positive integer")
        require(self.recall_queries >= 0, self, "recall_queries", "a number of chunks")


def prepare_neighbours(
    directory: Path,
    queries: Keys,
    retriever: Retriever,
    *,
    k: int,
    recall_queries: int,
    runner: Runner = InProcess(),
) -> Manifest:
    """Makes the table of one split, or the shards that are missing of it.

    Args:
      directory: where it goes.
      queries: the keys of the split's chunks, made as the retrieval database's were.
      retriever: the retrieval database.
      k: neighbours a chunk.
      recall_queries: sample size of the measured recall.
      runner: where shards are made; given the index, the bytes do not depend on it.

    Returns:
      The manifest. Facts: chunks; queries (chunks with text); filled, for each slot the share of
      queries that have a neighbour in it; nearest, quantiles of the first slot's score; recall, with its k
      and its number of queries: the share of the true neighbours that the table holds.
    """
    chunks = queries.database
    parents = {
        "chunks": (chunks.manifest, chunks.directory),
        "queries": (queries.manifest, queries.directory),
        "database": (retriever.database.manifest, retriever.database.directory),
        "keys": (retriever.keys.manifest, retriever.keys.directory),
        "index": (retriever.index.manifest, retriever.index.directory),
    }
    settings = {"k": k, "recall_queries": recall_queries, "score": "squared_l2"}
    stage = Stage(directory, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    _check_alike(queries, retriever.keys)
    names = [_shard_names(i) for i in range(len(chunks.shards))]
    missing = [i for i, pair in enumerate(names) if stage.missing(pair)]
    own = OwnDocuments(chunks, retriever.database)
    work = NeighbourShard(files.absolute(directory), queries, retriever, k, own)
    sizes = [len(ids) for ids in chunks.shards]
    run_counted(runner, work, missing, sizes, what="neighbours", unit="chunk")
    ordered = [ids for ids, _ in names] + [scores for _, scores in names]
    return stage.finish(_facts(stage, names, work, recall_queries), ordered)


class NeighbourTable:
    """A split's neighbour table, read from memory maps.

    Attributes:
      directory, manifest: where it is from.
      k: neighbours a chunk, at most.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.k: int = manifest.settings["k"]
        self._ids = [self._map(name) for name in manifest.shard_names(f"{IDS}-")]
        self._scores = [self._map(name) for name in manifest.shard_names(f"{SCORES}-")]
        self._bounds = np.cumsum([0] + [len(rows) for rows in self._ids])

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
          queries: the chunks it must be of.
          retrieval: the database its ids must point into.
          verify: hash every shard again.

        Raises:
          UserError: none there, damaged, or one of other databases; it names the directories.
        """
        given = {"chunks": queries, "database": retrieval}
        parents = {role: (db.manifest, db.directory) for role, db in given.items() if db}
        return cls(directory, Manifest.open(directory, KIND, parents, verify))

    def __len__(self) -> int:
        """Chunks."""
        return int(self._bounds[-1])

    def ids(self, chunk_ids: np.ndarray, k: int | None = None) -> np.ndarray:
        """[..., k] int64 neighbours of chunks [...], nearest first; -1 for none.

        Raises:
          UserError: k is larger than what the table holds.
        """
        return self._gather(self._ids, chunk_ids, k)

    def scores(self, chunk_ids: np.ndarray, k: int | None = None) -> np.ndarray:
        """[..., k] float32 squared L2 distances, ascending; infinity where there is no neighbour."""
        return self._gather(self._scores, chunk_ids, k)

    def _map(self, name: str) -> np.ndarray:
        """A shard as a read-only memory map."""
        shard = np.load(self.directory / name, mmap_mode="r")
        if shard.ndim != 2 or shard.shape[1] != self.k:
            raise UserError(
                f"{self.directory / name} has shape {shard.shape}: expected [n, {self.k}]"
            )
        return shard

    def _gather(self, shards: list[np.ndarray], chunk_ids: np.ndarray, k: int | None) -> np.ndarray:
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
        where = np.searchsorted(self._bounds, flat, side="right") - 1
        rows = np.empty((flat.size, k), shards[0].dtype if shards else np.int64)
        for shard in np.unique(where).tolist():
            chosen = np.flatnonzero(where == shard)
            rows[chosen] = shards[shard][flat[chosen] - self._bounds[shard], :k]
        return rows.reshape(*chunk_ids.shape, k)


@dataclasses.dataclass(frozen=True)
class NeighbourShard:
    """Makes one shard of the table: searches with the keys of one chunk shard.

    Attributes:
      directory: the table's.
      queries, retriever, k: as for `prepare_neighbours`.
      own: which documents the queries are of.
    """

    directory: str
    queries: Keys
    retriever: Retriever
    k: int
    own: "OwnDocuments"

    wants_accelerator: ClassVar[bool] = True

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its number of rows."""
        stage = Stage.attach(self.directory)
        shard = self.queries.database.shards[index]
        ids = np.empty((len(shard), self.k), np.int64)
        scores = np.empty(ids.shape, np.float32)
        count, blocks = 0, BlockSource(shard)
        for block in (blocks[i] for i in range(len(blocks))):
            queries, rows = self.queries.rows(block), block - shard.start
            ids[rows], scores[rows] = self.retriever.search(queries, self.k, self.own.of(block))
            count += int((~np.isnan(queries[:, 0])).sum())
            report(len(block))
        names = _shard_names(index)
        facts = {"queries": count, "filled": (ids >= 0).sum(0).tolist()}
        stage.write_array(names[1], scores)
        stage.write_array(names[0], ids, facts)
        return len(ids)

    def recall(self, table: list[np.ndarray], sample: int) -> dict[str, Any]:
        """How many of the true neighbours of some queries the table's scores hold."""
        ids = sample_ids(len(self.queries), sample)
        if not len(ids):
            return {"k": self.k, "queries": 0, "recall": 1.0}
        queries = self.queries.rows(ids)
        ids, queries = ids[~np.isnan(queries[:, 0])], queries[~np.isnan(queries[:, 0])]
        _, truth = self.retriever.exact(queries, self.k, self.own.of(ids))
        bounds = np.cumsum([0] + [len(shard) for shard in table])
        shards = np.searchsorted(bounds, ids, side="right") - 1
        held = [table[shard][i - bounds[shard]] for shard, i in zip(shards, ids, strict=True)]
        share = recall(np.reshape(held, truth.shape), truth)
        return {"k": self.k, "queries": len(ids), "recall": share}


def sample_ids(total: int, sample: int, seed: int = 0) -> np.ndarray:
    """Some of range(total), in order; the same ones each time."""
    random = np.random.Generator(np.random.Philox(seed))
    return np.sort(random.choice(total, min(sample, total), replace=False))


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    """The share of the true neighbours that were found.

    Scores are compared, not ids: of chunks at one distance, any is a true neighbour.

    Args:
      found, truth: [n, k] squared distances, infinity where there are no more.
    """
    there = np.isfinite(truth).sum(1)
    furthest = np.where(np.isfinite(truth), truth, 0).max(1, initial=0)
    hits = (found <= (furthest * (1 + 1e-5) + 1e-6)[:, None]).sum(1)
    return float(np.minimum(hits, there).sum() / there.sum()) if there.sum() else 1.0


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


def _check_alike(queries: Keys, keys: Keys) -> None:
    """Raises unless queries were made as the keys that they are compared with."""
    if queries.manifest.settings != keys.manifest.settings:
        raise UserError(
            f"{queries.directory} and {keys.directory} do not belong together: expected keys of the"
            " same model and precision"
        )


def _same_documents(queries: ChunkDatabase, database: ChunkDatabase) -> np.ndarray:
    """[documents of queries] int64: the number of the same document in the database, or -1."""
    wanted = {(r.corpus, r.id): i for i, r in enumerate(queries.records())}
    numbers = np.full(len(wanted), -1, np.int64)
    for number, record in enumerate(database.records()):
        i = wanted.get((record.corpus, record.id))
        if i is not None:
            numbers[i] = number
    return numbers


def _facts(
    stage: Stage, names: list[tuple[str, str]], work: NeighbourShard, recall_queries: int
) -> dict[str, Any]:
    """What the manifest states, from the shards' facts and the table itself."""
    shards = [stage.shard_facts(ids) for ids, _ in names]
    count = sum(shard["queries"] for shard in shards)
    filled = [sum(slot) for slot in zip(*(shard["filled"] for shard in shards))]
    scores = [np.load(stage.directory / name, mmap_mode="r") for _, name in names]
    stride = 1 + count // _QUANTILE_ROWS
    nearest = np.concatenate([np.empty(0), *(shard[::stride, 0] for shard in scores)])
    nearest = nearest[np.isfinite(nearest)]
    steps = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles = np.quantile(nearest, steps) if len(nearest) else []
    return {
        "chunks": len(work.queries),
        "queries": count,
        "filled": [slot / count if count else 0.0 for slot in filled],
        "nearest": {f"{step:g}": float(value) for step, value in zip(steps, quantiles)},
        "recall": work.recall(scores, recall_queries),
    }


def _shard_names(index: int) -> tuple[str, str]:
    """The two files of a shard: ids, and their scores."""
    return shard_name(IDS, index), shard_name(SCORES, index)
