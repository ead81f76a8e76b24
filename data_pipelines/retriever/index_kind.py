"""What a kind of index is: how it is planned for some keys, built, stored and searched.

A further kind is an `IndexKind` in a file of its own, its name and settings here, and a line in index.py's KINDS.
"""

import dataclasses
import pathlib
from typing import Protocol

import numpy as np

from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.exact import KeyRows
from retro_jax.config import require

NAMES = ("brute_force", "hashing", "tree", "exact")


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How the index is built; 0 leaves a choice to `plan_index`.

    Attributes:
      kind: "auto" (by the number of keys), "brute_force", "hashing", "tree" or "exact".
      num_leaves: leaves of the tree.
      leaves_to_search: leaves searched per query.
      dimensions_per_block: dimensions that share one 4-bit code.
      reorder: candidates that are compared again exactly.
      training_sample: keys on which leaves and codes are trained, at most.
      shard_keys: keys per index shard, at most; 0 for 3 GB of them in float32.
      recall_target: recall of the kind "exact" on TPUs; 1 for all neighbours.
    """

    kind: str = "auto"
    num_leaves: int = 0
    leaves_to_search: int = 0
    dimensions_per_block: int = 0
    reorder: int = 100
    training_sample: int = 100_000
    shard_keys: int = 0
    recall_target: float = 1.0

    def __post_init__(self) -> None:
        require(self.kind in ("auto", *NAMES), self, "kind", f"one of {('auto', *NAMES)}")
        for field in ("num_leaves", "leaves_to_search", "dimensions_per_block", "shard_keys"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 0, self, field, "a number, or 0 to choose")
        require(0 < self.recall_target <= 1, self, "recall_target", "a share from 0 to 1")
        for field in ("reorder", "training_sample"):
            require(getattr(self, field) > 0, self, field, "a positive number")


@dataclasses.dataclass(frozen=True)
class IndexPlan:
    """What is built: IndexConfig with every choice made; fields a kind has no use for are 0."""

    kind: str
    num_leaves: int = 0
    leaves_to_search: int = 0
    dimensions_per_block: int = 0
    reorder: int = 0
    recall_target: float = 1.0


class Searcher(Protocol):
    """An index in memory."""

    def search(
        self, queries: np.ndarray, count: int, *, widen: int = 1, exclude: np.ndarray | None = None
    ) -> Found:
        """Finds the nearest keys.

        Args:
          queries: [n, d] float32, without NaN.
          count: candidates a query, at most the number of keys.
          widen: look into so many times more of the index than planned.
          exclude: [n] documents whose keys each query must not be given; for kinds that exclude.

        Returns:
          Places [n, count] int64 of the keys and squared L2 distances [n, count] float32, ascending;
          -1 and infinity where there are no more.
        """
        ...


class BuiltIndex(Searcher, Protocol):
    """A searcher that was just built."""

    def save(self, folder: pathlib.Path) -> None:
        """Writes its files, if it has any, into an empty folder: the same on any machine and path."""
        ...


class IndexKind(Protocol):
    """A way to index keys.

    Attributes:
      excludes: whether its searchers leave removed and excluded documents out themselves; others are
        asked for more candidates than are wanted.
    """

    @property
    def excludes(self) -> bool: ...

    def plan(self, n: int, dimension: int, config: IndexConfig) -> IndexPlan:
        """The settings for n keys of d dimensions; a UserError for what they cannot give."""
        ...

    def complete(self, plan: IndexPlan) -> bool:
        """Whether every true neighbour is found."""
        ...

    def build(self, vectors: np.ndarray, plan: IndexPlan, training_sample: int) -> BuiltIndex:
        """Trains and fills an index over keys [n, d] float32."""
        ...

    def load(self, folder: pathlib.Path, plan: IndexPlan, keys: KeyRows) -> Searcher:
        """The index whose files are in a folder, over some keys."""
        ...
