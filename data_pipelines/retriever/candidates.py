"""Ids of chunks with their scores: merged, without repetitions, and scored exactly."""

from collections.abc import Sequence

import numpy as np

Found = tuple[np.ndarray, np.ndarray]  # ids [n, k] int64, -1 for none, and scores [n, k] float32


def nothing(rows: int, k: int) -> Found:
    """No neighbours by distance: ids -1 at infinity."""
    return np.full((rows, k), -1, np.int64), np.full((rows, k), np.inf, np.float32)


def merge(found: Sequence[Found], count: int) -> Found:
    """The nearest of several searches for the same queries, equally near ones by id.

    Args:
      found: ids [n, m] and scores [n, m] of each search; -1 and infinity for none.
      count: how many to keep.

    Returns:
      ids [n, count] int64, unique in each row, and scores [n, count] float32.
    """
    ids = np.concatenate([part[0] for part in found], axis=1)
    scores = np.concatenate([part[1] for part in found], axis=1)
    order = np.lexsort((ids, scores), axis=-1)
    ids, scores = (np.take_along_axis(part, order, axis=1) for part in (ids, scores))
    again = repeated(ids)
    if again.any():
        order = np.argsort(again | (ids < 0), axis=1, kind="stable")
        ids = np.take_along_axis(np.where(again, -1, ids), order, axis=1)
        scores = np.take_along_axis(np.where(again, np.inf, scores), order, axis=1)
    if ids.shape[1] < count:
        missing = ((0, 0), (0, count - ids.shape[1]))
        ids = np.pad(ids, missing, constant_values=-1)
        scores = np.pad(scores, missing, constant_values=np.inf)
    return ids[:, :count], scores[:, :count].astype(np.float32)


def repeated(ids: np.ndarray) -> np.ndarray:
    """[n, m] bool: whether an id other than -1 occurs further left in its row too."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, bool)
    same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    np.put_along_axis(again, order[:, 1:], same, axis=1)
    return again


def first_wanted(ids: np.ndarray, wanted: np.ndarray, k: int) -> np.ndarray:
    """The first k of ids [n, m] that are wanted [n, m], in their order: [n, k], -1 for none."""
    order = np.argsort(~wanted, axis=1, kind="stable")[:, :k]
    subset = np.take_along_axis(np.where(wanted, ids, -1), order, axis=1)
    return np.pad(subset, ((0, 0), (0, k - subset.shape[1])), constant_values=-1)
