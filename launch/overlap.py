"""Figures by overlap with the training data: r(C) of the scored chunks, the curve, its files."""

import csv
import dataclasses
import hashlib
import io
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines import files
from data_pipelines.tokenizer import Tokenizer
from launch.splits import Split
from retro_jax.errors import UserError
from retro_jax.evaluate import leakage, metrics
from retro_jax.evaluate.line_chart import as_file
from retro_jax.evaluate.report import CONDITION_NAMES, SHOWN_OVERLAP, OverlapPoint, overlap_chart

_PAIRS = (("on", "off"), ("on", "baseline"))
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


def write_overlap(
    folder: pathlib.Path, name: str, split: Split, results: Mapping[str, Any], data: pathlib.Path
) -> dict[str, Any]:
    """Computes the curve of what was scored, and writes it in three forms.

    Args:
      folder: W/evaluation. name: of the split.
      split: with its neighbour table. results: by condition, of launch.evaluate.
      data: where the tokenizer is.

    Returns:
      What the JSON file holds: how it was made, and under "rows" one for each corpus ("" for all)
      and threshold.
    """
    scored, neighbours = _scored(folder, name, split, results, data)
    pairs = [pair for pair in _PAIRS if set(pair) <= set(results)]
    rows = [_row(point) for point in leakage.overlap_curve(scored, pairs)]
    paths = overlap_files(folder, name)
    found = {
        "neighbours": neighbours,
        "chunk_length": scored.chunk_length,
        "interval": "95%, percentiles of 1,000 bootstrap resamples of the documents",
        "manifests": split.hashes(True),
        "models": {name: result["model"] for name, result in results.items()},
        "rows": rows,
    }
    files.write_atomically(paths.json, files.to_json(found))
    files.write_atomically(paths.csv, _csv(rows).encode())
    files.write_atomically(paths.svg, as_file(overlap_chart(curves(rows).get("", []))).encode())
    return found


def _scored(
    folder: pathlib.Path, name: str, split: Split, results: Mapping[str, Any], data: pathlib.Path
) -> tuple[leakage.ScoredChunks, int]:
    """The scored chunks with r(C), and the number of neighbours that it is of."""
    database = split.database
    tokens, owners = database.chunks(split.ids), database.documents(split.ids)
    text = metrics.text_mask(tokens, owners, eos_id=database.eos_id, pad_id=database.pad_id)
    lengths = Tokenizer.open(data / "tokenizer").byte_lengths
    bits = {}
    for condition in sorted(results, key=list(CONDITION_NAMES).index):
        result = results[condition]
        nll = read_array(folder / result["nll"])
        if nll.shape != tokens.shape:
            raise UserError(
                f"{folder / result['nll']} is of other chunks: run launch.evaluate again"
            )
        bits[condition] = np.where(text, nll.astype(np.float64), 0.0).sum(axis=1) / math.log(2)
    corpora = np.empty(len(owners), object)
    for number in np.unique(owners):
        corpora[owners == number] = database.record(int(number)).corpus
    runs, neighbours = _runs(folder, name, split, tokens)
    size = np.where(text, lengths[tokens], 0).sum(axis=1)
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


def read_array(path: pathlib.Path) -> np.ndarray:
    """A .npy file of launch.evaluate's."""
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged: move it away and run launch.evaluate again") from error


def write_array(path: pathlib.Path, values: np.ndarray) -> None:
    """A .npy file, whole or not at all; its folder is made."""
    with files.writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    with files.temporary_name(path) as temporary:
        files.write_hashed(temporary, lambda file: np.save(file, values))
        os.replace(temporary, path)


def _row(point: leakage.Point) -> dict[str, Any]:
    """A Point for JSON, which has no NaN."""
    fields = {name: getattr(point, name) for name in ("corpus", "at_most", "documents", "chunks")}
    return {
        **fields,
        "bytes": point.bytes,
        "bits_per_byte": {name: _plain(value) for name, value in point.bits_per_byte.items()},
        "differences": {
            f"{first}-{second}": _plain(value)
            for (first, second), value in point.differences.items()
        },
    }


def _plain(interval: Any) -> dict[str, float | None]:
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
            figures = [f"{_label(n)} {_number(i)}" for n, i in row["bits_per_byte"].items()]
            lines.append(f"{head}: {', '.join(figures)}")
            lines += [f"    {_label(n)}: {_signed(i)}" for n, i in row["differences"].items()]
    about = (
        f"r(C): longest run of tokens shared with one of the {found['neighbours']} nearest "
        f"training neighbours, over {found['chunk_length']}. In brackets: 95% intervals over documents."
    )
    return "\n".join(["bits per byte by overlap with the training data", *lines, f"({about})"])


def _label(name: str) -> str:
    """A condition, or a difference of two, as it is shown."""
    return " - ".join(CONDITION_NAMES[part] for part in name.split("-"))


def _number(interval: Mapping[str, float | None]) -> str:
    """A figure without its interval."""
    return "none" if interval["value"] is None else f"{interval['value']:.4f}"


def _signed(interval: Mapping[str, float | None]) -> str:
    """A difference with its interval."""
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "none"
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
