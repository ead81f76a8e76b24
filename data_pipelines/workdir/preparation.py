"""Settings of a preparation, and what both its stages and its updates do."""

import dataclasses
import pathlib
from collections.abc import Callable

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.artefacts.runner import Runner
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.batches.materialised import prepare_batches
from data_pipelines.batches.training_data import parents_of
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import TokenizerConfig
from data_pipelines.documents.documents import DocumentsConfig
from data_pipelines.leakage.near_documents import LeakageConfig
from data_pipelines.retriever import revisions
from data_pipelines.retriever.bm25 import Bm25Config
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.keys import Keys, KeysConfig
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.neighbours import NeighboursConfig, prepare_neighbours
from data_pipelines.retriever.prefixes import Prefixes
from data_pipelines.retriever.queries import Queries
from data_pipelines.retriever.retriever import Retriever


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Every setting of a preparation.

    Attributes:
      documents: the corpora and their splits.
      tokenizer, keys, index, bm25, neighbours: of the stages of these names.
      leakage: of the stages leakage and duplicates.
    """

    documents: DocumentsConfig
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    keys: KeysConfig = dataclasses.field(default_factory=KeysConfig)
    index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
    neighbours: NeighboursConfig = dataclasses.field(default_factory=NeighboursConfig)
    leakage: LeakageConfig = dataclasses.field(default_factory=LeakageConfig)
    bm25: Bm25Config = dataclasses.field(default_factory=Bm25Config)


@dataclasses.dataclass(frozen=True)
class Preparation:
    """One preparation of a workdir.

    Attributes:
      directory: W.
      config: every setting.
      runner: where shards are made.
      report: receives a line about each step.
    """

    directory: pathlib.Path
    config: PrepareConfig
    runner: Runner
    report: Callable[[str], object]


def prepare_table(
    p: Preparation, split: str, retriever: Retriever, base: NeighbourTable | None = None
) -> Manifest:
    """Finds the neighbours of a split's chunks in some revision of the database."""
    revision = retriever.database.manifest.revision
    queries = queries_of(p.directory, split, retriever)
    k = getattr(p.config.neighbours, split)
    return prepare_neighbours(
        revisions.folder_of(p.directory, revision) / "neighbours" / split,
        queries,
        retriever,
        k=k,
        recall_queries=p.config.neighbours.recall_queries,
        base=base if base is not None and base.k == k and base.score == "squared_l2" else None,
        runner=p.runner,
    )


def queries_of(directory: pathlib.Path, split: str, retriever: Retriever) -> Queries:
    """The chunks of a split as a retriever is asked for their neighbours."""
    # The training split is the database, whose revision may have more chunks.
    if not retriever.ranking.by_keys:
        chunks = directory / "chunks" / split
        return retriever.database if split == "train" else ChunkDatabase.open(chunks)
    embedder = retriever.keys.manifest.settings["embedder"]
    if split == "train" and Prefixes.recorded(embedder).differ:
        return revisions.open_keys(retriever.database, directory, place=revisions.QUERY_KEYS)
    return retriever.keys if split == "train" else open_keys(directory, split)


def materialise(directory: pathlib.Path, config: BatchConfig, steps: int, runner: Runner) -> str:
    """Writes W/materialised, or what is missing of it; returns a line about it."""
    database, table = revisions.open_database(directory), None
    if config.neighbours:
        table = NeighbourTable.of(directory, "train", database, database)
    manifest = prepare_batches(
        directory / "materialised",
        config,
        database,
        table,
        steps=steps,
        lineage=parents_of(directory, database, table),
        runner=runner,
    )
    size = sum(shard.size for shard in manifest.shards)
    return f"{manifest.fact('rows'):,} sequences of {steps:,} steps, {size / 1e6:,.1f} MB"


def open_keys(directory: pathlib.Path, split: str) -> Keys:
    """The keys of a split's chunks; those of "queries" are of the training split's."""
    chunks = ChunkDatabase.open(directory / "chunks" / ("train" if split == "queries" else split))
    return Keys.open(directory / "keys" / split, chunks)
