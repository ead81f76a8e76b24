"""The neighbour table: for each chunk of a split, its nearest chunks in the retrieval database.

The retrieval database is made of training documents. A chunk is never given a neighbour of its own
document: corpus and id identify a document, so that this is true of every split.

The table of a database that was updated is made from the one before: of its rows, neighbours that were
removed go, what the new index shards find comes in, and only rows that lost a neighbour are searched
for anew.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.artefacts import mapped_arrays
from data_pipelines.artefacts.manifest import Manifest, Parents, Path
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted
from data_pipelines.artefacts.stage import Stage
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.neighbour_facts import facts_of
from data_pipelines.retriever.neighbour_shards import FindShard, NeighbourShard, VisitShard
from data_pipelines.retriever.neighbour_table import KIND, NeighbourTable, shard_names
from data_pipelines.retriever.queries import OwnDocuments, Queries, chunks_of
from data_pipelines.retriever.retriever import RETRIEVERS, Ranking, Retriever
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

_MOST_SEARCHES = 20_000  # searches of an index shard for some query shards, each of which is a task


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

    def check_scored(self, needed: Mapping[str, int]) -> None:
        """Refuses, before anything is made, tables that are too small for what will be scored.

        Args:
          needed: neighbours a chunk by split.

        Raises:
          UserError: a table would have fewer; names its field.
        """
        for split, count in needed.items():
            if count > getattr(self, split):
                raise UserError(
                    f"NeighboursConfig.{split} is {getattr(self, split)}: expected at least {count},"
                    " as many neighbours as are scored"
                )


def prepare_neighbours(
    directory: Path,
    queries: Queries,
    retriever: Retriever,
    *,
    k: int,
    recall_queries: int,
    base: NeighbourTable | None = None,
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
    names = [shard_names(i) for i in range(len(chunks.shards))]
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
    facts = facts_of(stage, names, work, recall_queries, runner)
    return stage.finish(facts, ordered, revision=retriever.database.manifest.revision)


def _find_candidates(
    work: NeighbourShard, missing: Sequence[int], sizes: Sequence[int], runner: Runner
) -> None:
    """Searches every index shard for the chunks that visit it."""
    if work.routed:
        unknown = [q for q in missing if not mapped_arrays.there(work.visited_path(q), 1)]
        run_counted(runner, VisitShard(work), unknown, sizes, what="routes", unit="chunk")
    groups, parts = work.groups, range(len(work.retriever.search.parts))
    wanted = sorted({work.group_of(q) for q in missing})
    pairs = [(s, g) for s in parts for g in wanted if work.asks(s, groups[g])]
    searches = [i for i, (s, g) in enumerate(pairs) if not work.has_found(s, g)]
    # Of all chunks a share visits each part; summed first, so that the total is that of the visits.
    until = np.cumsum([sum(sizes[q] for q in groups[g]) for _, g in pairs], dtype=np.int64)
    of_pairs = np.diff(until * work.visits // len(parts), prepend=0).tolist()
    search = FindShard(work, tuple(pairs))
    run_counted(runner, search, searches, of_pairs, what="candidates", unit="chunk")


def table_parents(queries: Queries, retriever: Retriever, base: NeighbourTable | None) -> Parents:
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


def _check_alike(queries: Keys, keys: Keys) -> None:
    """Raises unless queries were made as the keys that they are compared with."""
    without = {"prefix": ""}  # of queries and of the database, which may differ
    if queries.manifest.settings | without != keys.manifest.settings | without:
        raise UserError(
            f"{queries.directory} and {keys.directory} do not belong together: expected keys of the"
            " same model and precision"
        )
