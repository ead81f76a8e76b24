"""How sure every figure of an evaluation is: 95% intervals of a bootstrap over documents.

All conditions share their resamples, drawn corpus by corpus with the seeds of the figures by overlap,
so that an interval stands for one and the same set of texts wherever it is shown.
"""

import csv
import dataclasses
import hashlib
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.evaluation.splits import Split
from retro_jax.errors import UserError
from retro_jax.evaluate import overlap
from retro_jax.evaluate.bootstrap import intervals, resampled_sums
from retro_jax.evaluate.conditions import condition_order
from retro_jax.report.html import overlap_chart
from retro_jax.report.line_chart import as_file
from retro_jax.report.tables import curves
from retro_jax.storage import files
from retro_jax.storage.files import read_array, write_array

PAIRS = (("on", "off"), ("on", "baseline"), ("on", "random"), ("on", "knn"))
_BLOCK = 4096  # chunks whose neighbours are in memory at once

SAMPLES = 1000
_DENOMINATORS = ("bytes", "words", "tokens")  # the columns before the conditions' nats


@dataclasses.dataclass(frozen=True)
class OverlapFiles:
    """Where the curve of a split goes: figures as JSON and CSV, and the plot."""

    json: pathlib.Path
    csv: pathlib.Path
    svg: pathlib.Path


def overlap_files(folder: pathlib.Path, split: str) -> OverlapFiles:
    """The files of a split's curve in W/evaluation."""
    return OverlapFiles(*(folder / f"{split}-overlap.{end}" for end in ("json", "csv", "svg")))


@dataclasses.dataclass(frozen=True)
class Scored:
    """What was scored.

    Attributes:
      folder: W/evaluation. split: with its neighbour table. text: [n, 64] bool, the tokens that count.
      byte_lengths: [V] of the tokenizer. results: by condition, of launch.evaluate.
    """

    folder: pathlib.Path
    split: Split
    text: np.ndarray
    byte_lengths: np.ndarray
    results: Mapping[str, Any]


def write_overlap(scored: Scored) -> dict[str, Any]:
    """Computes the curve of what was scored, and writes it in three forms.

    Returns:
      What the JSON file holds: how it was made, and under "rows" one for each corpus ("" for all)
      and threshold.
    """
    chunks, neighbours = _chunks(scored)
    pairs = [pair for pair in PAIRS if set(pair) <= set(scored.results)]
    rows = [_row(point) for point in overlap.overlap_curve(chunks, pairs)]
    paths = overlap_files(scored.folder, scored.split.name)
    found = {
        "neighbours": neighbours,
        "chunk_length": chunks.chunk_length,
        "interval": "95%, percentiles of 1,000 bootstrap resamples of the documents",
        "manifests": scored.split.hashes(True),
        "models": {name: result["model"] for name, result in scored.results.items()},
        "rows": rows,
    }
    files.write_atomically(paths.json, files.to_json(found))
    files.write_atomically(paths.csv, _csv(rows).encode())
    files.write_atomically(paths.svg, as_file(overlap_chart(curves(rows).get("", []))).encode())
    return found


def _chunks(scored: Scored) -> tuple[overlap.ScoredChunks, int]:
    """The scored chunks with r(C), and the number of neighbours that it is of."""
    split, folder = scored.split, scored.folder
    tokens, owners = split.database.chunks(split.ids), split.database.documents(split.ids)
    bits = {}
    for condition in sorted(scored.results, key=condition_order):
        path = folder / scored.results[condition]["nll"]
        nll = read_array(path)
        if nll.shape != tokens.shape:
            raise UserError(
                f"{path} is of other chunks: move it away and run launch.evaluate again"
            )
        nats = np.where(scored.text, nll.astype(np.float64), 0.0).sum(axis=1)
        bits[condition] = nats / math.log(2)
    records = split.records()
    corpora = np.array([records[number].corpus for number in owners.tolist()])
    size = np.where(scored.text, scored.byte_lengths[tokens], 0).sum(axis=1)
    runs, neighbours = _runs(folder, split.name, split, tokens)
    return overlap.ScoredChunks(bits, size, owners, corpora, runs, tokens.shape[1]), neighbours


def _runs(
    folder: pathlib.Path, name: str, split: Split, tokens: np.ndarray
) -> tuple[np.ndarray, int]:
    """[n] the longest shared runs, read where they are there already, and the neighbours looked at."""
    assert split.table is not None
    k = min(overlap.NEIGHBOURS, split.table.k)
    database = split.database
    ignored = {database.pad_id, database.bos_id, database.eos_id}
    chosen = hashlib.sha256(split.ids.tobytes()).hexdigest()
    path = folder / f"{name}-runs-{k}-{split.table.manifest.hash[:12]}-{chosen[:12]}.npy"
    if path.is_file():
        return read_array(path), k
    runs = np.zeros(len(tokens), np.int64)
    for first in range(0, len(tokens), _BLOCK):
        here = slice(first, first + _BLOCK)
        near = split.neighbours(split.ids[here], k)
        runs[here] = overlap.longest_shared_runs(tokens[here], near, ignored)
    write_array(path, runs)
    return runs, k


def _row(point: overlap.Point) -> dict[str, Any]:
    """A Point for JSON, which has no NaN."""
    fields = {name: getattr(point, name) for name in ("corpus", "at_most", "documents", "chunks")}
    return {
        **fields,
        "bytes": point.bytes,
        "bits_per_byte": {name: plain(value) for name, value in point.bits_per_byte.items()},
        "differences": {
            f"{first}-{second}": plain(value)
            for (first, second), value in point.differences.items()
        },
    }


def plain(interval: Any) -> dict[str, float | None]:
    """An Interval for JSON."""
    return {n: v if math.isfinite(v) else None for n, v in dataclasses.asdict(interval).items()}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each row, with the figures in columns of their own."""
    lines = []
    for row in rows:
        line = {name: row[name] for name in ("corpus", "at_most", "documents", "chunks", "bytes")}
        line["corpus"] = row["corpus"] or "all"
        for figure, interval in [*row["bits_per_byte"].items(), *row["differences"].items()]:
            line |= {figure: interval["value"]}
            line |= {f"{figure}_{end}": interval[end] for end in ("low", "high")}
        lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


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
