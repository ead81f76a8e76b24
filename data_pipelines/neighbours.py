"""The neighbour table: for each chunk of a split, its nearest chunks in the retrieval database.

The retrieval database is made of training documents. A chunk is never given a neighbour of its own
document: documents are told apart by corpus and id, so that this holds for every split.
"""

import dataclasses
import pathlib
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.embedder import WordPieces
from data_pipelines.keys import BlockSource, as_float32, iterate
from data_pipelines.manifest import Manifest, Path, Stage, shard_name
from data_pipelines.retriever import Retriever
from retro_jax.config import require
from retro_jax.errors import UserError

KIND = "neighbours"
IDS, SCORES = "neighbours", "scores"


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
    directory: Path, queries: ChunkDatabase, retriever: Retriever, *, k: int, recall_queries: int
) -> Manifest:
    """Makes the table of one split, or the shards that are missing of it.

    Args:
      directory: where it goes.
      queries: the split's chunks.
      retriever: the retrieval database.
      k: neighbours a chunk.
      recall_queries: sample size of the measured recall.

    Returns:
      The manifest. Facts: chunks; queries (chunks with text); filled, for each slot the share of
      queries that have a neighbour in it; nearest, quantiles of the first slot's score; recall, with its k
      and its number of queries: the share of the true neighbours that the table holds.
    """
    parents = {
        "chunks": (queries.manifest, queries.directory),
        "database": (retriever.database.manifest, retriever.database.directory),
        "keys": (retriever.keys.manifest, retriever.keys.directory),
        "index": (retriever.index.manifest, retriever.index.directory),
    }
    settings = {"k": k, "recall_queries": recall_queries, "score": "squared_l2"}
    stage = Stage(directory, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    work = _Work(stage, queries, retriever, k)
    names = [_shard_names(i) for i in range(len(queries.shards))]
    missing = [i for i, pair in enumerate(names) if stage.missing(pair)]
    done = sum(len(ids) for i, ids in enumerate(queries.shards) if i not in missing)
    with tqdm(total=len(queries), initial=done, desc="neighbours", unit="chunk") as progress:
        for i in missing:
            work.write(i, progress)
    ordered = [ids for ids, _ in names] + [scores for _, scores in names]
    return stage.finish(_facts(stage, names, work, len(queries), recall_queries), ordered)


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


class _Work:
    """Makes one shard of the table at a time.

    Queries that are the retrieval database's own chunks have keys on the disk; others are embedded.
    """

    def __init__(self, stage: Stage, queries: ChunkDatabase, retriever: Retriever, k: int) -> None:
        self._stage, self._queries, self._retriever, self._k = stage, queries, retriever, k
        self._own = queries.manifest.hash == retriever.database.manifest.hash
        self._same_document = _same_documents(queries, retriever.database)

    def write(self, index: int, progress: tqdm) -> None:
        """Makes and writes shard `index`."""
        shard = self._queries.shards[index]
        ids = np.empty((len(shard), self._k), np.int64)
        scores = np.empty(ids.shape, np.float32)
        count = 0
        blocks = grain.MapDataset.source(BlockSource(shard))
        for block, prepared in iterate(blocks.map(self._read)):
            queries = self._keys(prepared)
            rows = block - shard.start
            ids[rows], scores[rows] = self._retriever.search(queries, self._k, self._own_of(block))
            count += int((~np.isnan(queries[:, 0])).sum())
            progress.update(len(block))
        names = _shard_names(index)
        facts = {"queries": count, "filled": (ids >= 0).sum(0).tolist()}
        self._stage.write_array(names[1], scores)
        self._stage.write_array(names[0], ids, facts)

    def recall(self, table: list[np.ndarray], sample: int) -> dict[str, Any]:
        """How many of the true neighbours of some queries the table's scores hold."""
        total = len(self._queries)
        ids = np.sort(np.random.Generator(np.random.Philox(0)).permutation(total)[:sample])
        if not len(ids):
            return {"k": self._k, "queries": 0, "recall": 1.0}
        queries = self._keys(self._read(ids)[1])
        ids, queries = ids[~np.isnan(queries[:, 0])], queries[~np.isnan(queries[:, 0])]
        _, truth = self._retriever.exact(queries, self._k, self._own_of(ids))
        bounds = np.cumsum([0] + [len(shard) for shard in table])
        shards = np.searchsorted(bounds, ids, side="right") - 1
        held = [table[shard][i - bounds[shard]] for shard, i in zip(shards, ids, strict=True)]
        there = np.isfinite(truth).sum(1)
        # Scores are compared, not ids: of chunks at one distance, any is a true neighbour.
        furthest = np.where(np.isfinite(truth), truth, 0).max(1, initial=0)
        hits = (np.reshape(held, truth.shape) <= (furthest * (1 + 1e-5) + 1e-6)[:, None]).sum(1)
        share = float(np.minimum(hits, there).sum() / there.sum()) if there.sum() else 1.0
        return {"k": self._k, "queries": len(ids), "recall": share}

    def _read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | WordPieces]:
        """Chunk ids, and their stored keys or their word pieces; Grain's thread does this."""
        if self._own:
            return ids, self._retriever.keys.rows(ids)
        return ids, self._retriever.encoder.pieces(self._queries.chunks(ids))

    def _keys(self, prepared: np.ndarray | WordPieces) -> np.ndarray:
        """Queries [n, d] float32."""
        if isinstance(prepared, np.ndarray):
            return prepared
        return as_float32(self._retriever.encoder.stored(prepared)[0])

    def _own_of(self, ids: np.ndarray) -> np.ndarray:
        """The retrieval database's number of each chunk's own document; -1 if it is not there."""
        return self._same_document[self._queries.documents(ids)]


def _same_documents(queries: ChunkDatabase, database: ChunkDatabase) -> np.ndarray:
    """[documents of queries] int64: the number of the same document in the database, or -1."""
    if queries.manifest.hash == database.manifest.hash:
        return np.arange(database.num_documents)
    wanted = {(r.corpus, r.id): i for i, r in enumerate(queries.records())}
    numbers = np.full(len(wanted), -1, np.int64)
    for number, record in enumerate(database.records()):
        i = wanted.get((record.corpus, record.id))
        if i is not None:
            numbers[i] = number
    return numbers


def _facts(
    stage: Stage, names: list[tuple[str, str]], work: _Work, chunks: int, recall_queries: int
) -> dict[str, Any]:
    """What the manifest states, from the shards' facts and the table itself."""
    shards = [stage.shard_facts(ids) for ids, _ in names]
    count = sum(shard["queries"] for shard in shards)
    filled = [sum(slot) for slot in zip(*(shard["filled"] for shard in shards))]
    scores = [np.load(stage.directory / name, mmap_mode="r") for _, name in names]
    nearest = np.concatenate([np.empty(0), *(shard[:, 0] for shard in scores)])
    nearest = nearest[np.isfinite(nearest)]
    steps = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
    quantiles = np.quantile(nearest, steps) if len(nearest) else []
    return {
        "chunks": chunks,
        "queries": count,
        "filled": [slot / count if count else 0.0 for slot in filled],
        "nearest": {f"{step:g}": float(value) for step, value in zip(steps, quantiles)},
        "recall": work.recall(scores, recall_queries),
    }


def _shard_names(index: int) -> tuple[str, str]:
    """The two files of a shard: ids, and their scores."""
    return shard_name(IDS, index), shard_name(SCORES, index)
