"""The files of W/evaluation that several commands read or write; W/samples is beside it."""

import csv
import dataclasses
import io
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluate import overlap, size_law
from retro_jax.evaluate.scored_text import ScoredText
from retro_jax.evaluate.uncertainty import compared_pairs, plain
from retro_jax.report.cost_view import cost_chart, cost_table
from retro_jax.report.evaluation_tables import curves, losses_of
from retro_jax.report.html import overlap_chart
from retro_jax.report.line_chart import as_file
from retro_jax.report.views import Table
from retro_jax.storage import files

EVALUATION, SAMPLES = "evaluation", "samples"  # folders of a workdir
RESULT_FIELDS = ("settings", "model", "corpora", "all", "nll")  # of every result
SAMPLE_FIELDS = ("model", "sampling", "samples", "neighbours")  # of every file of samples


_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class OverlapFiles:
    """Where the curve of a split goes: figures as JSON and CSV, and the plot."""

    json: pathlib.Path
    csv: pathlib.Path
    svg: pathlib.Path


def overlap_files(folder: pathlib.Path, split: str) -> OverlapFiles:
    """The files of a split's curve in W/evaluation."""
    return OverlapFiles(*(folder / f"{split}-overlap.{end}" for end in ("json", "csv", "svg")))


def answers_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Where the answers to questions of a name are, in W/evaluation."""
    return folder / f"answers-{name}.json"


def windows_file(folder: pathlib.Path, split: str) -> pathlib.Path:
    """Where the figures of several overlaps are, in W/evaluation."""
    return folder / f"{split}-windows.json"


def revisions_file(folder: pathlib.Path, split: str) -> pathlib.Path:
    """Where the figures of several revisions are, in W/evaluation."""
    return folder / f"{split}-revisions.json"


def read_results(folder: pathlib.Path, split: str) -> dict[str, Any]:
    """The last results of launch.evaluate of a split, by condition.

    Args:
      folder: W/evaluation.

    Raises:
      UserError: there are none.
    """
    path = folder / f"{split}.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the result of launch.evaluate")
    results = files.read_json(path)
    whole = all(
        isinstance(each, dict) and set(RESULT_FIELDS) <= set(each) for each in results.values()
    )
    if not (results and whole):
        raise UserError(f"{path} has no results by condition: expected those of launch.evaluate")
    return results


def read_losses(folder: pathlib.Path, result: Mapping[str, Any]) -> np.ndarray:
    """The losses [n, 64] of a result in W/evaluation, in nats a token.

    Raises:
      UserError: the file is not the one that the result was made with.
    """
    path = folder / result["nll"]
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the losses of launch.evaluate")
    known = result.get("nll_sha256")  # not of earlier versions
    if known is not None and known != files.measure(path)[1]:
        raise UserError(
            f"{path} is not what {path.stem}.json was made with: move both away and run"
            " launch.evaluate again"
        )
    return files.read_array(path)


def read_figures(path: pathlib.Path, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures of a file beside results, where they are of the same losses.

    Args:
      path: of figures by overlap of windows, by revision, or by overlap with the training data.
      results: of launch.evaluate, by condition.

    Returns:
      None, with a warning, where they are of other results; None where there is no file.
    """
    if not path.is_file():
        return None
    figures = files.read_json(path, "models", "rows")
    nll = figures.get("nll")
    same = figures["models"] == {name: result["model"] for name, result in results.items()}
    if nll is not None:
        same = nll == losses_of(results)
    elif same:  # of a version that did not name the losses
        bits = _bits(figures["rows"])
        same = all(_close(bits[name], result["all"]) for name, result in results.items())
    if not same:
        _logger.warning("%s is of other results, and left out", path)
    return figures if same else None


def read_comparisons(folder: pathlib.Path, split: str, results: Mapping[str, Any]) -> list[Any]:
    """The files of launch.compare in W/evaluation of a split's results, and not of older ones."""
    comparisons = []
    for path in sorted(folder.glob(f"{split}-*-against-*.json")):
        each = files.read_json(path, "conditions")
        condition = each["conditions"][0]
        is_comparison = path.name.startswith(f"{split}-{condition}-against-") and "other" in each
        if is_comparison and condition in results and _is_first(each, results[condition]):
            comparisons.append(each)
    return comparisons


def _is_first(comparison: Mapping[str, Any], result: Mapping[str, Any]) -> bool:
    """Whether a result is the first of a comparison's two."""
    if "nll" in comparison:
        return comparison["nll"][0] == result["nll"]
    scored = result["all"]  # of a version that did not name the losses
    same = all(comparison[name] == scored[name] for name in ("documents", "bytes"))
    same &= _close(comparison["bits_per_byte"][0], scored)
    return same and comparison["models"][0] == result["model"]


def _bits(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Bits per byte by condition of the row that is of the results themselves."""
    row = next(
        (row for row in rows if (row.get("corpus"), row.get("at_most")) == ("", 1.0)), rows[-1]
    )
    if "figures" in row:
        return {name: each["bits_per_byte"] for name, each in row["figures"].items()}
    return {name: each["value"] for name, each in row["bits_per_byte"].items()}


def _close(bits: float | None, scored: Mapping[str, Any]) -> bool:
    """Whether bits per byte are those of a result, but for the order of the sum."""
    other = scored["bits_per_byte"]
    if bits is None or other is None:
        return bits is other
    return math.isclose(bits, other, rel_tol=1e-9)


def write_costs(folder: pathlib.Path, split: str, results: Mapping[str, Any]) -> Table | None:
    """Writes the chart of cost against bits; returns the table, None where no cost is known."""
    chart = cost_chart(results)
    if chart is not None:
        files.write_atomically(folder / f"{split}-cost.svg", as_file(chart.svg).encode())
    return cost_table(results)


def write_size_law(folder: pathlib.Path, split: str, scored: ScoredText) -> dict[str, Any] | None:
    """Writes SPLIT-size.json where enough shares of the database were scored; returns its contents."""
    law = size_law.size_law(scored)
    if law is None:
        return None
    contents = {"source": scored.source, **law}
    files.write_atomically(folder / f"{split}-size.json", files.to_json(contents))
    return contents


def write_overlap(
    folder: pathlib.Path, scored: ScoredText, models: Mapping[str, Any]
) -> dict[str, Any]:
    """Computes the curve of a text that was scored with its neighbours, and writes it in three forms.

    Args:
      folder: W/evaluation. scored: the sums. models: identity of the model of each condition.

    Returns:
      The contents of the JSON file: its origin, and under "rows" one for each corpus ("" for all)
      and threshold.
    """
    assert scored.overlap is not None
    pairs = compared_pairs(scored.conditions)
    rows = [_row(point) for point in overlap.overlap_curve(scored.overlap, pairs)]
    paths = overlap_files(folder, scored.source["split"])
    contents = {
        "neighbours": scored.overlap.neighbours,
        "chunk_length": scored.overlap.chunk_length,
        "interval": "95%, percentiles of 1,000 bootstrap resamples of the documents",
        "manifests": {kind: scored.source[kind] for kind in ("chunks", "neighbours")},
        "models": dict(models),
        "nll": {name: each["nll"] for name, each in scored.source["conditions"].items()},
        "rows": rows,
    }
    files.write_atomically(paths.json, files.to_json(contents))
    files.write_atomically(paths.csv, _csv(rows).encode())
    files.write_atomically(paths.svg, as_file(overlap_chart(curves(rows).get("", []))).encode())
    return contents


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
