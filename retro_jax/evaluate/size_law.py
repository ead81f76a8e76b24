"""Bits against the size of the database: a + b n^-c, and the gain to expect of more text.

n is the database's size, 1 for the whole one. For each exponent of a grid, a and b of least squares
follow directly; both stay at 0 or above, as bits do. The interval refits the law on resamples of the
documents, which all sizes share. Three sizes determine the law, further ones test it: where the law misses
the bits of the largest size by much of the gain that it promises, it is no forecast.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from retro_jax.evaluate.bootstrap import intervals, resampled_sums
from retro_jax.evaluate.conditions import swept
from retro_jax.evaluate.scored_text import ScoredText
from retro_jax.evaluate.uncertainty import SAMPLES, plain

MORE = 10  # times as much text, of which the gain is stated
_EXPONENTS = np.geomspace(0.02, 2.0, 400)
_FEWEST = 3  # sizes
_POOR = 0.5  # a law that misses by more than this part of its gain does not describe the sizes
_NO_FORECAST = ", more than half of that gain: no forecast"


def fit_size_law(sizes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The laws of least squared error.

    Args:
      sizes: [n] positive. bits: [S, n], of each of S texts.

    Returns:
      [S, 3]: a, b and c of each.
    """
    best = np.full(len(bits), np.inf)
    laws = np.zeros((len(bits), 3))
    mean = bits.mean(axis=1)
    for exponent in _EXPONENTS:
        x = sizes**-exponent
        spread = x - x.mean()
        slope = np.maximum((bits @ spread) / (spread @ spread), 0.0)
        level = mean - slope * x.mean()
        through = np.maximum((bits @ x) / (x @ x), 0.0)  # where the level would be below 0
        slope = np.where(level < 0, through, slope)
        level = np.maximum(level, 0.0)
        error = ((level[:, None] + slope[:, None] * x - bits) ** 2).sum(axis=1)
        better = error < best
        best = np.where(better, error, best)
        row = np.stack([level, slope, np.full(len(bits), exponent)], axis=1)
        laws = np.where(better[:, None], row, laws)
    return laws


def size_law(scored: ScoredText) -> dict[str, Any] | None:
    """The law of a text that was scored with shares of the database; None where they are too few.

    Returns:
      "sizes" and "bits" of the points, and with a 95% interval each: "a", "b", "c", "gain", by which
      bits per byte would fall with `MORE` times the text, and "miss", by which the law is above the
      bits of the largest size.
    """
    names = [name for name in swept(scored.nats, "database") if float(name.partition("_")[2]) > 0]
    sizes = [float(name.partition("_")[2]) for name in names]
    if "on" in scored.nats and 1.0 not in sizes:
        names, sizes = [*names, "on"], [*sizes, 1.0]
    if len(sizes) < _FEWEST:
        return None
    columns = [scored.bytes, *(scored.nats[name] for name in names)]
    by_document = np.array(columns, np.float64).T
    total, drawn = np.zeros(by_document.shape[1]), np.zeros((SAMPLES, by_document.shape[1]))
    for seed, corpus in enumerate(sorted(set(scored.corpora.tolist()))):
        rows = by_document[scored.corpora == corpus]
        total += rows.sum(axis=0)
        drawn += resampled_sums(rows, samples=SAMPLES, seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = total[None, 1:] / total[0] / math.log(2)
        sampled = drawn[:, 1:] / drawn[:, :1] / math.log(2)
    sampled = sampled[np.isfinite(sampled).all(axis=1)]
    figure, figures = (_figures(np.array(sizes), each) for each in (bits, sampled))
    found = map(plain, intervals(figure[0], figures))
    named = dict(zip(("a", "b", "c", "gain", "miss"), found, strict=True))
    return {"times": MORE, "sizes": sizes, "bits": bits[0].tolist(), **named}


def describe(law: Mapping[str, Any]) -> str:
    """A law in three lines: the law, what it promises, and whether it can be believed."""
    a, b, c = (law[name]["value"] for name in "abc")
    gain, miss = law["gain"], law["miss"]
    poor = abs(miss["value"]) > _POOR * gain["value"]
    return (
        f"bits per byte by database size n (1: the whole): {a:.4f} + {b:.4f} n^-{c:.3f},"
        f" of {len(law['sizes'])} sizes\n"
        f"gain to expect of {law['times']} times the text: {gain['value']:.4f}"
        f" [{gain['low']:.4f}, {gain['high']:.4f}] bits per byte\n"
        f"the law less the bits of the largest size: {miss['value']:+.4f}"
        f" [{miss['low']:+.4f}, {miss['high']:+.4f}]{_NO_FORECAST if poor else ''}"
    )


def _figures(sizes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """[S, 5]: a, b, c, the gain of more text, and the miss at the largest size."""
    laws = fit_size_law(sizes, bits)
    level, slope, exponent = laws.T
    gain = slope * (1 - float(MORE) ** -exponent)
    largest = sizes.argmax()
    miss = level + slope * sizes[largest] ** -exponent - bits[:, largest]
    return np.column_stack([laws, gain, miss])
