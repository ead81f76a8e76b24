"""How sure a figure is: the bootstrap over documents.

Tokens of a document are not independent of each other, documents are: hence a resample draws as
many documents as there are, with replacement, and every figure is computed on it again. Conditions
that are compared share their resamples, so that a document's difficulty cancels out.

scipy.stats.bootstrap resamples again for every statistic and keeps no resamples that several ratios of
sums could share: its intervals of differences between conditions would be other ones.
"""

import dataclasses

import numpy as np

_CONFIDENCE = 0.95
_DRAWS = 4_000_000  # random numbers drawn at once


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure, and the ends of its 95% interval (percentiles of its resamples)."""

    value: float
    low: float
    high: float


def resampled_sums(values: np.ndarray, *, samples: int, seed: int) -> np.ndarray:
    """Sums over resamples of the documents.

    Args:
      values: [D, ...] of each document.
      samples: S, resamples. seed: of the draws, which depend on D, samples and it alone.

    Returns:
      [S, ...] float64.
    """
    flat = values.reshape(len(values), int(np.prod(values.shape[1:]))).astype(np.float64)
    generator = np.random.Generator(np.random.Philox(seed))
    sums = np.zeros((samples, flat.shape[1]))
    block = max(1, _DRAWS // max(1, len(values)))
    for first in range(0, samples if len(values) else 0, block):
        rows = len(sums[first : first + block])
        times = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), rows)
        sums[first : first + block] = times.astype(np.float64) @ flat
    return sums.reshape(samples, *values.shape[1:])


def intervals(values: np.ndarray, sampled: np.ndarray) -> list[Interval]:
    """The interval of each of some figures [F], by its resamples [S, F].

    Resamples in which a figure has no denominator (not a number) are left out.
    """
    ends = (0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2)
    results = []
    for value, column in zip(values, sampled.T, strict=True):
        column = column[np.isfinite(column)]
        low, high = np.quantile(column, ends) if len(column) else (np.nan, np.nan)
        results.append(Interval(float(value), float(low), float(high)))
    return results


def paired_test(differences: np.ndarray, *, samples: int, seed: int) -> float:
    """The two-sided p-value of a sum of differences, by random signs.

    Under the null hypothesis it is chance for each document which of two models is which, and so the
    sign of its difference. The observed signs count as one of the draws, so the value is never 0.

    Args:
      differences: [D], one of each document. samples: draws of all signs. seed: of the draws.
    """
    observed = abs(float(differences.sum()))
    generator = np.random.Generator(np.random.Philox(seed))
    block = max(1, _DRAWS // max(1, len(differences)))
    extreme = 0
    for first in range(0, samples, block):
        rows = min(block, samples - first)
        signs = generator.integers(0, 2, (rows, len(differences)), np.int8) * 2.0 - 1.0
        # A little less than observed: sums of the same numbers differ in their last bits.
        extreme += int((np.abs(signs @ differences) >= observed * (1 - 1e-12)).sum())
    return (extreme + 1) / (samples + 1)
