"""How much of a text is in the training data, and figures for the chunks with little overlap.

r(C) of a chunk C is the length of the longest run of tokens that C shares with one of its nearest
training neighbours, over the chunk length (section 2.6 of the paper). A neighbour is a chunk and its
continuation. Figures for the chunks with r(C) <= alpha show a model's gain beyond copying.
"""

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from retro_jax.evaluate.bootstrap import Interval, intervals, resampled_sums

NEIGHBOURS = 10  # of each evaluation chunk that the paper looks at
THRESHOLDS = tuple(i / 8 for i in range(1, 9))
_BLOCK = 256  # chunks compared at once


def longest_shared_runs(
    chunks: np.ndarray, neighbours: np.ndarray, ignored: Collection[int]
) -> np.ndarray:
    """Length of the longest run of tokens that each chunk shares with any of its neighbours.

    Args:
      chunks: [n, M] tokens.
      neighbours: [n, K, R] tokens of each chunk's neighbours.
      ignored: tokens that are like no other, nor like themselves (padding, bos, eos).

    Returns:
      [n] int64, 0 to M.
    """
    longest = np.zeros(len(chunks), np.int64)
    for here, near in _blocks(neighbours, ignored):
        most = np.zeros(near.shape, np.uint16)
        for ends in _run_ends(chunks[here], near):
            np.maximum(most, ends, out=most)
        longest[here] = most.max(axis=(1, 2), initial=0)
    return longest


def shared_ngrams(
    texts: np.ndarray, neighbours: np.ndarray, ignored: Collection[int], size: int = 13
) -> np.ndarray:
    """The share of each text's n-grams that each of its neighbours contains too.

    Args:
      texts: [n, L] tokens, whose n-grams contain no ignored token.
      neighbours: [n, K, R] tokens. ignored: as above. size: of the n-grams.

    Returns:
      [n, K] float64; 0 for a text without any n-gram.
    """
    matches = np.zeros(neighbours.shape[:2], np.int64)
    for here, near in _blocks(neighbours, ignored):
        for ends in _run_ends(texts[here], near):
            matches[here] += (ends >= size).any(axis=2)
    usual = np.lib.stride_tricks.sliding_window_view(~np.isin(texts, list(ignored)), size, axis=1)
    count = usual.all(axis=2).sum(axis=1)
    return matches / np.maximum(count, 1)[:, None]


def _blocks(neighbours: np.ndarray, ignored: Collection[int]) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows, and their neighbours with -1 for ignored tokens, few enough for the processor's cache."""
    for first in range(0, len(neighbours), _BLOCK):
        here = slice(first, first + _BLOCK)
        yield here, np.where(np.isin(neighbours[here], list(ignored)), -1, neighbours[here])


def _run_ends(texts: np.ndarray, near: np.ndarray) -> Iterator[np.ndarray]:
    """For each token of texts [n, L] in turn, [n, K, R]: how long the common run is that ends at this
    token of the text and that one of the neighbours; the same array each time."""
    ends = np.zeros(near.shape, np.uint16)
    for token in texts.T:
        ends[..., 1:] = ends[..., :-1] + np.uint16(1)
        ends[..., 0] = 1
        ends *= near == token[:, None, None]
        yield ends


@dataclasses.dataclass(frozen=True)
class ScoredChunks:
    """The same chunks, scored under several conditions.

    Attributes:
      bits: condition -> [n] bits of the chunk's text.
      bytes: [n] UTF-8 bytes of the chunk's text.
      documents: [n] number of the chunk's document.
      corpora: [n] name of its corpus.
      runs: [n] its longest shared run in tokens. chunk_length: M.
    """

    bits: Mapping[str, np.ndarray]
    bytes: np.ndarray
    documents: np.ndarray
    corpora: np.ndarray
    runs: np.ndarray
    chunk_length: int


@dataclasses.dataclass(frozen=True)
class Point:
    """Figures of one corpus among its chunks with r(C) <= at_most.

    Attributes:
      corpus: "" for all of them together.
      at_most: alpha, a share of the chunk length.
      documents, chunks, bytes: with text, under the threshold.
      bits_per_byte: by condition.
      differences: by (condition, the one it is compared with).
    """

    corpus: str
    at_most: float
    documents: int
    chunks: int
    bytes: int
    bits_per_byte: Mapping[str, Interval]
    differences: Mapping[tuple[str, str], Interval]


@dataclasses.dataclass(frozen=True)
class OverlapSums:
    """Sums over each document's chunks with r(C) <= alpha, for each of A thresholds alpha.

    Attributes:
      corpora: [D] of the documents. thresholds: [A] values of alpha, ascending.
      chunks, bytes: [D, A] int64, of chunks with text. bits: condition -> [D, A] float64.
      chunk_length: M. neighbours: how many r(C) looks at.
    """

    corpora: np.ndarray
    thresholds: np.ndarray
    chunks: np.ndarray
    bytes: np.ndarray
    bits: Mapping[str, np.ndarray]
    chunk_length: int
    neighbours: int


def overlap_sums(
    scored: ScoredChunks, neighbours: int, thresholds: Collection[float] = THRESHOLDS
) -> OverlapSums:
    """Sums scored chunks by document.

    Args:
      scored: the chunks. neighbours: of `runs`. thresholds: values of alpha, ascending.
    """
    _, first, owner = np.unique(scored.documents, return_index=True, return_inverse=True)
    under = np.stack([scored.runs <= alpha * scored.chunk_length for alpha in thresholds], axis=1)
    under &= (scored.bytes > 0)[:, None]

    def by_document(values: np.ndarray) -> np.ndarray:
        columns = np.where(under, values[:, None], 0)
        return np.stack([np.bincount(owner, column) for column in columns.T], axis=1)

    return OverlapSums(
        corpora=scored.corpora[first],
        thresholds=np.array(list(thresholds), np.float64),
        chunks=by_document(np.ones(len(owner))).astype(np.int64),
        bytes=by_document(scored.bytes).astype(np.int64),
        bits={name: by_document(bits) for name, bits in scored.bits.items()},
        chunk_length=scored.chunk_length,
        neighbours=neighbours,
    )


def overlap_curve(
    scored: OverlapSums,
    pairs: Collection[tuple[str, str]],
    *,
    samples: int = 1000,
    seed: int = 0,
) -> list[Point]:
    """Bits per byte by the overlap allowed, with intervals of a bootstrap over documents.

    A document counts in the resamples where it has a chunk under any threshold.

    Args:
      scored: the sums by document.
      pairs: conditions to take the difference of, first minus second, over the same resamples.
      samples, seed: of the bootstrap. All corpora together are resampled corpus by corpus.

    Returns:
      A Point for each corpus and threshold, in this order, all corpora together last.
    """
    names = list(scored.bits)
    values = np.stack([scored.bytes, *scored.bits.values()], axis=2)
    points: list[Point] = []
    sums: list[np.ndarray] = []
    draws: list[np.ndarray] = []
    for corpus in [*sorted(set(scored.corpora.tolist())), ""]:
        here = scored.corpora == corpus if corpus else np.ones(len(scored.corpora), bool)
        if corpus:
            by_document = values[here & scored.chunks.any(axis=1)]
            sums.append(by_document.sum(axis=0))
            draws.append(resampled_sums(by_document, samples=samples, seed=seed + len(draws)))
            total, drawn = sums[-1], draws[-1]
        else:
            total, drawn = np.sum(sums, axis=0), np.sum(draws, axis=0)
        for i, alpha in enumerate(scored.thresholds.tolist()):
            chunks = scored.chunks[here, i]
            counts = (int((chunks > 0).sum()), int(chunks.sum()), int(scored.bytes[here, i].sum()))
            figures = _figures(total[i], drawn[:, i], names, pairs)
            points.append(Point(corpus, alpha, *counts, *figures))
    return points


def _figures(
    total: np.ndarray, drawn: np.ndarray, names: list[str], pairs: Collection[tuple[str, str]]
) -> tuple[dict[str, Interval], dict[tuple[str, str], Interval]]:
    """Ratios of sums [F] and of resampled sums [S, F]; the first of F is bytes, then bits."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value, sampled = total[1:] / total[0], drawn[:, 1:] / drawn[:, :1]
    figures = dict(zip(names, intervals(value, sampled), strict=True))
    columns = [(names.index(first), names.index(second)) for first, second in pairs]
    differences = {
        pair: intervals(value[[a]] - value[[b]], sampled[:, [a]] - sampled[:, [b]])[0]
        for pair, (a, b) in zip(pairs, columns, strict=True)
    }
    return figures, differences
