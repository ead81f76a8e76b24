"""Chunk databases and keys made of given numbers, without text, tokeniser or BERT."""

import json
import pathlib

import numpy as np

from data_pipelines.artefacts.manifest import shard_name
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.index import Index
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Retriever


def write_database(
    folder: pathlib.Path, chunks: list[int], *, names=None, shards: int = 1, seed: int = 0
) -> ChunkDatabase:
    """A database of documents with so many chunks each, of random tokens, cut into shards."""
    rng = np.random.default_rng(seed)
    names = names or [f"document-{d}" for d in range(len(chunks))]
    settings = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "vocab_size": 300, "seed": seed}
    stage = Stage(folder, "chunks", settings)
    lines, held, total, parts = [], [], 0, np.array_split(np.arange(len(chunks)), shards)
    for i, part in enumerate(parts):
        owners = np.repeat(part, [chunks[d] for d in part]).astype(np.int32)
        tokens = rng.integers(3, 300, (len(owners), 64)).astype(np.uint16)
        stage.write_array(shard_name("chunks", i), tokens)
        stage.write_array(shard_name("documents", i), owners)
        held.append(len(owners))
    for name, count in zip(names, chunks, strict=True):
        record = {"id": name, "corpus": "made", "first_chunk": total, "chunks": count}
        lines.append(json.dumps(record | {"bytes": 0, "words": 0, "lines": 0}) + "\n")
        total += count
    stage.write_file("documents.jsonl", lambda file: file.write("".join(lines).encode()))
    corpora = {"made": {"ranges": [[0, total]]}}
    stage.finish({"documents": len(chunks), "chunks": total, "shards": held, "corpora": corpora})
    return ChunkDatabase.open(folder)


def write_keys(folder: pathlib.Path, database: ChunkDatabase, vectors: np.ndarray) -> Keys:
    """Keys [n, d] of a database as the keys stage would write them; NaN rows have no text."""
    parents = {"chunks": (database.manifest, database.directory)}
    stage = Stage(folder, "keys", {"dtype": "float32", "embedder": {"model": "none"}}, parents)
    for i, ids in enumerate(database.shards):
        stage.write_array(shard_name("keys", i), vectors[ids.start : ids.stop].astype(np.float32))
    count = int((~np.isnan(vectors[:, 0])).sum())
    stage.finish({"chunks": len(vectors), "dimension": vectors.shape[1], "keys": count})
    return Keys.open(folder, database)


def retriever(folder: pathlib.Path, chunks: list[int], vectors: np.ndarray, **index) -> Retriever:
    """A retriever over given keys; it can search, but not embed. Exact without ScaNN by default."""
    index = {"kind": "exact"} | index
    database = write_database(folder / "chunks" / "train", chunks, shards=index.pop("shards", 1))
    keys = write_keys(folder / "keys" / "train", database, vectors)
    prepare_index(folder / "index", keys, IndexConfig(**index))
    return Retriever(Database(database, keys=keys, index=Index.open(folder / "index", keys)))


def clustered(n: int, dimension: int = 32, seed: int = 0) -> np.ndarray:
    """Vectors of length 1 around the same 100 centres, so that a tree has something to find."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(100, dimension))
    rows = centres[rng.integers(0, 100, n)] + 0.3 * rng.normal(size=(n, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nearest(queries, keys, k, forbidden=None):
    """Naive float64 search: distances [n, k] ascending, infinity where there are no more."""
    found = np.full((len(queries), k), np.inf)
    for i, query in enumerate(queries.astype(np.float64)):
        if np.isnan(query[0]):
            continue
        distances = ((keys.astype(np.float64) - query) ** 2).sum(1)
        distances[np.isnan(distances)] = np.inf
        if forbidden is not None:
            distances[forbidden[i]] = np.inf
        best = np.sort(distances)[:k]
        found[i, : len(best)] = best
    return found
