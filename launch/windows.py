"""Windows of evaluation: their flags, and figures by how much of a window is context only."""

import math

from absl import flags

from launch.runs import trained_run
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


def windows_of(run: trained_run.Run, overlap: float | None) -> WindowConfig:
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
