"""Windows of evaluation: their flags, and figures by how much of a window is context only."""

import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from launch import runs
from retro_jax.evaluate.report import condition_name, condition_order
from retro_jax.evaluate.score import WindowConfig

STRIDE = flags.DEFINE_integer(
    "stride_chunks",
    None,
    "Chunks that windows advance by (half the trained length).",
    lower_bound=1,
)
OVERLAP = flags.DEFINE_list(
    "overlap",
    [],
    "Shares of a window that are context only, as in 0,0.5,0.75,0.875; what is shown is of the largest, "
    "and several are also shown beside each other.",
)
WINDOW = flags.DEFINE_integer(
    "window_chunks", None, "Chunks of a window. Default: the trained length.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Windows at once, rounded up to a multiple of the devices.", lower_bound=1
)

FIGURES = {"word_perplexity": ("Perplexity by word", 2), "bits_per_byte": ("Bits per byte", 4)}


def overlaps() -> list[float | None]:
    """What --overlap asks for, ascending; None where it says nothing.

    Raises:
      flags.Error: a value that is no share.
    """
    if STRIDE.value is not None and OVERLAP.value:
        raise flags.Error("--overlap and --stride_chunks: expected one of them")
    found = []
    for value in OVERLAP.value:
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1:
            raise flags.Error(f"--overlap={value}: expected shares from 0 to 1")
        found.append(share)
    return [*sorted(set(found))] if found else [None]


def windows_of(run: runs.Run, overlap: float | None) -> WindowConfig:
    """Windows of the trained length, or of the one that is asked for.

    Raises:
      flags.Error: they do not overlap by whole chunks, or leave chunks out.
    """
    chunks = WINDOW.value or run.chunks
    stride = STRIDE.value or max(1, chunks // 2)
    if overlap is not None:
        stride = round(chunks * (1 - overlap))
        if not stride or not math.isclose(stride, chunks * (1 - overlap)):
            raise flags.Error(
                f"--overlap={overlap:g}: expected a share of {chunks} chunks, the window, that is a "
                "whole number and not all"
            )
    if stride > chunks:
        raise flags.Error(f"--stride_chunks={stride}: expected at most {chunks}, the window")
    return WindowConfig(chunks=chunks, stride=stride, batch_size=BATCH_SIZE.value)


def windows_file(folder: pathlib.Path, split: str) -> pathlib.Path:
    """Where the figures of several overlaps are, in W/evaluation."""
    return folder / f"{split}-windows.json"


def compared(by_overlap: Mapping[float, Mapping[str, Any]]) -> dict[str, Any]:
    """What the file of several overlaps holds.

    Args:
      by_overlap: results by condition, by overlap.
    """
    last = by_overlap[max(by_overlap)]
    names = ("tokens", "nats", *FIGURES)
    rows = [
        {
            "overlap": overlap,
            "figures": {
                name: {figure: result["all"][figure] for figure in names}
                for name, result in sorted(by_overlap[overlap].items())
            },
        }
        for overlap in sorted(by_overlap)
    ]
    models = {name: result["model"] for name, result in last.items()}
    return {"chunks": last_window(last), "models": models, "rows": rows}


def last_window(results: Mapping[str, Any]) -> int:
    """Chunks of a window."""
    return next(iter(results.values()))["settings"]["window_chunks"]


def tables(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, header and rows of each figure by overlap, of what `compared` found."""
    conditions = sorted(found["rows"][0]["figures"], key=condition_order)
    for figure, (title, digits) in FIGURES.items():
        rows = [
            [f"{row['overlap']:.4g}", *_cells(row["figures"], conditions, figure, digits)]
            for row in found["rows"]
        ]
        heading = f"{title}, by overlap of windows of {found['chunks']} chunks"
        yield heading, ["overlap", *map(condition_name, conditions)], rows


def _cells(
    figures: Mapping[str, Any], conditions: Sequence[str], figure: str, digits: int
) -> list[str]:
    """A figure of every condition."""
    values = [figures[name][figure] for name in conditions]
    return ["" if value is None else f"{value:.{digits}f}" for value in values]
