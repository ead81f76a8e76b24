"""Figures by overlap with the training data: r(C) of the scored chunks, the curve, its files."""

import csv
import dataclasses
import hashlib
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import files
from launch.arrays import read_array, write_array
from launch.splits import Split
from retro_jax.errors import UserError
from retro_jax.evaluate import leakage
from retro_jax.evaluate.line_chart import as_file
from retro_jax.evaluate.report import (
    SHOWN_OVERLAP,
    OverlapPoint,
    condition_name,
    condition_order,
    overlap_chart,
    swept,
)

PAIRS = (("on", "off"), ("on", "baseline"), ("on", "random"), ("on", "knn"))
_BLOCK = 4096  # chunks whose neighbours are in memory at once


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
    rows = [_row(point) for point in leakage.overlap_curve(chunks, pairs)]
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


def _chunks(scored: Scored) -> tuple[leakage.ScoredChunks, int]:
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
    return leakage.ScoredChunks(bits, size, owners, corpora, runs, tokens.shape[1]), neighbours


def _runs(
    folder: pathlib.Path, name: str, split: Split, tokens: np.ndarray
) -> tuple[np.ndarray, int]:
    """[n] the longest shared runs, read where they are there already, and the neighbours looked at."""
    assert split.table is not None
    k = min(leakage.NEIGHBOURS, split.table.k)
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
        runs[here] = leakage.longest_shared_runs(tokens[here], near, ignored)
    write_array(path, runs)
    return runs, k


def _row(point: leakage.Point) -> dict[str, Any]:
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


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[OverlapPoint]]:
    """The rows as the report takes them, by corpus; thresholds without any text are left out."""
    found: dict[str, list[OverlapPoint]] = {}
    for row in rows:
        if row["bytes"]:
            figures = {name: figure["value"] for name, figure in row["bits_per_byte"].items()}
            point = OverlapPoint(row["at_most"], row["chunks"], figures)
            found.setdefault(row["corpus"], []).append(point)
    return found


def format_overlap(found: Mapping[str, Any]) -> str:
    """The figures at r(C) <= 50% beside all, and the differences with their intervals, as text."""
    rows = found["rows"]
    by_place = {(row["corpus"], row["at_most"]): row for row in rows}
    lines = []
    corpora = sorted({row["corpus"] for row in rows} - {""})
    for corpus in [*corpora, ""] if len(corpora) > 1 else corpora:
        everything, few = by_place[corpus, 1.0], by_place[corpus, SHOWN_OVERLAP]
        for row, what in ((everything, "all chunks"), (few, f"r(C) <= {SHOWN_OVERLAP:.0%}")):
            share = row["chunks"] / max(1, everything["chunks"])
            head = f"{corpus or 'all'}, {what}: {row['chunks']:,} chunks ({share:.0%})"
            found_here = row["bits_per_byte"]
            figures = [f"{_label(n)} {_number(found_here[n])}" for n in swept(found_here)]
            lines.append(f"{head}: {', '.join(figures)}")
            lines += [f"    {_label(n)}: {_signed(i)}" for n, i in row["differences"].items()]
    about = (
        f"r(C): longest run of tokens shared with one of the {found['neighbours']} nearest "
        f"training neighbours, over {found['chunk_length']}. In brackets: 95% intervals over documents."
    )
    return "\n".join(["bits per byte by overlap with the training data", *lines, f"({about})"])


def _label(name: str) -> str:
    """A condition, or a difference of two, as it is shown."""
    return " - ".join(map(condition_name, name.split("-")))


def _number(interval: Mapping[str, float | None]) -> str:
    """A figure without its interval."""
    return "none" if interval["value"] is None else f"{interval['value']:.4f}"


def _signed(interval: Mapping[str, float | None]) -> str:
    """A difference with its interval."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "none"
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
