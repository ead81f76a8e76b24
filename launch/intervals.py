"""How sure every figure of an evaluation is: 95% intervals of a bootstrap over documents.

All conditions share their resamples, drawn corpus by corpus with the seeds of the figures by overlap,
so that an interval stands for one and the same set of texts wherever it is shown.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from launch.arrays import read_array
from launch.overlap import PAIRS, Scored, plain
from retro_jax.evaluate.report import TableView, condition_name, condition_order
from retro_jax.evaluate.statistics import intervals, resampled_sums

SAMPLES = 1000
ABOUT = "95%, percentiles of 1,000 bootstrap resamples of the documents"
_DENOMINATORS = ("bytes", "words", "tokens")  # the columns before the conditions' nats


def with_intervals(scored: Scored) -> dict[str, Any]:
    """The results with "intervals" beside every figure, and "differences" beside RETRO[ON]'s.

    Args:
      scored: what was scored; it need not have neighbours.
    """
    names = sorted(scored.results, key=condition_order)
    by_document, corpora = _by_document(scored, names)
    found = {
        name: {**r, "all": dict(r["all"]), "corpora": {c: dict(v) for c, v in r["corpora"].items()}}
        for name, r in scored.results.items()
    }
    totals, draws = [], []
    for number, corpus in enumerate(sorted(set(corpora))):
        rows = by_document[corpora == corpus]
        totals.append(rows.sum(axis=0))
        draws.append(resampled_sums(rows, samples=SAMPLES, seed=number))
        here = {name: found[name]["corpora"][corpus] for name in names}
        _add(here, names, totals[-1], draws[-1])
    everything = {name: found[name]["all"] for name in names}
    _add(everything, names, np.sum(totals, axis=0), np.sum(draws, axis=0))
    return found


def _by_document(scored: Scored, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[D, 3 + conditions] denominators and nats, and [D] the corpora."""
    split = scored.split
    numbers, owner = np.unique(split.database.documents(split.ids), return_inverse=True)
    records = split.records()
    sizes = [
        (records[n].bytes, records[n].words + records[n].lines, records[n].corpus)
        for n in numbers.tolist()
    ]
    columns = [[s[0] for s in sizes], [s[1] for s in sizes]]
    columns.append(np.bincount(owner, scored.text.sum(axis=1)).tolist())
    for name in names:
        nll = read_array(scored.folder / scored.results[name]["nll"]).astype(np.float64)
        nats = np.where(scored.text, nll, 0.0).sum(axis=1)
        columns.append(np.bincount(owner, nats).tolist())
    return np.array(columns, np.float64).T, np.array([s[2] for s in sizes])


def _add(
    here: dict[str, dict[str, Any]], names: Sequence[str], total: np.ndarray, drawn: np.ndarray
) -> None:
    """Writes the intervals of one corpus into its figures by condition."""
    count = len(_DENOMINATORS)
    rates, sampled = {}, {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, what in enumerate(_DENOMINATORS):
            rates[what] = total[count:] / total[i]
            sampled[what] = drawn[:, count:] / drawn[:, i : i + 1]
    figures = {
        "bits_per_byte": (rates["bytes"] / math.log(2), sampled["bytes"] / math.log(2)),
        "bits_per_token": (rates["tokens"] / math.log(2), sampled["tokens"] / math.log(2)),
        "word_perplexity": tuple(np.exp(np.minimum(x["words"], 700)) for x in (rates, sampled)),
    }
    for figure, (values, samples) in figures.items():
        for name, each in zip(names, intervals(values, samples), strict=True):
            here[name].setdefault("intervals", {})[figure] = plain(each)
    values, samples = figures["bits_per_byte"]
    for first, second in PAIRS:
        if first in names and second in names:
            a, b = names.index(first), names.index(second)
            (each,) = intervals(values[[a]] - values[[b]], samples[:, [a]] - samples[:, [b]])
            here[first].setdefault("differences", {})[second] = plain(each)


def share_with_interval(right: np.ndarray) -> dict[str, float | None]:
    """The share of the documents [D] bool that are right."""
    values = right.astype(np.float64)[:, None]
    drawn = resampled_sums(values, samples=SAMPLES, seed=0) / len(values)
    (found,) = intervals(values.mean(axis=0), drawn)
    return plain(found)


def interval_tables(results: Mapping[str, Any]) -> Iterator[TableView]:
    """Every figure with its interval: all corpora together, then bits per byte of each."""
    caption = f"In brackets: {ABOUT}."
    names = sorted(results, key=condition_order)
    rows = []
    for name in names:
        each = results[name]["all"]["intervals"]
        figures = [(each["bits_per_byte"], 4), (each["word_perplexity"], 2)]
        rows.append([condition_name(name), *(shown(f, "", digits) for f, digits in figures)])
    rows += [[label, cell, ""] for label, cell in _differences(results, names, "")]
    header = ["", "bits per byte", "perplexity by word"]
    yield TableView("How sure these figures are", caption, header, rows)
    corpora = sorted({corpus for result in results.values() for corpus in result["corpora"]})
    if len(corpora) < 2:
        return
    columns = [
        [
            *(
                [condition_name(n), shown(_of(results[n], c)["intervals"]["bits_per_byte"], "")]
                for n in names
            ),
            *_differences(results, names, c),
        ]
        for c in corpora
    ]
    rows = [[row[0][0], *(cell for _, cell in row)] for row in zip(*columns, strict=True)]
    yield TableView("By corpus: bits per byte", caption, ["", *corpora], rows)


def _differences(results: Mapping[str, Any], names: Sequence[str], corpus: str) -> list[list[str]]:
    """Labels and cells of the differences, in bits per byte."""
    return [
        [f"{condition_name(name)} - {condition_name(other)}", shown(difference, "+")]
        for name in names
        for other, difference in _of(results[name], corpus).get("differences", {}).items()
    ]


def _of(result: Mapping[str, Any], corpus: str) -> Mapping[str, Any]:
    """The figures of a corpus; "" for all together."""
    return result["corpora"][corpus] if corpus else result["all"]


def shown(figure: Mapping[str, float | None], sign: str, digits: int = 4) -> str:
    """A figure with its interval."""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "none"
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
