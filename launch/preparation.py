"""Settings of a preparation, and what both its stages and its updates do."""

import dataclasses
import pathlib

from data_pipelines import revisions
from data_pipelines.chunk_database import ChunkDatabase
from data_pipelines.documents import DocumentsConfig
from data_pipelines.index import IndexConfig
from data_pipelines.keys import Keys, KeysConfig
from data_pipelines.manifest import Manifest
from data_pipelines.neighbours import NeighboursConfig, NeighbourTable, prepare_neighbours
from data_pipelines.retriever import Retriever
from data_pipelines.runner import Runner
from data_pipelines.tokenizer import TokenizerConfig


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Where, and every setting.

    Attributes:
      directory: W.
      runner: where shards are made.
    """

    directory: pathlib.Path
    documents: DocumentsConfig
    tokenizer: TokenizerConfig
    keys: KeysConfig
    index: IndexConfig
    neighbours: NeighboursConfig
    runner: Runner


def prepare_table(
    p: Preparation, split: str, retriever: Retriever, base: NeighbourTable | None = None
) -> Manifest:
    """Finds the neighbours of a split's chunks in some revision of the database."""
    revision = retriever.database.manifest.revision
    # The training split is the database, whose revision may have more chunks.
    queries = retriever.keys if split == "train" else open_keys(p.directory, split)
    k = getattr(p.neighbours, split)
    return prepare_neighbours(
        revisions.folder_of(p.directory, revision) / "neighbours" / split,
        queries,
        retriever,
        k=k,
        recall_queries=p.neighbours.recall_queries,
        base=base if base is not None and base.k == k else None,
        runner=p.runner,
    )


def open_keys(directory: pathlib.Path, split: str) -> Keys:
    """The keys of a split's chunks."""
    chunks = ChunkDatabase.open(directory / "chunks" / split)
    return Keys.open(directory / "keys" / split, chunks)
