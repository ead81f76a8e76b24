"""What a neighbour table's manifest states: slots filled, distances, corpora, and the measured recall."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from data_pipelines.artefacts.runner import Runner
from data_pipelines.artefacts.sharded_rows import ShardedRows
from data_pipelines.artefacts.stage import Stage
from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.neighbour_shards import NeighbourShard
from data_pipelines.retriever.queries import Queries, StoredChunks
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.sampling import is_live, sample_live

_SOURCE_ROWS = 20_000  # that say how many neighbours belong to their query's corpus
_QUANTILE_ROWS = 10_000_000  # of a larger table every so many-th row


def facts_of(
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
        parts.append(rows[is_live(work.database, every), 0])
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
        "recall": _recall_of(work, scores, recall_queries, runner),
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


def _recall_of(
    work: NeighbourShard, table: ShardedRows, sample: int, runner: Runner
) -> dict[str, Any]:
    """How many of the true neighbours of some queries the table's scores contain."""
    ids = sample_live(work.database, sample)
    if not len(ids):
        return {"k": work.k, "queries": 0, "recall": None}
    search = work.retriever.search
    ids = ids[search.has_text(StoredChunks(work.queries, ids))]
    _, truth = _truth(work, ids, runner)
    table_scores = np.empty(truth.shape, np.float32)
    table.gather(ids, table_scores)
    by_terms = work.retriever.ranking.by_terms
    share = recall(table_scores, truth, by_terms) if np.isfinite(truth).any() else None
    return {"k": work.k, "queries": len(ids), "recall": share}


def _truth(work: NeighbourShard, ids: np.ndarray, runner: Runner) -> Found:
    """The true neighbours of some queries: every key is compared, a range of them by each worker."""
    search, chunks = work.retriever.search, StoredChunks(work.queries, ids)
    ranges = search.truth_ranges
    if runner.in_process or len(ranges) < 2:
        return search.truth(chunks, work.k, work.own.of(ids))
    of_range = TruthOfRange(work.queries, work.retriever, work.k, ids, work.own.of(ids))
    best: Found | None = None
    for _, found in runner.run(of_range, ranges):  # the result does not depend on their order
        best = search.merged([found] if best is None else [best, found], work.k)
    assert best is not None
    return search.ranked(best, chunks, work.k)


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
