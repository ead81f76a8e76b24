"""Keys and neighbour tables of a compaction: copied and renumbered, nothing is searched again.

A table of the newest revision has no removed neighbour, and chunks keep their distances, so the same
rows with other ids are the table of the compaction. Its recall is what was measured before.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.compacted import CompactionPlan
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.keys import KIND, Keys
from data_pipelines.retriever.neighbour_table import IDS, SCORES, NeighbourTable
from data_pipelines.retriever.neighbours import table_parents
from data_pipelines.retriever.queries import Queries, chunks_of
from data_pipelines.retriever.retriever import Retriever
from retro_jax.errors import UserError
from retro_jax.storage import files


class NewIds:
    """The ids that the chunks of a database have in its compaction."""

    def __init__(self, database: ChunkDatabase) -> None:
        """Takes the old database: a compaction has its corpora one after the other."""
        ranges = [part for name in sorted(database.corpora) for part in database.corpora[name]]
        old = np.array([(part.start, part.stop) for part in ranges], np.int64).reshape(-1, 2)
        self._starts, self._stops = old.T
        self._firsts = np.cumsum([0, *(self._stops - self._starts)])
        order = np.argsort(self._starts)
        self._sorted = self._starts[order], self._stops[order], self._firsts[:-1][order]

    def __len__(self) -> int:
        """Chunks of the compaction."""
        return int(self._firsts[-1])

    def new(self, old: np.ndarray) -> np.ndarray:
        """[...] int64: the new ids of old ones [...]; -1 for -1.

        Raises:
          UserError: one was removed.
        """
        starts, stops, firsts = self._sorted
        place = np.maximum(np.searchsorted(starts, old, side="right") - 1, 0)
        gone = (old >= 0) & ((old < starts[place]) | (old >= stops[place]))
        if gone.any():
            raise UserError(f"chunk {old[gone][0]} was removed: expected it in no table any more")
        return np.where(old < 0, -1, firsts[place] + old - starts[place])

    def old(self, new: np.ndarray) -> np.ndarray:
        """[n] int64: the old ids of new ones [n]."""
        place = np.searchsorted(self._firsts, new, side="right") - 1
        return self._starts[place] + new - self._firsts[place]


def compact_keys(
    directory: Path,
    chunks: ChunkDatabase,
    keys: Keys,
    plan_file: Path,
    *,
    runner: Runner = InProcess(),
) -> Manifest:
    """Copies the keys of the chunks of a plan, bit for bit.

    Args:
      directory: where they go.
      chunks: what `compact_chunks` wrote.
      keys: of the old database.
      plan_file: of the plan.
      runner: where shards are written.
    """
    parents = {"chunks": (chunks.manifest, chunks.directory)}
    stage = Stage(directory, KIND, keys.manifest.settings, parents)
    if stage.done:
        return stage.manifest()
    names = [shard_name(KIND, i) for i in range(len(chunks.shards))]
    missing = [i for i, name in enumerate(names) if stage.missing([name])]
    work = CopyKeys(files.absolute(directory), keys, files.absolute(plan_file))
    sizes = [len(ids) for ids in chunks.shards]
    run_counted(runner, work, missing, sizes, what="keys", unit="chunk")
    count = sum(stage.shard_facts(name) for name in names)
    facts = {"chunks": len(chunks), "dimension": keys.dimension, "keys": count}
    return stage.finish(facts, names)


@dataclasses.dataclass(frozen=True)
class CopyKeys:
    """Writes one shard of keys; the fields are those of `compact_keys`."""

    directory: str
    keys: Keys
    plan_file: str

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its rows."""
        plan, stage = CompactionPlan.read(self.plan_file), Stage.attach(self.directory)
        ids = plan.chunk_ids(plan.shards[index])
        count = int((~np.isnan(self.keys.rows(ids)[:, 0])).sum())
        stage.write_array(shard_name(KIND, index), self.keys.stored(ids), facts=count)
        report(len(ids))
        return len(ids)


def compact_table(
    directory: Path,
    queries: Queries,
    retriever: Retriever,
    base: NeighbourTable,
    old: ChunkDatabase,
    *,
    runner: Runner = InProcess(),
) -> Manifest:
    """Renumbers a split's table against the revision that was compacted.

    Args:
      directory: where it goes.
      queries: the split's chunks: of the training split, the compaction's.
      retriever: the compaction.
      base: the old table. old: the database that it points into.
      runner: where shards are written.
    """
    chunks = chunks_of(queries)
    parents = table_parents(queries, retriever, base)
    stage = Stage(directory, base.manifest.kind, base.manifest.settings, parents)
    if stage.done:
        return stage.manifest()
    is_database = chunks.manifest.hash == retriever.database.manifest.hash
    pairs = [(shard_name(IDS, i), shard_name(SCORES, i)) for i in range(len(chunks.shards))]
    missing = [i for i, pair in enumerate(pairs) if stage.missing(pair)]
    work = CopyTable(files.absolute(directory), chunks, base, NewIds(old), is_database)
    sizes = [len(ids) for ids in chunks.shards]
    run_counted(runner, work, missing, sizes, what="neighbours", unit="chunk")
    facts = base.manifest.facts | {"chunks": len(chunks), "database": len(retriever.database)}
    ordered = [ids for ids, _ in pairs] + [scores for _, scores in pairs]
    return stage.finish(facts, ordered, revision=retriever.database.manifest.revision)


@dataclasses.dataclass(frozen=True)
class CopyTable:
    """Writes one shard of a table.

    Attributes:
      directory, base: as for `compact_table`.
      chunks: of the queries.
      ids: old and new ones.
      is_database: whether the queries are the database itself, so that its rows move too.
    """

    directory: str
    chunks: ChunkDatabase
    base: NeighbourTable
    ids: NewIds
    is_database: bool

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its rows."""
        stage, rows = Stage.attach(self.directory), np.array(self.chunks.shards[index], np.int64)
        old = self.ids.old(rows) if self.is_database else rows
        stage.write_array(shard_name(SCORES, index), self.base.scores(old))
        stage.write_array(shard_name(IDS, index), self.ids.new(self.base.ids(old)))
        report(len(rows))
        return len(rows)
