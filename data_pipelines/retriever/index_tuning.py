"""Recall and speed of ScaNN's settings on the keys at hand, and the fastest that reaches a recall.

    for each tree (leaves, dimensions a block)          built once
        for each number of candidates compared again    a search of all queries each,
            more and more leaves, until recall is full  timed as `Index` searches

Queries are keys of the database itself; a query is no neighbour of its own.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipelines.retriever.exact import ExactSearcher
from data_pipelines.retriever.index_kind import IndexPlan
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.sampling import sample_ids
from data_pipelines.retriever.scann_index import Scann, ScannIndex
from retro_jax.config import require
from retro_jax.errors import UserError

_FULL = 0.9995  # recall at which more leaves are not worth their time


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Settings to try, and the sample of keys on which to try them.

    Attributes:
      target_recall: recall@k that the chosen settings reach.
      k: neighbours per query.
      queries: number of keys that serve as queries.
      most_keys: keys that are indexed, at most; the settings are for an index shard of this size.
      leaves: numbers of leaves, as multiples of the square root of the number of keys.
      dimensions_per_block: dimensions that share a code.
      reorder: candidates that are compared again exactly.
    """

    target_recall: float = 0.95
    k: int = 10
    queries: int = 1000
    most_keys: int = 2_000_000
    leaves: tuple[float, ...] = (1.0, 2.0, 4.0)
    dimensions_per_block: tuple[int, ...] = (2, 4)
    reorder: tuple[int, ...] = (50, 100, 200)

    def __post_init__(self) -> None:
        require(0 < self.target_recall <= 1, self, "target_recall", "a share from 0 to 1")
        for field in ("k", "queries", "most_keys"):
            require(getattr(self, field) > 0, self, field, "a positive number")
        for field in ("leaves", "dimensions_per_block", "reorder"):
            values = tuple(getattr(self, field))
            object.__setattr__(self, field, values)  # gin gives lists
            valid = bool(values) and all(value > 0 for value in values)
            require(valid, self, field, "positive numbers")


@dataclasses.dataclass(frozen=True)
class Point:
    """One measured setting: its plan, recall@k, and queries a second over all cores."""

    plan: IndexPlan
    recall: float
    queries_per_second: float


def measure(
    keys: Keys, config: TuneConfig, report: Callable[[Point], None] = lambda point: None
) -> list[Point]:
    """Measures the settings.

    Args:
      keys: of the database.
      config: what to try.
      report: is given each point as soon as it is measured.

    Raises:
      UserError: too few keys to tune anything.
    """
    vectors = _sample(keys, config.most_keys)
    if len(vectors) <= max(config.k, 16):
        raise UserError(f"{keys.directory} holds {len(vectors)} keys: expected more to tune with")
    asked = sample_ids(len(vectors), config.queries)
    queries = vectors[asked]
    truth = _others(ExactSearcher(vectors).search(queries, config.k + 1)[0], asked, config.k)
    points = []
    for plan, searcher in _searchers(vectors, config):
        for searched in _steps(plan.num_leaves):
            point_plan = dataclasses.replace(plan, leaves_to_search=searched)
            point = _point(
                searcher.planned(point_plan), point_plan, queries=queries, asked=asked, truth=truth
            )
            points.append(point)
            report(point)
            if point.recall >= _FULL:
                break
    return points


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both recall and speed, by increasing recall."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (-p.queries_per_second, -p.recall)):
        if not best or point.recall > best[-1].recall:
            best.append(point)
    return best


def choose(points: Sequence[Point], target_recall: float) -> Point:
    """The fastest point of a recall; a UserError if none reaches it."""
    enough = [point for point in points if point.recall >= target_recall]
    if not enough:
        best = max(point.recall for point in points)
        raise UserError(
            f"TuneConfig.target_recall is {target_recall}: expected at most {best:.4f}, the best that"
            " was measured"
        )
    return max(enough, key=lambda point: point.queries_per_second)


def bindings(plan: IndexPlan) -> list[str]:
    """The plan as gin bindings."""
    fields = ("kind", "num_leaves", "leaves_to_search", "dimensions_per_block", "reorder")
    return [f"IndexConfig.{name} = {getattr(plan, name)!r}" for name in fields]


def _sample(keys: Keys, most: int) -> np.ndarray:
    """[n, d] keys of chunks with text, evenly spread over the database."""
    total = keys.manifest.fact("keys")
    stride = -(-total // most)
    nothing = np.empty((0, keys.dimension), np.float32)
    return np.concatenate([nothing, *(rows[::stride] for _, rows in keys.blocks(1024 * stride))])


def _searchers(vectors: np.ndarray, config: TuneConfig) -> Iterator[tuple[IndexPlan, ScannIndex]]:
    """Each tree, with each number of candidates to compare again."""
    count, dimension = vectors.shape
    numbers = {min(count, max(1, round(m * math.sqrt(count)))) for m in config.leaves}
    blocks = {min(block, dimension) for block in config.dimensions_per_block}
    for leaves in sorted(numbers):
        for block in sorted(blocks):
            plan = IndexPlan("tree", leaves, leaves, block, max(config.reorder))
            searcher = Scann("tree").build(vectors, plan, min(count, 100_000))
            for reorder in sorted(config.reorder):
                yield dataclasses.replace(plan, reorder=reorder), searcher


def _steps(leaves: int) -> list[int]:
    """How many leaves are looked into: from a hundredth to all, each 1.4 times the one before."""
    steps = {min(leaves, max(1, round(leaves * 0.01 * 1.4**i))) for i in range(15)}
    return sorted(steps)


def _point(
    searcher: ScannIndex,
    plan: IndexPlan,
    *,
    queries: np.ndarray,
    asked: np.ndarray,
    truth: np.ndarray,
) -> Point:
    """One setting, measured."""
    k = truth.shape[1]
    searcher.search(queries[:16], k + 1)
    start = time.perf_counter()
    rows, _ = searcher.search(queries, k + 1)
    seconds = time.perf_counter() - start
    neighbours = _others(rows, asked, k)
    hits = (neighbours[:, :, None] == truth[:, None, :]).any(2).mean()
    return Point(plan, float(hits), len(queries) / seconds)


def _others(rows: np.ndarray, asked: np.ndarray, k: int) -> np.ndarray:
    """The first k of found rows [n, k + 1] that are not the query itself."""
    order = np.argsort(rows == asked[:, None], axis=1, kind="stable")
    return np.take_along_axis(rows, order, axis=1)[:, :k]
