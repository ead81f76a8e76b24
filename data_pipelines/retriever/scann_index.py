"""ScaNN's kinds of index: every key compared, all keys by 4-bit codes, or codes within a tree's leaves.

Codes have 4 dimensions per block, d at most: with 100 candidates compared again exactly, recall@10 of
26,278 MiniLM keys of code was 0.9998, and 1.0 with 2 dimensions at half the speed. A tree has sqrt(n)
leaves, of which a query looks into an eighth; 4 sqrt(n) leaves give the same recall at two thirds of the
speed (docs/performance.md).
"""

import dataclasses
import math
import pathlib
from typing import Any, ClassVar

import numpy as np

from data_pipelines.retriever.candidates import Found, nothing
from data_pipelines.retriever.embedder import import_tensorflow
from data_pipelines.retriever.exact import KeyRows
from data_pipelines.retriever.index_kind import IndexPlan
from retro_jax.errors import UserError

_CODEWORDS = 16  # of a block of dimensions in 4-bit codes: hashing needs as many keys
_NONE = float("nan")  # anisotropic quantisation is for dot products; NaN switches it off


class ScannIndex:
    """ScaNN's searcher under a plan, as a `BuiltIndex`."""

    def __init__(self, searcher: Any, plan: IndexPlan, keys: int) -> None:
        """Takes a searcher over so many keys."""
        self._searcher, self._plan, self._keys = searcher, plan, keys

    def planned(self, plan: IndexPlan) -> "ScannIndex":
        """The same searched by other settings: leaves to search, candidates to compare again."""
        return ScannIndex(self._searcher, plan, self._keys)

    def search(
        self, queries: np.ndarray, count: int, *, widen: int = 1, exclude: np.ndarray | None = None
    ) -> Found:
        """As `Searcher`."""
        results, plan = nothing(len(queries), count), self._plan
        limit = min(count, self._keys)
        if not (limit and len(queries)):
            return results
        options: dict[str, int] = {}
        if plan.reorder:
            options["pre_reorder_num_neighbors"] = min(max(plan.reorder, 2 * limit), self._keys)
        if plan.kind == "tree":
            options["leaves_to_search"] = min(plan.leaves_to_search * widen, plan.num_leaves)
            # ScaNN may choose other leaves for a query when it comes in a batch, and then a table
            # would depend on its blocks. One at a time costs a quarter of the queries per second.
            options["batch_size"] = 1
        places, distances = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32), final_num_neighbors=limit, **options
        )
        missing = np.isnan(distances)  # ScaNN fills up with key 0 at distance NaN
        results[0][:, :limit] = np.where(missing, -1, places.astype(np.int64))
        results[1][:, :limit] = np.where(missing, np.inf, distances)
        return results

    def save(self, folder: pathlib.Path) -> None:
        """As `BuiltIndex`."""
        self._searcher.serialize(str(folder), True)  # with relative paths


@dataclasses.dataclass(frozen=True)
class Scann:
    """One of ScaNN's kinds, as `IndexKind`.

    Attributes:
      name: "brute_force", "hashing" or "tree".
    """

    name: str
    excludes: ClassVar[bool] = False

    def plan(self, n: int, dimension: int, wanted: IndexPlan) -> IndexPlan:
        """As `IndexKind`."""
        if self.name == "brute_force":
            return IndexPlan(self.name)
        if n < _CODEWORDS:
            raise UserError(
                f"IndexConfig.kind is {self.name!r}: expected 'brute_force' or 'auto' for {n} keys "
                f"(codes need {_CODEWORDS})"
            )
        block = min(wanted.dimensions_per_block or 4, dimension)
        if self.name == "hashing":
            return IndexPlan(self.name, dimensions_per_block=block, reorder=wanted.reorder)
        leaves = wanted.num_leaves or max(1, round(math.sqrt(n)))
        if leaves > n:
            raise UserError(f"IndexConfig.num_leaves is {leaves}: expected at most the {n} keys")
        searched = wanted.leaves_to_search or max(1, math.ceil(leaves / 8))
        return IndexPlan(self.name, leaves, min(searched, leaves), block, wanted.reorder)

    def complete(self, plan: IndexPlan) -> bool:
        """As `IndexKind`."""
        return self.name == "brute_force"

    def build(self, vectors: np.ndarray, plan: IndexPlan, training_sample: int) -> ScannIndex:
        """As `IndexKind`."""
        builder = import_scann().builder(vectors, 10, "squared_l2")
        sample = min(training_sample, len(vectors))
        if self.name == "brute_force":
            return ScannIndex(builder.score_brute_force().build(), plan, len(vectors))
        if self.name == "tree":
            builder = builder.tree(
                num_leaves=plan.num_leaves,
                num_leaves_to_search=plan.leaves_to_search,
                training_sample_size=sample,
            )
        hashed = builder.score_ah(
            plan.dimensions_per_block,
            anisotropic_quantization_threshold=_NONE,
            training_sample_size=sample,
        )
        return ScannIndex(hashed.reorder(plan.reorder).build(), plan, len(vectors))

    def load(self, folder: pathlib.Path, plan: IndexPlan, keys: KeyRows) -> ScannIndex:
        """As `IndexKind`."""
        return ScannIndex(import_scann().load_searcher(str(folder)), plan, len(keys))


def import_scann() -> Any:
    """ScaNN's Python bindings; importing them takes seconds."""
    import_tensorflow()  # ScaNN imports it: with our settings, or with its own
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"ScaNN cannot be imported ({error}): expected the extra retro-jax[data]"
        ) from None
    return scann_ops_pybind
