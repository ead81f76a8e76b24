"""Rows of an array stored in shards, each a memory map."""

from collections.abc import Callable, Sequence

import numpy as np


def bounds_of(shards: Sequence[np.ndarray]) -> np.ndarray:
    """[shards + 1] int64: where each shard begins in the whole, and where the last one ends."""
    return np.cumsum([0, *(len(shard) for shard in shards)])


def gather(
    shards: Sequence[np.ndarray],
    bounds: np.ndarray,
    ids: np.ndarray,
    rows: np.ndarray,
    *,
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> None:
    """Fills rows[i] with row ids[i] of the whole, where ids[i] is not negative.

    Reads each shard once, in the order of the disk: with ids that touch many shards
    this takes the time of a sort, not of a pass over the ids for each shard.

    Args:
      shards, bounds: the whole, and `bounds_of` it.
      ids: [n] int64, less than the last bound.
      rows: [n, ...] to be filled; the columns that it has are taken.
      convert: from stored rows to those of the result.
    """
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    cuts = np.searchsorted(ordered, bounds)
    columns = (slice(None), slice(rows.shape[1])) if rows.ndim > 1 else (slice(None),)
    for shard in np.flatnonzero(np.diff(cuts)).tolist():
        part = slice(cuts[shard], cuts[shard + 1])
        stored = shards[shard][ordered[part] - bounds[shard]]
        rows[order[part]] = convert(stored[columns])
