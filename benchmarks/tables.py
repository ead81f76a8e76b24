"""Artefacts of random content for benchmarks: a chunk database and a neighbour table on disk."""

import itertools
import pathlib

import numpy as np

from data_pipelines.artefacts.manifest import shard_name
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.retriever.neighbour_table import NeighbourTable

_DOCUMENT = 20  # chunks a document


def write_database(
    folder: pathlib.Path, chunks: int, shards: int, vocab_size: int = 32_000
) -> ChunkDatabase:
    """A chunk database of random tokens, without the documents' records."""
    vocabulary = {"vocab_size": vocab_size, "pad_id": 0, "bos_id": 1, "eos_id": 2}
    stage = Stage(folder, "chunks", {"chunk_length": CHUNK_LENGTH, **vocabulary})
    rng = np.random.default_rng(0)
    dtype = np.uint16 if vocab_size < 1 << 16 else np.uint32
    bounds = np.linspace(0, chunks, shards + 1).astype(int).tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        tokens = rng.integers(3, vocab_size, (end - start, CHUNK_LENGTH), dtype)
        stage.write_array(shard_name("chunks", i), tokens)
        owners = np.arange(start, end, dtype=np.int32) // _DOCUMENT
        stage.write_array(shard_name("documents", i), owners)
    facts = {
        "documents": -(-chunks // _DOCUMENT),
        "shards": [end - start for start, end in itertools.pairwise(bounds)],
        "corpora": {"random": {"ranges": [[0, chunks]]}},
    }
    stage.finish(facts)
    return ChunkDatabase.open(folder)


def write_table(folder: pathlib.Path, database: ChunkDatabase, k: int) -> NeighbourTable:
    """A neighbour table of random ids."""
    parent = (database.manifest, database.directory)
    settings = {"k": k, "score": "squared_l2"}
    stage = Stage(folder, "neighbours", settings, {"chunks": parent, "database": parent})
    rng = np.random.default_rng(1)
    for i, ids in enumerate(database.shards):
        table = rng.integers(0, len(database), (len(ids), k))
        stage.write_array(shard_name("neighbours", i), table)
        stage.write_array(shard_name("scores", i), np.zeros(table.shape, np.float32))
    stage.finish()
    return NeighbourTable.open(folder, database, database)
