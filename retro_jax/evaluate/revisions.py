"""One model on several revisions of its database: bits per byte of each, and what each change brought.

A text of D documents is scored at each revision. All revisions and conditions share the resamples of
these documents, so a change from one revision to the next has an interval of its own.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluate.bootstrap import intervals, resampled_sums
from retro_jax.evaluate.scored_text import ScoredText
from retro_jax.evaluate.uncertainty import SAMPLES, plain


def revision_figures(scored: Mapping[int, ScoredText]) -> list[dict[str, Any]]:
    """A row for each revision, ascending.

    Args:
      scored: the sums of one text by revision, under the same conditions.

    Returns:
      Rows with "revision", "bits_per_byte" by condition, and "change" by condition: bits per byte
      minus those of the row before, none for the first. Each figure has its 95% interval.

    Raises:
      UserError: the sums are of different texts.
    """
    numbers = sorted(scored)
    first = scored[numbers[0]]
    if len({each.source.get("chunks") for each in scored.values()}) > 1:
        raise UserError("the revisions' results are of other texts: expected one split")
    names = first.conditions
    columns = [first.bytes, *(scored[r].nats[name] for r in numbers for name in names)]
    by_document = np.array(columns, np.float64).T
    total, drawn = np.zeros(by_document.shape[1]), np.zeros((SAMPLES, by_document.shape[1]))
    for seed, corpus in enumerate(sorted(set(first.corpora.tolist()))):
        rows = by_document[first.corpora == corpus]
        total += rows.sum(axis=0)
        drawn += resampled_sums(rows, samples=SAMPLES, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = total[1:] / total[0] / math.log(2)
        sampled = drawn[:, 1:] / drawn[:, :1] / math.log(2)
    bits = bits.reshape(len(numbers), len(names))
    sampled = sampled.reshape(SAMPLES, len(numbers), len(names))
    rows_out = []
    for i, number in enumerate(numbers):
        figures = intervals(bits[i], sampled[:, i])
        changes = intervals(bits[i] - bits[i - 1], sampled[:, i] - sampled[:, i - 1]) if i else []
        rows_out.append(
            {
                "revision": number,
                "bits_per_byte": dict(zip(names, map(plain, figures), strict=True)),
                "change": dict(zip(names, map(plain, changes))),
            }
        )
    return rows_out
