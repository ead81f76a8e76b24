"""The kinds of index, their settings, and the one rule that chooses among them.

Which kind of index some keys get follows from its number of keys n (`plan_index`):

    n < 20,000             brute_force   every key is compared
    20,000 <= n < 100,000  hashing       all keys by 4-bit codes, the best of them again exactly
    100,000 <= n           tree          the same, within the leaves nearest to the query

and "exact", which is chosen by name only, compares every key on JAX's devices without ScaNN: for offline
stages that run where the accelerators are. "faiss", by name too, is for machines without ScaNN. `KINDS` names the file of each.
"""

import dataclasses

from data_pipelines.retriever.exact_index import Exact
from data_pipelines.retriever.faiss_index import Faiss
from data_pipelines.retriever.index_kind import IndexKind, IndexPlan
from data_pipelines.retriever.scann_index import Scann
from retro_jax.config import require

KINDS: dict[str, IndexKind] = {
    "brute_force": Scann("brute_force"),
    "hashing": Scann("hashing"),
    "tree": Scann("tree"),
    "exact": Exact(),
    "faiss": Faiss(),
}
_HASHING_FROM, _TREE_FROM = 20_000, 100_000


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How the index is built; 0 leaves a choice to `plan_index`.

    Attributes:
      kind: "auto" (by the number of keys), "brute_force", "hashing", "tree", "exact" or "faiss".
      num_leaves: leaves of the tree, or of "faiss".
      leaves_to_search: leaves searched per query.
      dimensions_per_block: dimensions that share one 4-bit code.
      reorder: candidates that are compared again exactly.
      training_sample: keys on which leaves and codes are trained, at most.
      shard_keys: keys per index shard, at most; 0 for 3 GB of them in float32.
      recall_target: recall of the kind "exact" on TPUs; 1 for all neighbours.
      visit_shards: index shards that a query visits, the nearest of several that keys are divided among
        by a coarse clustering; 0 visits all, and divides keys by the order of their chunks.
      shard_copies: with `visit_shards`, how many of the nearest index shards have a key: more of its
        neighbours are found in few shards, and the index is so many times as large.
    """

    kind: str = "auto"
    num_leaves: int = 0
    leaves_to_search: int = 0
    dimensions_per_block: int = 0
    reorder: int = 100
    training_sample: int = 100_000
    shard_keys: int = 0
    recall_target: float = 1.0
    visit_shards: int = 0
    shard_copies: int = 1

    def __post_init__(self) -> None:
        require(self.kind in ("auto", *KINDS), self, "kind", f"one of {('auto', *KINDS)}")
        numbers = ("num_leaves", "leaves_to_search", "dimensions_per_block", "shard_keys")
        for field in (*numbers, "visit_shards"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 0, self, field, "a number, or 0 to choose")
        require(0 < self.recall_target <= 1, self, "recall_target", "a share from 0 to 1")
        for field in ("reorder", "training_sample", "shard_copies"):
            require(getattr(self, field) > 0, self, field, "a positive number")


def plan_index(n: int, dimension: int, config: IndexConfig) -> IndexPlan:
    """Chooses the index for n keys of d dimensions: the one rule.

    Raises:
      UserError: the configuration asks for what n keys cannot give.
    """
    kind = config.kind
    if kind == "auto":
        kind = "tree" if n >= _TREE_FROM else "hashing" if n >= _HASHING_FROM else "brute_force"
    plan = IndexPlan(
        kind,
        config.num_leaves,
        config.leaves_to_search,
        config.dimensions_per_block,
        config.reorder,
        config.recall_target,
    )
    return KINDS[kind].plan(n, dimension, plan)
