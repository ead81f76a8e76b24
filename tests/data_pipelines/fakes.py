"""In-memory stand-ins for a chunk database and a neighbour table, filled at random."""

import dataclasses
import pathlib
import types

import numpy as np

M = 64


class FakeDatabase:
    """Documents of random lengths in named corpora; a corpus may lie in several ranges."""

    directory = pathlib.Path("fake/chunks/train")

    def __init__(self, layout, seed=0, pad_id=0, vocab_size=1000):
        """Lays out [(corpus, [chunks of each document])] one after the other.

        Every token of the database is another integer where the vocabulary is None, so that a test
        can tell which of them it sees.
        """
        rng = np.random.default_rng(seed)
        self.pad_id, self.vocab_size = pad_id, vocab_size
        self.manifest = types.SimpleNamespace(hash=f"{layout} {seed}")
        rows, documents, self.corpora, document = [], [], {}, 0
        for corpus, lengths in layout:
            first = len(rows)
            for chunks in lengths:
                tokens = (chunks - 1) * M + int(rng.integers(1, M + 1))
                row = np.full(chunks * M, pad_id, np.int64)
                start = (len(rows) + 1) * M
                numbered = np.arange(start, start + tokens)
                row[:tokens] = (
                    numbered if vocab_size is None else rng.integers(1, vocab_size, tokens)
                )
                rows += list(row.reshape(chunks, M))
                documents += [document] * chunks
                document += 1
            self.corpora.setdefault(corpus, []).append(range(first, len(rows)))
        self.rows = np.array(rows).reshape(-1, M).astype(np.int32)
        self.document_of = np.array(documents, np.int64)

    def __len__(self):
        return len(self.rows)

    def documents(self, ids):
        assert np.all((ids >= -1) & (ids < len(self)))
        return np.where(ids < 0, -1, self.document_of[ids])

    def value(self, i):
        """Chunk and continuation by definition, one chunk at a time."""
        if i < 0:
            return np.full(2 * M, self.pad_id, np.int32)
        follows = i + 1 < len(self) and self.document_of[i + 1] == self.document_of[i]
        nothing = np.full(M, self.pad_id, np.int32)
        return np.concatenate([self.rows[i], self.rows[i + 1] if follows else nothing])

    def values(self, ids):
        rows = [self.value(int(i)) for i in ids.ravel()]
        return np.array(rows, np.int32).reshape(*ids.shape, 2 * M)


@dataclasses.dataclass(frozen=True)
class FakeTable:
    """A neighbour table of random ids with unfilled slots at the end of rows."""

    table: np.ndarray
    manifest: types.SimpleNamespace
    directory: pathlib.Path = pathlib.Path("fake/neighbours/train")

    @classmethod
    def random(cls, database, retrieval, k, seed=0):
        rng = np.random.default_rng(seed)
        table = rng.integers(0, len(retrieval), (len(database), k))
        filled = rng.integers(0, k + 1, (len(database), 1))
        return cls.of(database, retrieval, np.where(np.arange(k) < filled, table, -1))

    @classmethod
    def of(cls, database, retrieval, table):
        parents = {"chunks": database.manifest.hash, "database": retrieval.manifest.hash}
        return cls(np.asarray(table, np.int64), types.SimpleNamespace(parents=parents))

    def __len__(self):
        return len(self.table)

    @property
    def k(self):
        return self.table.shape[1]

    def ids(self, chunk_ids, k):
        assert np.all((chunk_ids >= 0) & (chunk_ids < len(self)))
        assert k <= self.k
        return self.table[chunk_ids, :k]
