"""BM25's scores of terms in chunks: counted, computed, and found by posting lists.

A term's posting list names the chunks that contain it, with the term's share of their score. Lists are
kept for parts of a database, a range of its chunks each, so that one worker builds one part:

    counts.npy          [V] int64, the chunks that contain each term: of the whole database
    places-00000.npy    [p] int32, by term: chunks, counted from the part's first one
    scores-00000.npy    [p] float32: the term's share of their score
    ends-00000.npy      [V + 1] int64, where each term's list begins
    tops-00000.npy      [V] float32, the largest share of each list; 0 for none

Scores have Lucene's form of BM25: for a term in m of n chunks, f times in one of l terms where the mean
is L, log(1 + (n - m + 1/2) / (m + 1/2)) f / (f + k1 (1 - b + b l / L)).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipelines.artefacts.manifest import shard_name
from data_pipelines.chunk_database.database import ChunkDatabase

POSTINGS = ("places", "scores", "ends", "tops")
_BLOCK = 4096  # chunks read at once
_ROUNDING = 1e-5  # sums in another order differ by less
_FEW = 512  # chunks that are scored one by one rather than by more lists


@dataclasses.dataclass(frozen=True)
class TermCounts:
    """How often terms occur in a database.

    Attributes:
      containing: [V] int64, the chunks that contain each term.
      indexed: chunks that have terms and are not removed. terms: of these, with repetitions.
    """

    containing: np.ndarray
    indexed: int
    terms: int

    def __add__(self, other: "TermCounts") -> "TermCounts":
        """Of both."""
        return TermCounts(
            self.containing + other.containing,
            self.indexed + other.indexed,
            self.terms + other.terms,
        )

    def scores(self, rows: "TermRows", k1: float, b: float) -> np.ndarray:
        """[n, 64] float32: beside the first of equal terms of a chunk its share of the score, else 0."""
        held = self.containing[np.minimum(rows.tokens, len(self.containing) - 1)]
        rarity = np.log1p((self.indexed - held + 0.5) / (held + 0.5))
        lengths = rows.is_term.sum(1, keepdims=True) / (self.terms / max(1, self.indexed) or 1)
        times = rows.times
        with np.errstate(invalid="ignore"):
            shares = rarity * times / (times + k1 * (1 - b + b * lengths))
        return np.where(times > 0, shares, 0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TermRows:
    """Chunks by their terms.

    Attributes:
      tokens: [n, 64] of the chunks. is_term: [n, 64] bool, which of them are terms.
    """

    tokens: np.ndarray
    is_term: np.ndarray

    @functools.cached_property
    def times(self) -> np.ndarray:
        """[n, 64] int64: beside the first of equal terms how often the chunk has it, else 0."""
        marked = np.where(self.is_term, self.tokens, -1)
        order = np.argsort(marked, axis=1, kind="stable")
        ordered = np.take_along_axis(marked, order, axis=1)
        begins = np.ones(ordered.shape, bool)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        starts = np.flatnonzero(begins.ravel())
        runs = np.zeros(ordered.size, np.int64)
        runs[starts] = np.diff(starts, append=ordered.size)  # a row's first token begins a run
        times = np.zeros(ordered.shape, np.int64)
        np.put_along_axis(times, order, runs.reshape(ordered.shape), axis=1)
        return np.where(self.is_term, times, 0)


def is_term(tokens: np.ndarray, database: ChunkDatabase) -> np.ndarray:
    """[...] bool: which tokens are terms: all but bos, eos and padding."""
    return ~np.isin(tokens, (database.pad_id, database.bos_id, database.eos_id))


def term_rows(database: ChunkDatabase, ids: range) -> Iterator[tuple[int, TermRows]]:
    """Chunks of a range by their terms, some at a time, each time with the first one's id.

    Chunks of removed documents have none.
    """
    for first in range(ids.start, ids.stop, _BLOCK):
        block = np.arange(first, min(first + _BLOCK, ids.stop))
        tokens = database.chunks(block)
        there = ~database.is_removed(database.documents(block))
        yield first, TermRows(tokens, is_term(tokens, database) & there[:, None])


def count_terms(database: ChunkDatabase, ids: range) -> TermCounts:
    """Counts the terms of a range of chunks."""
    total = TermCounts(np.zeros(database.vocab_size, np.int64), 0, 0)
    for _, rows in term_rows(database, ids):
        once = rows.tokens[rows.times > 0]
        total += TermCounts(
            np.bincount(once, minlength=database.vocab_size),
            int(rows.is_term.any(1).sum()),
            int(rows.is_term.sum()),
        )
    return total


Entries = tuple[np.ndarray, np.ndarray, np.ndarray]  # terms, chunk ids, scores: [p] each
Lists = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # places, scores, ends, tops


def entries(database: ChunkDatabase, ids: range, weights: np.ndarray) -> Entries:
    """What the lists have of a range of chunks, in the order of these.

    Args:
      database: whose chunks. ids: the range. weights: [n, 64] of it, as `TermCounts.scores` gives them.
    """
    kind = np.min_scalar_type(database.vocab_size)
    every = [(np.zeros(0, kind), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    for first in range(0, len(ids), _BLOCK):
        block = np.arange(first, min(first + _BLOCK, len(ids)))
        rows, columns = np.nonzero(weights[block])
        tokens = database.chunks(ids.start + block)[rows, columns]
        every.append((tokens.astype(kind), ids.start + block[rows], weights[block][rows, columns]))
    terms, places, scores = (np.concatenate(column) for column in zip(*every))
    return terms, places, scores


def posting_lists(parts: Sequence[Entries], first: int, vocab_size: int) -> Lists:
    """The lists of a part.

    Args:
      parts: of its shards, in their order. first: the part's first chunk. vocab_size: V.

    Returns:
      places, scores, ends and tops, as the module says.
    """
    terms = np.concatenate([part[0] for part in parts])
    places = np.concatenate([(part[1] - first).astype(np.int32) for part in parts])
    scores = np.concatenate([part[2] for part in parts])
    order = np.argsort(terms, kind="stable")
    counts = np.bincount(terms, minlength=vocab_size)
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return places[order], scores[order], ends, _tops(scores[order], ends)


def mapped_lists(directory: pathlib.Path, part: int) -> Lists:
    """Those of a part on disk; places and scores are mapped."""
    paths = [directory / shard_name(name, part) for name in POSTINGS]
    places, scores, ends, tops = (np.asarray(np.load(path, mmap_mode="r")) for path in paths)
    return places, scores, ends, tops


def lists_without_parts(directory: pathlib.Path) -> Lists:
    """Those of a directory from before there were parts, whose places count indexed chunks."""
    ids, places = np.load(directory / "chunk-ids.npy"), np.load(directory / "places.npy")
    scores, ends = (np.load(directory / name) for name in ("scores.npy", "ends.npy"))
    return ids.astype(np.int32)[places], scores, ends, _tops(scores, ends)


def _tops(scores: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """[V] float32: the largest of each list; 0 for none."""
    tops, filled = np.zeros(len(ends) - 1, np.float32), np.flatnonzero(np.diff(ends))
    if len(filled):
        tops[filled] = np.maximum.reduceat(scores, ends[filled])
    return tops


class PostingPart:
    """The posting lists of a range of chunks, mapped when they are first asked.

    Attributes:
      ids: the range.
    """

    def __init__(self, read: Callable[[], Lists], ids: range, database: ChunkDatabase) -> None:
        """Takes what opens the lists, the range, and whose chunks they are."""
        self._read, self.ids, self._database = read, ids, database

    def release(self) -> None:
        """Forgets what is mapped; another search maps it again."""
        for name in ("_lists", "_owners"):
            self.__dict__.pop(name, None)

    def lengths(self) -> np.ndarray:
        """[V] int64: chunks of the part that contain each term."""
        return np.diff(self._lists[2])

    def candidates(
        self,
        terms: np.ndarray,
        k: int,
        *,
        exclude: int = -1,
        among: np.ndarray | None = None,
        least: float = 0.0,
    ) -> np.ndarray:
        """The k best chunks for one query and some more, by reading as few lists as that takes.

        Lists are read in the order of what they can add for their length. Once what is left can add
        less than the k-th best sum so far, no chunk outside the lists read can be among the best
        (Turtle and Flood 1995, "Query evaluation: strategies and optimizations", max-score).

        Args:
          terms: [m] of the query, with repetitions. k: how many.
          exclude: the document to leave out; -1 for none.
          among: [chunks of the database] bool, those to choose from; None for all.
          least: a score that at least k chunks of other parts have.

        Returns:
          Ids [c] int64 in any order: all that can be among the k best with a score of at least
          `least`, k or fewer where no others contain a term.
        """
        places, scores, ends, tops = self._lists
        wanted = self._wanted(exclude, among)
        terms, times = np.unique(terms, return_counts=True)
        lengths, bounds = ends[terms + 1] - ends[terms], tops[terms] * times
        order = np.argsort(-bounds / np.maximum(lengths, 1), kind="stable")
        order = order[lengths[order] > 0]
        # What the lists from each one on can add to a chunk.
        rest = np.append(np.cumsum(bounds[order][::-1], dtype=np.float64)[::-1], 0.0)
        sums = np.zeros(len(self.ids), np.float32)
        can, read, look = np.zeros(0, np.int64), 0, len(sums) // 2
        for step, number in enumerate(order.tolist()):
            part = slice(ends[terms[number]], ends[terms[number] + 1])
            sums[places[part]] += scores[part] * np.float32(times[number])
            read += int(lengths[number])
            if read >= look or step == len(order) - 1:
                look = 2 * read
                can, least = _open(sums, rest[step + 1], least, wanted, k)
                if rest[step + 1] < least and len(can) <= k + _FEW:
                    break
        return can + self.ids.start

    def _wanted(self, exclude: int, among: np.ndarray | None) -> "_Wanted":
        """Which chunks of the part may be found."""
        first, last = 0, 0
        if exclude >= 0:
            first, last = np.searchsorted(self._owners, (exclude, exclude + 1)).tolist()
        own = None if among is None else among[self.ids.start : self.ids.stop]
        return _Wanted(range(first, last), own)

    @functools.cached_property
    def _lists(self) -> Lists:
        """Of the part, opened at the first search."""
        return self._read()

    @functools.cached_property
    def _owners(self) -> np.ndarray:
        """[chunks of the part] numbers of their documents, ascending."""
        return self._database.documents(np.arange(self.ids.start, self.ids.stop))


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which chunks of a part may be found: those outside a document, and among those given."""

    without: range
    among: np.ndarray | None

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """[n] bool."""
        there = (places < self.without.start) | (places >= self.without.stop)
        return there if self.among is None else there & self.among[places]


def _open(
    sums: np.ndarray, rest: float, least: float, wanted: _Wanted, k: int
) -> tuple[np.ndarray, float]:
    """The chunks that can still be among the k best if lists add `rest` at most, and the k-th sum.

    Args:
      sums: [n] of every chunk so far. least: a sum that k chunks are known to reach.
      wanted: which chunks may be found. k: how many.
    """
    bound = (1 - _ROUNDING) * least - rest
    can = np.flatnonzero(sums >= bound) if bound > 0 else np.flatnonzero(sums)
    can = can[wanted(can)]
    if len(can) > k:
        least = max(least, float(np.partition(sums[can], -k)[-k]))
        can = can[sums[can] >= (1 - _ROUNDING) * least - rest]
    return can, least
