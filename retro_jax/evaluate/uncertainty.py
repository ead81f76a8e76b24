"""How sure every figure of an evaluation is: 95% intervals of a bootstrap over documents.

All conditions share their resamples, drawn corpus by corpus with the seeds of the figures by overlap.
An interval thus belongs to the same set of texts wherever it is shown.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluate.bootstrap import Interval, intervals, paired_test, resampled_sums
from retro_jax.evaluate.conditions import swept
from retro_jax.evaluate.scored_text import ScoredText

_PAIRS = (
    ("on", "off"),
    ("on", "baseline"),
    ("on", "random"),
    ("on", "context"),
    ("context+random", "off"),
    ("on", "knn"),
    ("tokens", "on"),
    ("tokens", "knn"),
    ("tokens", "baseline+tokens"),
    ("tokens", "context+tokens"),
    ("on+knn", "on"),
    ("on+knn", "knn"),
    ("tokens", "on+knn"),
    ("on+knn+tokens", "tokens"),
    ("on+knn+tokens", "knn+tokens"),
)
SAMPLES = 1000
_COMPARISON_SAMPLES = 10_000
_DENOMINATORS = ("bytes", "words", "tokens")  # the columns before the conditions' nats


def plain(interval: Interval) -> dict[str, float | None]:
    """An Interval for JSON, which has no NaN."""
    return {n: v if math.isfinite(v) else None for n, v in dataclasses.asdict(interval).items()}


def compared_pairs(names: Collection[str]) -> list[tuple[str, str]]:
    """Which of the conditions are compared: the first of a pair minus the second.

    Beside the fixed pairs these are RETRO[ON] and the context with the same number of neighbours.
    """
    same_number = [(name, name.replace("k_", "context_")) for name in swept(names, "k")]
    return [pair for pair in (*_PAIRS, *same_number) if set(pair) <= set(names)]


def with_intervals(results: Mapping[str, Any], scored: ScoredText) -> dict[str, Any]:
    """The results with "intervals" beside every figure, and "differences" beside RETRO[ON]'s.

    Args:
      results: by condition, of launch.evaluate. scored: their sums by document.
    """
    names = scored.conditions
    columns = [getattr(scored, unit) for unit in _DENOMINATORS]
    columns += [scored.nats[name] for name in names]
    by_document = np.array(columns, np.float64).T
    annotated = {
        name: {**r, "all": dict(r["all"]), "corpora": {c: dict(v) for c, v in r["corpora"].items()}}
        for name, r in results.items()
    }
    totals, draws = [], []
    for number, corpus in enumerate(sorted(set(scored.corpora.tolist()))):
        rows = by_document[scored.corpora == corpus]
        totals.append(rows.sum(axis=0))
        draws.append(resampled_sums(rows, samples=SAMPLES, seed=number))
        figures = {name: annotated[name]["corpora"][corpus] for name in names}
        _add(figures, names, totals[-1], draws[-1])
    everything = {name: annotated[name]["all"] for name in names}
    _add(everything, names, np.sum(totals, axis=0), np.sum(draws, axis=0))
    return annotated


def _add(
    by_condition: dict[str, dict[str, Any]],
    names: Sequence[str],
    total: np.ndarray,
    drawn: np.ndarray,
) -> None:
    """Writes the intervals of one corpus into its figures by condition."""
    count = len(_DENOMINATORS)
    rates, sampled = {}, {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, unit in enumerate(_DENOMINATORS):
            rates[unit] = total[count:] / total[i]
            sampled[unit] = drawn[:, count:] / drawn[:, i : i + 1]
    figures = {
        "bits_per_byte": (rates["bytes"] / math.log(2), sampled["bytes"] / math.log(2)),
        "bits_per_token": (rates["tokens"] / math.log(2), sampled["tokens"] / math.log(2)),
        "word_perplexity": tuple(_perplexity(x["words"]) for x in (rates, sampled)),
    }
    for figure, (values, samples) in figures.items():
        for name, each in zip(names, intervals(values, samples), strict=True):
            by_condition[name].setdefault("intervals", {})[figure] = plain(each)
    values, samples = figures["bits_per_byte"]
    for first, second in compared_pairs(names):
        a, b = names.index(first), names.index(second)
        (each,) = intervals(values[[a]] - values[[b]], samples[:, [a]] - samples[:, [b]])
        by_condition[first].setdefault("differences", {})[second] = plain(each)


def _perplexity(nats: np.ndarray) -> np.ndarray:
    """Of nats a word; infinite where there is no word, and else at most the largest float's."""
    return np.exp(np.where(np.isinf(nats), nats, np.minimum(nats, 700)))


def share_with_interval(right: np.ndarray) -> dict[str, float | None]:
    """The share of the documents [D] bool that are right."""
    values = right.astype(np.float64)[:, None]
    drawn = resampled_sums(values, samples=SAMPLES, seed=0) / len(values)
    (interval,) = intervals(values.mean(axis=0), drawn)
    return plain(interval)


def compare(pairs: Sequence[tuple[Mapping[str, Any], ScoredText]]) -> dict[str, Any]:
    """Bits per byte of two results, the difference, its interval and the p-value of a paired test.

    Args:
      pairs: a result of launch.evaluate and the sums that have it, of each model.

    Raises:
      UserError: they are not of the same text.
    """
    (first, scored), (second, other) = pairs
    texts = [
        (
            r["manifests"]["chunks"],
            r["settings"]["max_documents"],
            r["settings"].get("sample_chunks"),
        )
        for r in (first, second)
    ]
    if texts[0] != texts[1] or len(scored.bytes) != len(other.bytes):
        raise UserError("the two results are of other texts: expected one split, data and number")
    bits = [each.nats[result["condition"]] / math.log(2) for result, each in pairs]
    size = scored.bytes.astype(np.float64)
    columns = np.stack([size, *bits], axis=1)
    total = columns.sum(axis=0)
    drawn = resampled_sums(columns, samples=_COMPARISON_SAMPLES, seed=0)
    values, sampled = total[1:] / total[0], drawn[:, 1:] / drawn[:, :1]
    (interval,) = intervals(values[:1] - values[1:], sampled[:, :1] - sampled[:, 1:])
    return {
        "models": [result["model"] for result, _ in pairs],
        "conditions": [result["condition"] for result, _ in pairs],
        "nll": [result["nll"] for result, _ in pairs],
        "documents": len(size),
        "bytes": int(size.sum()),
        "bits_per_byte": values.tolist(),
        "difference": dataclasses.asdict(interval),
        "better_documents": int((bits[0] < bits[1]).sum()),
        "p_value": paired_test(bits[0] - bits[1], samples=_COMPARISON_SAMPLES, seed=0),
    }
