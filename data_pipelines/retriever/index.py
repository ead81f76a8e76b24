"""The ScaNN index over a database's keys: built once, published with its manifest, never rebuilt.

More keys than fit into memory at once are cut into index shards, each of a range of chunk ids, each
built, published and loaded by itself; a search merges what each finds.

Which kind of index a shard has follows from its number of keys n (`plan_index`):

    n < 20,000             brute_force   every key is compared
    20,000 <= n < 100,000  hashing       all keys by 4-bit codes, the best of them again exactly
    100,000 <= n           tree          the same, within the leaves nearest to the query

and "exact", which is chosen by name only, compares every key on JAX's devices without ScaNN: for offline
stages that run where the accelerators are.

Codes are of 4 dimensions a block, d at most. Training a tree gives another result each time, so an index is identified by the hash of its files and
everything made with it names that hash.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path, Stage
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.retriever.embedder import import_tensorflow
from data_pipelines.retriever.exact import ExactSearcher
from data_pipelines.retriever.keys import BLOCK, Keys
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "index"
KINDS = ("brute_force", "hashing", "tree", "exact")
CHUNK_IDS = "chunk-ids.npy"
_HASHING_FROM, _TREE_FROM = 20_000, 100_000
_SHARD_BYTES = 3 << 30  # of an index shard's keys in float32; building takes about three times that
_CODEWORDS = 16  # of a block of dimensions in 4-bit codes: hashing needs as many keys
_NONE = float("nan")  # anisotropic quantisation is for dot products; NaN switches it off


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
        require(self.kind in ("auto", *KINDS), self, "kind", f"one of {('auto', *KINDS)}")
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


def plan_index(n: int, dimension: int, config: IndexConfig) -> IndexPlan:
    """Chooses the index for n keys of d dimensions: the one rule.

    Codes are of 4 dimensions a block: with 100 candidates compared again exactly, recall@10 of 26,278
    MiniLM keys of code was 0.9998, and 1.0 with 2 dimensions at half the speed. A tree has sqrt(n)
    leaves, of which a query looks into an eighth; 4 sqrt(n) leaves give the same recall at two thirds
    of the speed (docs/performance.md).

    Raises:
      UserError: the configuration asks for what n keys cannot give.
    """
    kind = config.kind
    if kind == "auto":
        kind = KINDS[int(n >= _HASHING_FROM) + int(n >= _TREE_FROM)]
    if kind in ("brute_force", "exact"):
        return IndexPlan(kind, recall_target=config.recall_target if kind == "exact" else 1.0)
    if n < _CODEWORDS:
        raise UserError(
            f"IndexConfig.kind is {kind!r}: expected 'brute_force' or 'auto' for {n} keys "
            f"(codes need {_CODEWORDS})"
        )
    block = min(config.dimensions_per_block or 4, dimension)
    if kind == "hashing":
        return IndexPlan(kind, dimensions_per_block=block, reorder=config.reorder)
    leaves = config.num_leaves or max(1, round(math.sqrt(n)))
    if leaves > n:
        raise UserError(f"IndexConfig.num_leaves is {leaves}: expected at most the {n} keys")
    searched = config.leaves_to_search or max(1, math.ceil(leaves / 8))
    return IndexPlan(kind, leaves, min(searched, leaves), block, config.reorder)


def plan_shards(chunks: int, keys: int, dimension: int, config: IndexConfig) -> list[range]:
    """Cuts the chunk ids of a database into the ranges of its index shards, of about equal size."""
    most = config.shard_keys or max(1, _SHARD_BYTES // (4 * dimension))
    count = max(1, -(-keys // most))
    cuts = [chunks * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def prepare_index(
    directory: Path, keys: Keys, config: IndexConfig, *, runner: Runner = InProcess()
) -> Manifest:
    """Builds the index over all keys, or the shards that are missing of it.

    A shard that was interrupted before its manifest was written is built anew.

    Args:
      directory: where it goes: the index itself, or a directory for each of several shards.
      keys: the database's keys.
      config: its settings.
      runner: where shards are built.

    Returns:
      The manifest. Facts: keys (indexed), and the plan; of several shards the largest one's plan, and
      the hash of each.
    """
    count = keys.manifest.fact("keys")
    ranges = plan_shards(len(keys), count, keys.dimension, config)
    if len(ranges) == 1:
        return _build_shard(directory, keys, config, ranges[0])
    settings = _settings(config) | {"shards": len(ranges)}
    stage = Stage(directory, KIND, settings, {"keys": (keys.manifest, keys.directory)}, claim=False)
    if stage.done:
        return stage.manifest()
    for ids in ranges:
        plan_index(min(len(ids), count), keys.dimension, config)
    stage.claim()
    work = BuildShard(files.absolute(directory), keys, config, tuple(ranges))
    numbers = range(len(ranges))
    missing = [i for i in numbers if not (stage.directory / _folder(i) / MANIFEST_FILE).is_file()]
    sizes = [len(ids) for ids in ranges]
    run_counted(runner, work, missing, sizes, what="index", unit="chunk")
    parts = [Manifest.open(stage.directory / _folder(i), KIND) for i in numbers]
    facts = {
        "keys": sum(part.fact("keys") for part in parts),
        "plan": max(parts, key=lambda part: part.fact("keys")).fact("plan"),
        "shards": [part.hash for part in parts],
    }
    return stage.finish(facts, [])


@dataclasses.dataclass(frozen=True)
class BuildShard:
    """Builds one of several index shards: over the keys of a range of chunk ids."""

    directory: str
    keys: Keys
    config: IndexConfig
    ranges: tuple[range, ...]

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Builds shard `index` unless it is there; returns its number of keys."""
        ids = self.ranges[index]
        manifest = _build_shard(f"{self.directory}/{_folder(index)}", self.keys, self.config, ids)
        report(len(ids))
        return manifest.fact("keys")


def _settings(config: IndexConfig) -> dict[str, Any]:
    """What a manifest holds; options that came later only where they are used."""
    fields = dataclasses.asdict(config)
    for name in ("shard_keys", "recall_target"):
        if fields[name] == getattr(IndexConfig, name):
            del fields[name]
    return {"config": fields, "distance": "squared_l2"}


def _build_shard(directory: Path, keys: Keys, config: IndexConfig, within: range) -> Manifest:
    """Builds the index over the keys of some chunks, unless it is there already."""
    settings = _settings(config)
    whole = len(within) == len(keys)
    if not whole:
        settings["chunks"] = [within.start, within.stop]
    stage = Stage(directory, KIND, settings, {"keys": (keys.manifest, keys.directory)}, claim=False)
    if stage.done:
        return stage.manifest()
    # The plan is refused before anything is written, where all keys are in one shard.
    if whole:
        plan_index(keys.manifest.fact("keys"), keys.dimension, config)
    stage.claim()
    most = min(len(within), keys.manifest.fact("keys") + BLOCK)
    ids, vectors = np.empty(most, np.int64), np.empty((most, keys.dimension), np.float32)
    filled = 0
    for block_ids, block in keys.blocks(within=within):
        ids[filled : filled + len(block_ids)] = block_ids
        vectors[filled : filled + len(block_ids)] = block
        filled += len(block_ids)
    if whole and filled != keys.manifest.fact("keys"):
        expected = keys.manifest.fact("keys")
        raise UserError(
            f"{keys.directory} holds {filled} keys: expected {expected} by its manifest"
        )
    plan = plan_index(filled, keys.dimension, config)
    shards = [stage.write_array(CHUNK_IDS, ids[:filled])]
    if filled and plan.kind != "exact":  # which reads the keys themselves
        searcher = build_searcher(vectors[:filled], plan, config.training_sample)
        del vectors  # ScaNN holds a copy, and makes two more while it writes
        shards += stage.write_files(lambda folder: searcher.serialize(str(folder), True))
    return stage.finish({"keys": filled, "plan": plan}, [shard.name for shard in shards])


class IndexShard:
    """An opened index over the keys of a range of chunks: queries in, chunk ids out.

    Attributes:
      directory, manifest: where it is from.
      plan: how it was built.
      ids: the range of chunk ids whose keys it may hold.
    """

    def __init__(self, directory: Path, manifest: Manifest, keys: Keys, first: int = 0) -> None:
        """Opens it; nothing is loaded yet.

        Args:
          directory, manifest: where it is from.
          keys: what it was built from.
          first: the id that their first chunk has where their database is part of a larger one.
        """
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.plan = IndexPlan(**manifest.fact("plan"))
        self._keys = keys
        start, stop = manifest.settings.get("chunks", (0, len(keys)))
        self.ids = range(first + start, first + stop)
        self._first = first

    def __reduce__(self) -> tuple[Callable[..., "IndexShard"], tuple[Any, ...]]:
        """Pickles by its place, so that worker processes load it themselves."""
        return IndexShard, (files.absolute(self.directory), self.manifest, self._keys, self._first)

    def moved(self, first: int) -> "IndexShard":
        """The same as part of a larger database, in which its first chunk has this id."""
        return IndexShard(self.directory, self.manifest, self._keys, first)

    def __len__(self) -> int:
        """Keys."""
        return self.manifest.fact("keys")

    @property
    def is_exact(self) -> bool:
        """Whether every key is compared."""
        return self.plan.kind in ("brute_force", "exact") and self.plan.recall_target == 1

    @functools.cached_property
    def _loaded(self) -> tuple[Any, np.ndarray]:
        """ScaNN's searcher and the chunk ids; importing ScaNN takes seconds, so not before the need."""
        chunk_ids = np.load(self.directory / CHUNK_IDS)
        if self.plan.kind == "exact":
            keys = self._keys.rows(chunk_ids)
            searcher: Any = ExactSearcher(keys, recall_target=self.plan.recall_target)
            return searcher, chunk_ids + self._first
        chunk_ids += self._first
        return _scann().load_searcher(str(self.directory)), chunk_ids

    def release(self) -> None:
        """Gives the memory back; the next search loads it again."""
        self.__dict__.pop("_loaded", None)

    def search(
        self, queries: np.ndarray, count: int, *, widen: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Finds the nearest chunks; arguments and result as for `Index.search`."""
        ids = np.full((len(queries), count), -1, np.int64)
        distances = np.full((len(queries), count), np.inf, np.float32)
        found = min(count, len(self))
        if not (found and len(queries)):
            return ids, distances
        searcher, chunk_ids = self._loaded
        if self.plan.kind == "exact":
            rows, values = searcher.search(np.asarray(queries, np.float32), found)
            ids[:, :found], distances[:, :found] = chunk_ids[rows], values
            return ids, distances
        rows, values = search_searcher(
            searcher, self.plan, queries, found, limit=len(self), widen=widen
        )
        missing = np.isnan(values)  # ScaNN fills up with key 0 at distance NaN
        ids[:, :found] = np.where(missing, -1, chunk_ids[rows])
        distances[:, :found] = np.where(missing, np.inf, values)
        return ids, distances


def search_searcher(
    searcher: Any, plan: IndexPlan, queries: np.ndarray, count: int, *, limit: int, widen: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, count] and distances that ScaNN finds by a plan; distance NaN where there are no more.

    Args:
      searcher: of ScaNN.
      plan: how it was built.
      queries: [n, d].
      count: neighbours, at most as many as there are keys.
      limit: candidates that are compared again exactly, at most.
      widen: look into so many times more leaves than planned.
    """
    options: dict[str, int] = {}
    if plan.reorder:
        options["pre_reorder_num_neighbors"] = min(max(plan.reorder, 2 * count), limit)
    if plan.kind == "tree":
        options["leaves_to_search"] = min(plan.leaves_to_search * widen, plan.num_leaves)
        # ScaNN may choose other leaves for a query when it comes in a batch, and then a table
        # would depend on its blocks. One at a time costs a quarter of the queries per second.
        options["batch_size"] = 1
    return searcher.search_batched_parallel(
        np.ascontiguousarray(queries, np.float32), final_num_neighbors=count, **options
    )


class Index:
    """An opened index of one or several shards.

    Attributes:
      directory, manifest: where it is from.
      shards: in the order of their chunk ids.
    """

    def __init__(self, directory: Path, manifest: Manifest, shards: Sequence[IndexShard]) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.shards = tuple(shards)

    @classmethod
    def open(cls, directory: Path, keys: Keys, *, verify: bool = False) -> "Index":
        """Opens the index over some keys.

        Raises:
          UserError: none there, damaged, or one over other keys.
        """
        parents = {"keys": (keys.manifest, keys.directory)}
        folder = pathlib.Path(directory)
        manifest = Manifest.open(folder, KIND, parents, verify)
        if "shards" not in manifest.facts:
            return cls(folder, manifest, [IndexShard(folder, manifest, keys)])
        shards = []
        for i, expected in enumerate(manifest.fact("shards")):
            part = Manifest.open(folder / _folder(i), KIND, parents, verify)
            if part.hash != expected:
                raise UserError(
                    f"{folder} and {folder / _folder(i)} do not belong together: expected index"
                    f" {expected[:12]}, found {part.hash[:12]}"
                )
            shards.append(IndexShard(folder / _folder(i), part, keys))
        return cls(folder, manifest, shards)

    def __len__(self) -> int:
        """Keys."""
        return sum(map(len, self.shards))

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
        return merge([s.search(queries, count, widen=widen) for s in self.shards], count)


def merge(
    found: Sequence[tuple[np.ndarray, np.ndarray]], count: int
) -> tuple[np.ndarray, np.ndarray]:
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
    """[n, m] bool: whether an id other than -1 stands further left in its row too."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, bool)
    same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    np.put_along_axis(again, order[:, 1:], same, axis=1)
    return again


def _folder(index: int) -> str:
    """The directory of one of several index shards."""
    return f"{index:05d}"


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


def build_searcher(vectors: np.ndarray, plan: IndexPlan, training_sample: int) -> Any:
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
