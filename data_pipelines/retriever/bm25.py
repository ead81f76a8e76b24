"""BM25 over chunks: which chunks of a database share rare tokens with a query chunk.

A chunk's terms are its tokens without bos, eos and padding. The share of each term in each chunk's score
is computed once, and stored twice:

    places-00000.npy scores-00000.npy ...    by term, for a range of chunks: postings.py
    weights-00000.npy [n, 64] ...            by chunk, beside its tokens: to score given chunks

The first of these are for a query that asks the whole database. The second are read where they are
needed only.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.sharded_rows import ShardedRows
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.retriever import postings
from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.postings import PostingPart, TermCounts, is_term
from data_pipelines.retriever.queries import QueryChunks
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "bm25"
WEIGHTS = "weights"
PART_CHUNKS = 1 << 18  # of a part of the posting lists, which one worker builds and one search maps
_COUNTS = 1 << 24  # terms of queries that are counted at once
_TERM_COUNTS = "counts.npy"


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


def prepare_bm25(
    directory: Path,
    database: ChunkDatabase,
    config: Bm25Config,
    *,
    runner: Runner = InProcess(),
    part_chunks: int = PART_CHUNKS,
) -> Manifest:
    """Computes the scores of all terms in all chunks of a database, one part of it after the other.

    A worker's memory is about 50 bytes for each distinct token of each chunk of its part.

    Args:
      directory: where they go.
      database: of some revision; what is removed, and chunks without terms, are left out.
      config: of BM25.
      runner: where parts are made; the bytes do not depend on it.
      part_chunks: of a part, at most, but for a single shard with more.

    Returns:
      The manifest. Facts: chunks (of the database), indexed, postings, and the parts' first chunks.
    """
    parents = {"database": (database.manifest, database.directory)}
    settings = dataclasses.asdict(config) | {"method": "lucene", "terms": "tokens"}
    if part_chunks != PART_CHUNKS:  # what was begun with other parts is not gone on with
        settings["part_chunks"] = part_chunks
    stage = Stage(directory, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    parts = _parts(database, part_chunks)
    counts = _term_counts(stage, database, runner)
    work = _BuildPart(files.absolute(directory), database, config, counts, parts)
    missing = [p for p in range(len(parts)) if stage.missing(work.names(p))]
    sizes = [sum(len(database.shards[s]) for s in part) for part in parts]
    run_counted(runner, work, missing, sizes, what="bm25", unit="chunk")
    names = [name for p in range(len(parts)) for name in work.names(p)]
    of_parts = [stage.shard_facts(shard_name("ends", p))["postings"] for p in range(len(parts))]
    facts = {
        "chunks": len(database),
        "indexed": counts.indexed,
        "postings": sum(of_parts),
        "parts": [database.shards[part[0]].start for part in parts],
    }
    return stage.finish(facts, [_TERM_COUNTS, *names], revision=database.manifest.revision)


def _parts(database: ChunkDatabase, part_chunks: int) -> list[range]:
    """The parts of the posting lists, each a range of the database's shards."""
    parts: list[range] = []
    for number, ids in enumerate(database.shards):
        if parts and ids.stop - database.shards[parts[-1].start].start <= part_chunks:
            parts[-1] = range(parts[-1].start, number + 1)
        else:
            parts.append(range(number, number + 1))
    return parts


def _term_counts(stage: Stage, database: ChunkDatabase, runner: Runner) -> TermCounts:
    """Counts the database's terms, or reads what was counted."""
    if stage.missing([_TERM_COUNTS]):
        total = TermCounts(np.zeros(database.vocab_size, np.int64), 0, 0)
        for _, part in runner.run(_CountShard(database), range(len(database.shards))):
            total += part
        facts = {"indexed": total.indexed, "terms": total.terms}
        stage.write_array(_TERM_COUNTS, total.containing, facts)
    facts = stage.shard_facts(_TERM_COUNTS)
    containing = np.load(stage.directory / _TERM_COUNTS)
    return TermCounts(containing, facts["indexed"], facts["terms"])


@dataclasses.dataclass(frozen=True)
class _CountShard:
    """Counts the terms of one shard."""

    database: ChunkDatabase

    def __call__(self, index: int) -> TermCounts:
        """Of shard `index`."""
        return postings.count_terms(self.database, self.database.shards[index])


@dataclasses.dataclass(frozen=True)
class _BuildPart:
    """Writes the posting lists of a part, and the weights of its shards.

    Attributes:
      directory: of the stage. database, config: as for `prepare_bm25`.
      counts: of the whole database. parts: ranges of its shards.
    """

    directory: str
    database: ChunkDatabase
    config: Bm25Config
    counts: TermCounts
    parts: Sequence[range]

    def names(self, index: int) -> list[str]:
        """Files of part `index`."""
        lists = [shard_name(name, index) for name in postings.POSTINGS]
        return lists + [shard_name(WEIGHTS, shard) for shard in self.parts[index]]

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes those of part `index`."""
        stage = Stage.attach(self.directory)
        every = []
        for shard in self.parts[index]:
            ids = self.database.shards[shard]
            weights = np.zeros((len(ids), CHUNK_LENGTH), np.float32)
            for first, rows in postings.term_rows(self.database, ids):
                place = first - ids.start
                scores = self.counts.scores(rows, self.config.k1, self.config.b)
                weights[place : place + len(scores)] = scores
                report(len(scores))
            stage.write_array(shard_name(WEIGHTS, shard), weights)
            every.append(postings.entries(self.database, ids, weights))
        first = self.database.shards[self.parts[index][0]].start
        lists = postings.posting_lists(every, first, self.database.vocab_size)
        facts = {"postings": len(lists[0])}
        for name, array in zip(postings.POSTINGS, lists, strict=True):
            stage.write_array(shard_name(name, index), array, facts)
        return len(lists[0])


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
        firsts = manifest.facts.get("parts")
        if firsts is None:  # from before there were parts
            read = functools.partial(postings.lists_without_parts, self.directory)
            self._parts = [PostingPart(read, range(len(database)), database)]
            return
        bounds = [*firsts, len(database)]
        self._parts = [
            PostingPart(
                functools.partial(postings.mapped_lists, self.directory, p),
                range(*bounds[p : p + 2]),
                database,
            )
            for p in range(len(firsts))
        ]

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
    def parts(self) -> Sequence[PostingPart]:
        """As `ChunkSearch`: ranges of chunks with posting lists of their own."""
        return self._parts

    def parents(self) -> dict[str, tuple[Manifest, Path]]:
        """As `ChunkSearch`."""
        return {KIND: (self.manifest, self.directory)}

    def candidates(
        self, part: Any, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None
    ) -> Found:
        """As `ChunkSearch`."""
        return self._search([part], chunks.tokens, k, exclude)

    def merged(self, found: Sequence[Found], k: int) -> Found:
        """As `ChunkSearch`."""
        ids = np.concatenate([part[0] for part in found], axis=1)
        scores = np.concatenate([np.where(part[0] < 0, -np.inf, part[1]) for part in found], axis=1)
        return _best(ids, scores.astype(np.float32), k)

    def ranked(self, found: Found, chunks: QueryChunks, k: int) -> Found:
        """As `ChunkSearch`."""
        return self.merged([found], k)

    def find(self, chunks: QueryChunks, k: int, exclude: np.ndarray | None = None) -> Found:
        """As `ChunkSearch`."""
        return self.search(chunks.tokens, k, exclude)

    def containing(self) -> np.ndarray:
        """[V] int64: how many chunks contain each term."""
        return np.asarray(sum(part.lengths() for part in self._parts), np.int64)

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
        return np.asarray(is_term(tokens, self.database).any(1))

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
        terms = np.where(is_term(tokens, self.database), tokens, self.database.vocab_size)
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
        return _best(ids, self.score(tokens, ids), k)

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
        return self._search(self.parts, tokens, k, exclude_documents, among)

    def _search(
        self,
        parts: Sequence[PostingPart],
        tokens: np.ndarray,
        k: int,
        exclude: np.ndarray | None,
        among: np.ndarray | None = None,
    ) -> Found:
        """As `search`, in some parts."""
        if k < 1:
            raise UserError(f"k is {k}: expected at least one neighbour")
        found = (np.full((len(tokens), k), -1), np.full((len(tokens), k), -np.inf, np.float32))
        terms = is_term(tokens, self.database)
        for row in np.flatnonzero(terms.any(1)).tolist():
            owner = -1 if exclude is None else int(exclude[row])
            query, wanted = tokens[row : row + 1], tokens[row][terms[row]]
            best = found[0][row : row + 1], found[1][row : row + 1]
            for part in parts:
                least = max(0.0, float(best[1][0, -1]))
                ids = part.candidates(wanted, k, exclude=owner, among=among, least=least)
                if len(ids):
                    best = self.merged([best, self.best_of(query, ids[None], k)], k)
            found[0][row], found[1][row] = best[0][0], best[1][0]
        return found


def _best(ids: np.ndarray, scores: np.ndarray, k: int) -> Found:
    """The k best [n, k] of scored chunks [n, m], equal ones by id; -1 and minus infinity for none."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    ids, scores = (np.take_along_axis(part, order, axis=1) for part in (ids, scores))
    missing = ((0, 0), (0, max(0, k - ids.shape[1])))
    scores = np.pad(scores, missing, constant_values=-np.inf)
    return np.pad(ids, missing, constant_values=-1), scores
