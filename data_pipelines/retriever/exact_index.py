"""The kind of index that has no files: every key is compared, on JAX's devices."""

import functools
import pathlib

import numpy as np

from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.exact import ExactSearcher, KeyRows
from data_pipelines.retriever.index_kind import IndexPlan


class ExactIndex:
    """Keys on devices, as a `BuiltIndex`."""

    def __init__(self, keys: KeyRows | np.ndarray, recall_target: float) -> None:
        """Reads the keys when it is first asked."""
        self._keys, self._recall_target = keys, recall_target

    @functools.cached_property
    def _searcher(self) -> ExactSearcher:
        """The keys on the devices."""
        return ExactSearcher(self._keys, recall_target=self._recall_target)

    def search(
        self, queries: np.ndarray, count: int, *, widen: int = 1, exclude: np.ndarray | None = None
    ) -> Found:
        """As `Searcher`."""
        return self._searcher.search(queries, count, exclude)

    def save(self, folder: pathlib.Path) -> None:
        """Nothing: the keys have files of their own."""


class Exact:
    """As `IndexKind`."""

    excludes = True

    def plan(self, n: int, dimension: int, wanted: IndexPlan) -> IndexPlan:
        """As `IndexKind`."""
        return IndexPlan("exact", recall_target=wanted.recall_target)

    def complete(self, plan: IndexPlan) -> bool:
        """As `IndexKind`."""
        return plan.recall_target == 1

    def build(self, vectors: np.ndarray, plan: IndexPlan, training_sample: int) -> ExactIndex:
        """As `IndexKind`."""
        return ExactIndex(vectors, plan.recall_target)

    def load(self, folder: pathlib.Path, plan: IndexPlan, keys: KeyRows) -> ExactIndex:
        """As `IndexKind`."""
        return ExactIndex(keys, plan.recall_target)
