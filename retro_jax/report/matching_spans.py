"""The longest runs of tokens that a text and a neighbour share, in the same order.

text         the cat sat on a mat          the run "sat on a" at 2 of the text, at 1 of the neighbour;
neighbour    dog sat on a rug              "on a", inside it, is no match of its own
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class MatchingSpan:
    """`length` tokens that stand at `start` of a text and at `place` of another."""

    start: int
    place: int
    length: int


def matching_spans(
    text: np.ndarray, other: np.ndarray, *, least: int, pad_id: int
) -> list[MatchingSpan]:
    """Runs that cannot be made longer, in the order of the text.

    A run whose part of the text is inside another run's is left out.

    Args:
      text: [n] tokens. other: [m] tokens. least: tokens of a run. pad_id: never matches.
    """
    found = []
    before = np.zeros(len(other) + 1, np.int64)  # lengths of the runs that end at the token before
    same = (text[:, None] == other[None, :]) & (text != pad_id)[:, None]
    for i, row in enumerate(same):
        lengths = np.zeros(len(other) + 1, np.int64)
        lengths[1:] = np.where(row, before[:-1] + 1, 0)
        ends = lengths[1:] >= least
        if i + 1 < len(text):
            ends[:-1] &= ~same[i + 1, 1:]
        for j in np.flatnonzero(ends):
            length = int(lengths[j + 1])
            found.append(MatchingSpan(i + 1 - length, int(j) + 1 - length, length))
        before = lengths
    kept: list[MatchingSpan] = []
    for span in sorted(found, key=lambda span: -span.length):
        if not any(_inside(span, other) for other in kept):
            kept.append(span)
    return sorted(kept, key=lambda span: span.start)


def _inside(span: MatchingSpan, other: MatchingSpan) -> bool:
    """Whether a span's part of the text is part of another's."""
    return other.start <= span.start and span.start + span.length <= other.start + other.length
