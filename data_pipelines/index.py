"""The ScaNN index over a database's keys: built once, published with its manifest, never rebuilt.

Which kind of index follows from the number of keys n (`plan_index`):

    n < 20,000             brute_force   every key is compared
    20,000 <= n < 100,000  hashing       all keys by 4-bit codes, the best of them again exactly
    100,000 <= n           tree          the same, within the leaves nearest to the query

Training a tree gives another result each time, so an index is identified by the hash of its files and
everything made with it names that hash.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines import files
from data_pipelines.embedder import import_tensorflow
from data_pipelines.keys import Keys
from data_pipelines.manifest import Manifest, Path, Stage
from retro_jax.config import require
from retro_jax.errors import UserError

KIND = "index"
KINDS = ("brute_force", "hashing", "tree")
CHUNK_IDS = "chunk-ids.npy"
_HASHING_FROM, _TREE_FROM = 20_000, 100_000
_CODEWORDS = 16  # of a block of dimensions in 4-bit codes: hashing needs as many keys
_NONE = float("nan")  # anisotropic quantisation is for dot products; NaN switches it off


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How the index is built; 0 leaves a choice to `plan_index`.

    Attributes:
      kind: "auto" (by the number of keys), "brute_force", "hashing" or "tree".
      num_leaves: of the tree.
      leaves_to_search: leaves that a query looks into.
      dimensions_per_block: dimensions that share one 4-bit code.
      reorder: candidates that are compared again exactly.
      training_sample: keys that leaves and codes are trained on, at most.
    """

    kind: str = "auto"
    num_leaves: int = 0
    leaves_to_search: int = 0
    dimensions_per_block: int = 0
    reorder: int = 100
    training_sample: int = 100_000

    def __post_init__(self) -> None:
        require(self.kind in ("auto", *KINDS), self, "kind", f"one of {('auto', *KINDS)}")
        for field in ("num_leaves", "leaves_to_search", "dimensions_per_block"):
            value = getattr(self, field)
            require(isinstance(value, int) and value >= 0, self, field, "a number, or 0 to choose")
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


def plan_index(n: int, dimension: int, config: IndexConfig) -> IndexPlan:
    """Chooses the index for n keys of d dimensions: the one rule.

    Codes are of 4 dimensions a block: with 100 candidates compared again exactly, recall@10 of 26,278
    MiniLM keys of code was 0.9998, and 1.0 with 2 dimensions at half the speed. A tree has 4 sqrt(n)
    leaves, of which a query looks into a tenth: recall 0.966 on those keys, 0.934 for a twentieth.

    Raises:
      UserError: the configuration asks for what n keys cannot give.
    """
    kind = config.kind
    if kind == "auto":
        kind = KINDS[int(n >= _HASHING_FROM) + int(n >= _TREE_FROM)]
    if kind == "brute_force":
        return IndexPlan(kind)
    if n < _CODEWORDS:
        raise UserError(
            f"IndexConfig.kind is {kind!r}: expected 'brute_force' or 'auto' for {n} keys "
            f"(codes need {_CODEWORDS})"
        )
    block = min(config.dimensions_per_block or 4, dimension)
    if kind == "hashing":
        return IndexPlan(kind, dimensions_per_block=block, reorder=config.reorder)
    leaves = config.num_leaves or max(1, round(4 * math.sqrt(n)))
    if leaves > n:
        raise UserError(f"IndexConfig.num_leaves is {leaves}: expected at most the {n} keys")
    searched = config.leaves_to_search or max(1, math.ceil(leaves / 10))
    return IndexPlan(kind, leaves, min(searched, leaves), block, config.reorder)


def prepare_index(directory: Path, keys: Keys, config: IndexConfig) -> Manifest:
    """Builds the index over all keys, unless it is there already.

    A run that was interrupted before the manifest was written builds anew.

    Args:
      directory: where it goes.
      keys: the database's keys.
      config: its settings.

    Returns:
      The manifest. Facts: keys (indexed), and the plan.
    """
    settings = {"config": config, "distance": "squared_l2"}
    stage = Stage(directory, KIND, settings, {"keys": (keys.manifest, keys.directory)}, claim=False)
    if stage.done:
        return stage.manifest()
    count = keys.manifest.fact("keys")
    plan = plan_index(count, keys.dimension, config)
    stage.claim()
    ids, vectors = np.empty(count, np.int64), np.empty((count, keys.dimension), np.float32)
    filled = 0
    for block_ids, block in keys.blocks():
        ids[filled : filled + len(block_ids)] = block_ids
        vectors[filled : filled + len(block_ids)] = block
        filled += len(block_ids)
    if filled != count:
        raise UserError(f"{keys.directory} holds {filled} keys: expected {count} by its manifest")
    shards = [stage.write_array(CHUNK_IDS, ids)]
    if count:
        searcher = _build(vectors, plan, config.training_sample)
        shards += stage.write_files(lambda folder: searcher.serialize(str(folder), True))
    return stage.finish({"keys": count, "plan": plan}, [shard.name for shard in shards])


class Index:
    """An opened index: queries in, chunk ids out.

    Attributes:
      directory, manifest: where it is from.
      plan: how it was built.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.plan = IndexPlan(**manifest.fact("plan"))
        self._chunk_ids = np.load(self.directory / CHUNK_IDS)

    @classmethod
    def open(cls, directory: Path, keys: Keys, *, verify: bool = False) -> "Index":
        """Opens the index over some keys.

        Raises:
          UserError: none there, damaged, or one over other keys.
        """
        parents = {"keys": (keys.manifest, keys.directory)}
        return cls(directory, Manifest.open(directory, KIND, parents, verify))

    def __reduce__(self) -> tuple[Callable[..., "Index"], tuple[str, Manifest]]:
        """Pickles by its place, so that worker processes load it themselves."""
        return Index, (files.absolute(self.directory), self.manifest)

    def __len__(self) -> int:
        """Keys."""
        return len(self._chunk_ids)

    @property
    def is_exact(self) -> bool:
        """Whether every key is compared."""
        return self.plan.kind == "brute_force"

    @functools.cached_property
    def _searcher(self) -> Any:
        """ScaNN's searcher; importing it takes seconds, so not before there is something to search."""
        return _scann().load_searcher(str(self.directory))

    def search(
        self, queries: np.ndarray, count: int, *, widen: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the nearest chunks.

        Args:
          queries: [n, d] float32, without NaN.
          count: candidates a query.
          widen: look into so many times more leaves than planned.

        Returns:
          Chunk ids [n, count] int64 and squared L2 distances [n, count] float32, ascending; -1 and
          infinity where there are no more.
        """
        ids = np.full((len(queries), count), -1, np.int64)
        distances = np.full((len(queries), count), np.inf, np.float32)
        found = min(count, len(self))
        if not (found and len(queries)):
            return ids, distances
        options: dict[str, int] = {}
        if not self.is_exact:
            options["pre_reorder_num_neighbors"] = min(max(self.plan.reorder, 2 * found), len(self))
        if self.plan.kind == "tree":
            leaves = self.plan.leaves_to_search * widen
            options["leaves_to_search"] = min(leaves, self.plan.num_leaves)
            # ScaNN may choose other leaves for a query when it comes in a batch, and then a table
            # would depend on its blocks. One at a time costs a quarter of the queries per second.
            options["batch_size"] = 1
        rows, values = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32), final_num_neighbors=found, **options
        )
        missing = np.isnan(values)  # ScaNN fills up with key 0 at distance NaN
        ids[:, :found] = np.where(missing, -1, self._chunk_ids[rows])
        distances[:, :found] = np.where(missing, np.inf, values)
        return ids, distances


def _scann() -> Any:
    """ScaNN's Python bindings."""
    import_tensorflow()  # ScaNN imports it: with our settings, or with its own
    try:
        from scann.scann_ops.py import scann_ops_pybind
    except ImportError as error:
        raise UserError(
            f"ScaNN cannot be imported ({error}): expected the extra retro-jax[data]"
        ) from None
    return scann_ops_pybind


def _build(vectors: np.ndarray, plan: IndexPlan, training_sample: int) -> Any:
    """Trains and fills the searcher."""
    builder = _scann().builder(vectors, 10, "squared_l2")
    if plan.kind == "brute_force":
        return builder.score_brute_force().build()
    sample = min(training_sample, len(vectors))
    if plan.kind == "tree":
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
    return hashed.reorder(plan.reorder).build()
