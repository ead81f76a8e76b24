"""What a kind of index is: how it is planned for some keys, built, stored and searched.

A further kind is an `IndexKind` in a file of its own, and a line in index_config.py's KINDS.
"""

import dataclasses
import pathlib
from typing import Protocol

import numpy as np

from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.exact import KeyRows


@dataclasses.dataclass(frozen=True)
class IndexPlan:
    """The numbers of an index; fields a kind has no use for are 0. Attributes as in IndexConfig."""

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

    def plan(self, n: int, dimension: int, wanted: IndexPlan) -> IndexPlan:
        """The settings for n keys of d dimensions; a UserError for what they cannot give.

        Args:
          n, dimension: of the keys. wanted: as IndexConfig has them; 0 leaves the choice.
        """
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
