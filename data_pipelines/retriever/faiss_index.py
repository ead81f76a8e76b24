"""FAISS's index of keys by leaves, for machines that ScaNN has no wheel for (extra `faiss`).

Keys are divided among the leaves of a k-means tree of one level, and those of the leaves nearest to a query
are compared exactly (IVF, Flat).
"""

import dataclasses
import math
import pathlib
from typing import Any, ClassVar

import numpy as np

from data_pipelines.retriever.candidates import Found, nothing
from data_pipelines.retriever.exact import KeyRows
from data_pipelines.retriever.index_kind import IndexPlan
from retro_jax.errors import UserError

_FILE = "index.faiss"
_KEYS_PER_LEAF = 39  # fewer to train on, and FAISS warns


class FaissIndex:
    """FAISS's index under a plan, as a `BuiltIndex`."""

    def __init__(self, index: Any, plan: IndexPlan) -> None:
        """Takes an index over some keys."""
        self._index, self._plan = index, plan

    def search(
        self, queries: np.ndarray, count: int, *, widen: int = 1, exclude: np.ndarray | None = None
    ) -> Found:
        """As `Searcher`."""
        results = nothing(len(queries), count)
        limit = min(count, self._index.ntotal)
        if not (limit and len(queries)):
            return results
        leaves = min(self._plan.leaves_to_search * widen, self._plan.num_leaves)
        options = import_faiss().SearchParametersIVF(nprobe=leaves)
        vectors = np.ascontiguousarray(queries, np.float32)
        distances, places = self._index.search(vectors, limit, params=options)
        missing = places < 0
        results[0][:, :limit] = places
        # FAISS subtracts products, which may leave a little less than nothing.
        results[1][:, :limit] = np.where(missing, np.inf, np.maximum(distances, 0))
        return results

    def save(self, folder: pathlib.Path) -> None:
        """As `BuiltIndex`."""
        import_faiss().write_index(self._index, str(folder / _FILE))


@dataclasses.dataclass(frozen=True)
class Faiss:
    """As `IndexKind`."""

    excludes: ClassVar[bool] = False

    def plan(self, n: int, dimension: int, wanted: IndexPlan) -> IndexPlan:
        """As `IndexKind`."""
        leaves = wanted.num_leaves or max(1, min(round(math.sqrt(n)), n // _KEYS_PER_LEAF))
        if leaves > max(1, n):
            raise UserError(f"IndexConfig.num_leaves is {leaves}: expected at most the {n} keys")
        searched = wanted.leaves_to_search or max(1, math.ceil(leaves / 8))
        return IndexPlan("faiss", leaves, min(searched, leaves))

    def complete(self, plan: IndexPlan) -> bool:
        """As `IndexKind`."""
        return plan.leaves_to_search == plan.num_leaves

    def build(self, vectors: np.ndarray, plan: IndexPlan, training_sample: int) -> FaissIndex:
        """As `IndexKind`."""
        faiss, vectors = import_faiss(), np.ascontiguousarray(vectors, np.float32)
        coarse = faiss.IndexFlatL2(vectors.shape[1])
        index = faiss.IndexIVFFlat(coarse, vectors.shape[1], plan.num_leaves, faiss.METRIC_L2)
        sample = max(plan.num_leaves, min(training_sample, len(vectors)))
        stride = max(1, len(vectors) // sample)
        index.train(vectors[::stride])
        index.add(vectors)
        return FaissIndex(index, plan)

    def load(self, folder: pathlib.Path, plan: IndexPlan, keys: KeyRows) -> FaissIndex:
        """As `IndexKind`."""
        path = folder / _FILE
        try:
            index = import_faiss().read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path} cannot be read: expected an index of FAISS") from error
        if index.ntotal != len(keys):
            raise UserError(f"{path} has {index.ntotal} keys: expected {len(keys)}")
        return FaissIndex(index, plan)


def import_faiss() -> Any:
    """FAISS's Python module."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"FAISS cannot be imported ({error}): expected the extra retro-jax[faiss]"
        ) from None
    return faiss
