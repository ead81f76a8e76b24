"""Keys that no model computed: the tokens of each chunk, projected at random. For runs at size.

    python -m benchmarks.projected_keys --keys_workdir=W [--dimensions=384]

A key is the sum of a random direction for each different token of the chunk, of length 1. Rare tokens count
more: 1 / sqrt(share of chunks that have it). Chunks that share rare tokens are near, which is less than
a model sees, but keys have the same bytes, shapes and machinery. W/keys gets them as keys that were given.
"""

import pathlib

import numpy as np
from absl import app, flags
from scipy import sparse

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.retriever.given_keys import write_given_keys

NAME = "projected"
_WORKDIR = flags.DEFINE_string("keys_workdir", None, "W with chunks.")
_DIMENSIONS = flags.DEFINE_integer("dimensions", 384, "Of a key.", lower_bound=1)
_SAMPLE = 100_000  # chunks that say how rare a token is
_BLOCK = 8192


class Projected:
    """[n, d] keys of the chunks of a database, computed when they are read.

    Attributes:
      shape: (n, d).
    """

    def __init__(self, database: ChunkDatabase, directions: np.ndarray) -> None:
        """`directions` [V, d] of the tokens, with their weights."""
        self._database, self._directions = database, directions
        self.shape = (len(database), directions.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        """[m, d] float32; NaN for a chunk without text."""
        parts = [np.zeros((0, self.shape[1]), np.float32)]
        for first in range(rows.start, rows.stop, _BLOCK):
            ids = np.arange(first, min(first + _BLOCK, rows.stop))
            parts.append(
                counted(self._database.chunks(ids), len(self._directions)) @ self._directions
            )
        keys = np.concatenate(parts)
        lengths = np.linalg.norm(keys, axis=1, keepdims=True)
        return np.divide(keys, lengths, out=np.full_like(keys, np.nan), where=lengths > 0)


def counted(tokens: np.ndarray, vocabulary: int) -> sparse.csr_array:
    """[n, V] 1 for each token that a chunk [n, 64] has."""
    ends = np.arange(len(tokens) + 1) * tokens.shape[1]
    ones = np.ones(tokens.size, np.float32)
    shape = (len(tokens), vocabulary)
    counts = sparse.csr_array((ones, np.minimum(tokens, vocabulary - 1).ravel(), ends), shape)
    counts.sum_duplicates()
    counts.data[:] = 1
    return counts


def directions_of(database: ChunkDatabase, dimensions: int) -> np.ndarray:
    """[V, d] float32 random directions, of tokens without text zero."""
    vocabulary = max(database.vocab_size, database.pad_id + 1)
    ids = np.unique(np.linspace(0, len(database) - 1, _SAMPLE).astype(np.int64))
    shares = np.asarray(counted(database.chunks(ids), vocabulary).sum(axis=0)).ravel() / len(ids)
    weights = 1 / np.sqrt(np.maximum(shares, 1 / len(ids)))
    weights[[database.pad_id, database.bos_id, database.eos_id]] = 0
    directions = np.random.default_rng(0).standard_normal((vocabulary, dimensions), np.float32)
    return directions * (weights[:, None] / np.sqrt(dimensions)).astype(np.float32)


def main(_: list[str]) -> None:
    """Writes the keys of all splits."""
    if _WORKDIR.value is None:
        raise app.UsageError("--keys_workdir is missing: expected a workdir with chunks")
    workdir = pathlib.Path(_WORKDIR.value)
    databases = {split: ChunkDatabase.open(workdir / "chunks" / split) for split in SPLITS}
    directions = directions_of(databases["train"], _DIMENSIONS.value)
    vectors = {split: Projected(database, directions) for split, database in databases.items()}
    write_given_keys(workdir, vectors, name=NAME)


if __name__ == "__main__":
    app.run(main)
