"""Which index shards a query visits: keys are divided by a coarse clustering, queries go to near cells.

sample of keys --k-means--> cells, 64 for each shard --near ones together, of equal size--> shards
key   --nearest cell--> its shard
query --cells by nearness--> the first few shards that they belong to
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.artefacts.manifest import Path
from data_pipelines.artefacts.stage import Stage
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.sampling import sample_ids

CELLS, SHARDS = "cells.npy", "cell-shards.npy"
_CELLS_PER_SHARD = 64
_SAMPLES_PER_CELL = 64  # keys by which a cell is placed
_ROUNDS = 10
_SLACK = 1.1  # of a shard over its equal part of the sample
_BLOCK = 4096  # keys compared with all cells at once


@dataclasses.dataclass(frozen=True)
class Routes:
    """A division of keys among shards.

    Attributes:
      cells: [c, d] float32, centres.
      shards: [c] int64, the shard of each cell; every shard has some.
    """

    cells: np.ndarray
    shards: np.ndarray

    @property
    def count(self) -> int:
        """Shards."""
        return int(self.shards.max()) + 1

    @classmethod
    def train(cls, keys: Keys, count: int, seed: int = 0) -> "Routes":
        """Divides keys among so many shards, by a sample of them; the same each time."""
        cells = count * _CELLS_PER_SHARD
        sample = keys.rows(sample_ids(len(keys), cells * _SAMPLES_PER_CELL, seed))
        sample = sample[~np.isnan(sample[:, 0])]
        centres = _k_means(sample, min(cells, len(sample)), seed)
        sizes = np.bincount(_nearest(sample, centres), minlength=len(centres))
        return cls(centres, _balanced(centres, sizes, count))

    @classmethod
    def open(cls, directory: Path) -> "Routes":
        """What `write` wrote."""
        folder = pathlib.Path(directory)
        return cls(np.load(folder / CELLS), np.load(folder / SHARDS))

    def write(self, stage: Stage) -> None:
        """Writes two files of a stage, unless they are there."""
        for name, array in ((CELLS, self.cells), (SHARDS, self.shards)):
            if stage.missing([name]):
                stage.write_array(name, array)

    def visits(self, queries: np.ndarray, most: int) -> np.ndarray:
        """[n, most] int64: the shards nearest to queries, or keys, [n, d], the nearest first."""
        most = min(most, self.count)
        order = np.argsort(self.shards, kind="stable")
        firsts = np.searchsorted(self.shards[order], np.arange(self.count))
        every, cells = [np.zeros((0, most), np.int64)], self.cells[order]
        for first in range(0, len(queries), _BLOCK):
            nearness = _nearness(queries[first : first + _BLOCK], cells)
            best = np.maximum.reduceat(nearness, firsts, axis=1)
            every.append(np.argsort(-best, axis=1, kind="stable")[:, :most])
        return np.concatenate(every)


def _nearness(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[n, c] larger for nearer centres."""
    return rows @ centres.T - 0.5 * np.einsum("cd,cd->c", centres, centres)


def _nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[n] int64: the nearest centre of each row."""
    parts = [np.zeros(0, np.int64)]
    for first in range(0, len(rows), _BLOCK):
        parts.append(_nearness(rows[first : first + _BLOCK], centres).argmax(1))
    return np.concatenate(parts)


def _k_means(rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """[count, d] float32: centres of rows [n, d], n >= count."""
    random = np.random.Generator(np.random.Philox(seed))
    centres = rows[np.sort(random.choice(len(rows), count, replace=False))]
    for _ in range(_ROUNDS):
        owners = _nearest(rows, centres)
        order = np.argsort(owners, kind="stable")
        sizes = np.bincount(owners, minlength=count)
        filled = np.flatnonzero(sizes)
        firsts = (np.cumsum(sizes) - sizes)[filled]
        sums = np.add.reduceat(rows[order], firsts, axis=0)
        centres = centres.copy()
        centres[filled] = sums / sizes[filled][:, None]
        empty = np.flatnonzero(sizes == 0)
        centres[empty] = rows[random.choice(len(rows), len(empty), replace=False)]
    return centres.astype(np.float32)


def _balanced(centres: np.ndarray, sizes: np.ndarray, count: int) -> np.ndarray:
    """[c] int64: shards of cells, near ones together; no shard has much more than its equal part."""
    places = _k_means(centres, count, 0)
    nearness = _nearness(centres, places)
    best = np.sort(nearness, axis=1)
    order = (
        np.argsort(best[:, -2] - best[:, -1], kind="stable") if count > 1 else range(len(centres))
    )
    limit, filled = _SLACK * sizes.sum() / count, np.zeros(count)
    shards = np.zeros(len(centres), np.int64)
    for cell in order:  # those that are surest of their shard choose first
        choices: Sequence[int] = np.argsort(-nearness[cell], kind="stable").tolist()
        fitting = (shard for shard in choices if filled[shard] + sizes[cell] <= limit)
        shards[cell] = next(fitting, int(filled.argmin()))
        filled[shards[cell]] += sizes[cell]
    for shard in np.setdiff1d(np.arange(count), shards).tolist():  # none stays without a cell
        fullest = np.bincount(shards, minlength=count).argmax()
        shards[np.flatnonzero(shards == fullest)[0]] = shard
    return shards
