"""BM25 over chunks: which chunks of a database share rare tokens with a query chunk.

A chunk's terms are its tokens without bos, eos and padding. The share of each term in each chunk's score
is computed once, by bm25s, and stored twice:

    scores.npy  places.npy  ends.npy     by term: for the chunks with it, to find the best chunks
    weights-00000.npy [n, 64] ...        by chunk, beside its tokens: to score given chunks

The first of these are for a query that asks the whole database, and are as many numbers as the database
has distinct tokens in its chunks; the second are read where they are needed only.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, Stage, shard_name
from data_pipelines.artefacts.sharded_rows import ShardedRows
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.retriever.candidates import Found, repeated
from data_pipelines.retriever.queries import QueryChunks
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "bm25"
WEIGHTS = "weights"
_BLOCK = 4096  # chunks read at once
_COUNTS = 1 << 24  # terms of queries that are counted at once
_SPARE = 8  # candidates beyond k: sums in another order round otherwise
_POSTINGS = ("chunk-ids.npy", "scores.npy", "places.npy", "ends.npy")


@dataclasses.dataclass(frozen=True)
class Bm25Config:
    """BM25's two numbers, in the form of it that Lucene has.

    Attributes:
      k1: how soon repetitions of a term stop adding to the score.
      b: how much the length of a chunk counts, 0 to 1.
    """

    k1: float = 1.5
    b: float = 0.75

    def __post_init__(self) -> None:
        require(self.k1 >= 0, self, "k1", "a number from 0")
        require(0 <= self.b <= 1, self, "b", "a share from 0 to 1")


def import_bm25s() -> Any:
    """The library, or a UserError where it is not installed."""
    try:
        import bm25s
    except ImportError:
        raise UserError(
            "NeighboursConfig.retriever needs the package bm25s: expected it installed"
            " (pip install retro-jax[data]), or the retriever 'dense'"
        ) from None
    return bm25s


def prepare_bm25(directory: Path, database: ChunkDatabase, config: Bm25Config) -> Manifest:
    """Computes the scores of all terms in all chunks of a database, in this process.

    Memory is about 50 bytes for each distinct token of each chunk.

    Args:
      directory: where they go.
      database: of some revision; what is removed, and chunks without terms, are left out.
      config: of BM25.

    Returns:
      The manifest. Facts: chunks (of the database), indexed, postings and mean_terms of a chunk.
    """
    import_bm25s()
    parents = {"database": (database.manifest, database.directory)}
    settings = dataclasses.asdict(config) | {"method": "lucene", "terms": "tokens"}
    stage = Stage(directory, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    names = [shard_name(WEIGHTS, i) for i in range(len(database.shards))]
    if stage.missing([*_POSTINGS, *names]):
        ids = _indexed(database)
        terms = _Terms(database, ids)
        scores, places, ends = _postings(terms, database, config)
        arrays = (ids, scores, places, ends)
        for name, array in zip(_POSTINGS, arrays, strict=True):
            stage.write_array(name, array)
        _write_weights(stage, names, database, arrays)
    postings = int(np.load(stage.directory / _POSTINGS[3], mmap_mode="r")[-1])
    count = len(np.load(stage.directory / _POSTINGS[0], mmap_mode="r"))
    facts = {"chunks": len(database), "indexed": count, "postings": postings}
    return stage.finish(facts, [*_POSTINGS, *names], revision=database.manifest.revision)


class Bm25:
    """The scores of a database's chunks, and a `search.ChunkSearch` by them.

    Attributes:
      directory, manifest: where they are from.
      database: the chunks.
    """

    def __init__(self, directory: Path, manifest: Manifest, database: ChunkDatabase) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.database = database
        names = manifest.shard_names(f"{WEIGHTS}-", ".npy")
        self._weights = ShardedRows([self.directory / name for name in names])

    @classmethod
    def open(cls, directory: Path, database: ChunkDatabase, *, verify: bool = False) -> "Bm25":
        """Opens them; `verify` hashes every file.

        Raises:
          UserError: none there, damaged, or those of another database.
        """
        parents = {"database": (database.manifest, database.directory)}
        return cls(directory, Manifest.open(directory, KIND, parents, verify), database)

    def __reduce__(self) -> tuple[Callable[..., "Bm25"], tuple[str, Manifest, ChunkDatabase]]:
        """Pickles by its place, so that worker processes map the files themselves."""
        return Bm25, (files.absolute(self.directory), self.manifest, self.database)

    @property
    def parts(self) -> Sequence[Any]:
        """As `ChunkSearch`: the whole database."""
        return [None]

    def parents(self) -> dict[str, tuple[Manifest, Path]]:
        """As `ChunkSearch`."""
        return {KIND: (self.manifest, self.directory)}

    def candidates(
        self, part: Any, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `ChunkSearch`."""
        return self.find(chunks, k, exclude)

    def merged(self, found: Sequence[Found], k: int) -> Found:
        """As `ChunkSearch`."""
        return found[0]

    def ranked(self, found: Found, chunks: QueryChunks, k: int) -> Found:
        """As `ChunkSearch`."""
        return found

    def find(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `ChunkSearch`."""
        return self.search(chunks.tokens, k, exclude)

    @property
    def truth_ranges(self) -> Sequence[range]:
        """As `ChunkSearch`: `truth` finds all."""
        return []

    def truth_within(
        self, ids: range, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `ChunkSearch`; there is no such range."""
        raise NotImplementedError

    def truth(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `ChunkSearch`: every chunk is scored."""
        return self.find(chunks, k, exclude)

    def scores_of(self, chunks: QueryChunks, found: np.ndarray) -> np.ndarray:
        """As `ChunkSearch`."""
        return self.score(chunks.tokens, found)

    def has_text(self, chunks: QueryChunks) -> np.ndarray:
        """As `ChunkSearch`."""
        return self.has_terms(chunks.tokens)

    def has_terms(self, tokens: np.ndarray) -> np.ndarray:
        """[n] bool: which of the chunks [n, 64] have anything to search for."""
        return np.asarray(_is_term(tokens, self.database).any(1))

    def score(self, tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The scores of given chunks.

        Args:
          tokens: [n, 64] of the queries; each counts as often as it occurs.
          ids: [n, k] chunks of the database; -1 for none.

        Returns:
          [n, k] float32; minus infinity for none.
        """
        most = max(1, _COUNTS // self.database.vocab_size)
        parts = [slice(first, first + most) for first in range(0, len(tokens), most)]
        scores = [self._score(tokens[part], ids[part]) for part in parts]
        return np.concatenate(scores) if scores else np.zeros(ids.shape, np.float32)

    def _score(self, tokens: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """As `score`, for so few queries that a count of every term fits into memory."""
        counts = np.zeros((len(tokens), self.database.vocab_size + 1), np.float32)
        terms = np.where(_is_term(tokens, self.database), tokens, self.database.vocab_size)
        np.add.at(counts, (np.arange(len(tokens))[:, None], terms), 1)
        counts[:, -1] = 0
        flat = np.maximum(ids.ravel(), 0)
        weights = np.empty((flat.size, CHUNK_LENGTH), np.float32)
        self._weights.gather(flat, weights)
        found = np.minimum(self.database.chunks(flat), self.database.vocab_size)
        rows = np.repeat(np.arange(len(tokens)), ids.shape[1])
        sums = np.einsum("nm,nm->n", weights.astype(np.float64), counts[rows[:, None], found])
        return np.where(ids >= 0, sums.reshape(ids.shape), -np.inf).astype(np.float32)

    def best_of(self, tokens: np.ndarray, ids: np.ndarray, k: int) -> Found:
        """The k best [n, k] of candidates [n, m] by their scores, and these; equal ones by id."""
        scores = self.score(tokens, ids)
        order = np.lexsort((ids, -scores), axis=-1)[:, :k]
        ids, scores = (np.take_along_axis(part, order, axis=1) for part in (ids, scores))
        missing = ((0, 0), (0, k - ids.shape[1]))
        scores = np.pad(scores, missing, constant_values=-np.inf)
        return np.pad(ids, missing, constant_values=-1), scores

    def search(
        self,
        tokens: np.ndarray,
        k: int,
        exclude_documents: np.ndarray | None = None,
        among: np.ndarray | None = None,
    ) -> Found:
        """Finds the k best chunks of the whole database.

        Args:
          tokens: [n, 64] of the queries.
          k: how many.
          exclude_documents: [n] numbers of the database's documents to leave out; -1 for none.
          among: [chunks of the database] bool, those to choose from; None for all.

        Returns:
          Chunk ids [n, k] int64 and scores [n, k] float32, descending (equal ones by id); -1 and minus
          infinity where no further chunk has a token of the query.
        """
        if k < 1:
            raise UserError(f"k is {k}: expected at least one neighbour")
        found = (np.full((len(tokens), k), -1), np.full((len(tokens), k), -np.inf, np.float32))
        terms = _is_term(tokens, self.database)
        for row in np.flatnonzero(terms.any(1)).tolist():
            owner = -1 if exclude_documents is None else int(exclude_documents[row])
            ids = self._candidates(tokens[row][terms[row]], k, owner, among)
            query = tokens[row : row + 1]
            for every, best in zip(found, self.best_of(query, ids[None], k)):
                every[row] = best[0]
        return found

    def _candidates(
        self, terms: np.ndarray, k: int, exclude: int, among: np.ndarray | None
    ) -> np.ndarray:
        """Ids of some more chunks than the k best for one query, in any order."""
        index, ids, documents = self._loaded
        scores = index.get_scores_from_ids(terms.tolist())
        first, last = np.searchsorted(documents, (exclude, exclude + 1)) if exclude >= 0 else (0, 0)
        scores[first:last] = 0
        if among is not None:
            scores[~among[ids]] = 0
        least = 0.0
        if len(scores) > k + _SPARE:
            least = float(np.partition(scores, -k - _SPARE)[-k - _SPARE])
        return ids[np.flatnonzero((scores >= least) & (scores > 0))]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, np.ndarray, np.ndarray]:
        """bm25s over mapped files, the ids of its chunks, and the document of each, ascending."""
        ids, scores, places, ends = (
            np.load(self.directory / name, mmap_mode="r") for name in _POSTINGS
        )
        settings = self.manifest.settings
        index = _library(Bm25Config(settings["k1"], settings["b"]))
        index.scores = {"data": scores, "indices": places, "indptr": ends, "num_docs": len(ids)}
        index.nonoccurrence_array = None
        return index, np.asarray(ids), self.database.documents(ids)


def _library(config: Bm25Config) -> Any:
    """The library's own object."""
    return import_bm25s().BM25(k1=config.k1, b=config.b, method="lucene")


def _is_term(tokens: np.ndarray, database: ChunkDatabase) -> np.ndarray:
    """[...] bool: which tokens are searched for."""
    return ~np.isin(tokens, (database.pad_id, database.bos_id, database.eos_id))


def _indexed(database: ChunkDatabase) -> np.ndarray:
    """[n] int64 ids of the chunks that have terms and are not removed."""
    parts = [np.zeros(0, np.int64)]
    for first in range(0, len(database), _BLOCK):
        ids = np.arange(first, min(first + _BLOCK, len(database)))
        there = ~database.is_removed(database.documents(ids))
        parts.append(ids[there & _is_term(database.chunks(ids), database).any(1)])
    return np.concatenate(parts)


class _Terms(Sequence[list[int]]):
    """The terms of chunks as the library reads them, which goes through them several times."""

    def __init__(self, database: ChunkDatabase, ids: np.ndarray) -> None:
        self._database, self._ids = database, ids

    def __len__(self) -> int:
        """Chunks."""
        return len(self._ids)

    def __getitem__(self, index: Any) -> Any:
        """The terms of one chunk."""
        tokens = self._database.chunks(self._ids[index])
        return tokens[_is_term(tokens, self._database)].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """The terms of each, read in blocks."""
        for first in range(0, len(self._ids), _BLOCK):
            rows = self._database.chunks(self._ids[first : first + _BLOCK])
            for row, mask in zip(rows, _is_term(rows, self._database)):
                yield row[mask].tolist()


def _postings(
    terms: _Terms, database: ChunkDatabase, config: Bm25Config
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, places of their chunks among the indexed ones, and where each term's end."""
    if not len(terms):
        return (
            np.zeros(0, np.float32),
            np.zeros(0, np.int32),
            np.zeros(database.vocab_size + 1, int),
        )
    built = _library(config).build_index_from_ids(
        list(range(database.vocab_size)), terms, show_progress=False
    )
    return built["data"], built["indices"], np.asarray(built["indptr"], np.int64)


def _write_weights(
    stage: Stage, names: Sequence[str], database: ChunkDatabase, arrays: Sequence[np.ndarray]
) -> None:
    """Writes the postings once more by chunk: beside the first of equal tokens its score, else 0."""
    ids, scores, places, ends = arrays
    size = database.vocab_size
    keys = ids[places] * size + np.repeat(np.arange(size), np.diff(ends))
    order = np.argsort(keys)
    keys = np.append(keys[order], -1)  # so that every search has a place
    scores = np.append(scores[order], np.float32(0))
    for name, shard in zip(names, database.shards, strict=True):
        weights = np.zeros((len(shard), CHUNK_LENGTH), np.float32)
        for first in range(0, len(shard), _BLOCK):
            chunks = np.arange(shard.start + first, min(shard.start + first + _BLOCK, shard.stop))
            tokens = database.chunks(chunks)
            codes = chunks[:, None] * size + tokens
            positions = np.searchsorted(keys[:-1], codes)
            mask = (keys[positions] == codes) & _is_term(tokens, database) & ~repeated(tokens)
            weights[first : first + len(chunks)] = np.where(mask, scores[positions], 0)
        stage.write_array(name, weights)
