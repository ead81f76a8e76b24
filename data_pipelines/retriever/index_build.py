"""Builds the index over a database's keys: once, published with its manifest, never rebuilt.

More keys than fit into memory at once are cut into index shards, each of a range of chunk ids, each
built, published and loaded by itself. With IndexConfig.visit_shards the keys are divided by nearness
instead (routes.py).

Training a tree gives another result each time, so an index is identified by the hash of its files and
everything made with it names that hash.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from data_pipelines.artefacts import mapped_arrays
from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.retriever.index_config import KINDS, IndexConfig, plan_index
from data_pipelines.retriever.index_shard import CHUNK_IDS, KIND, shard_folder
from data_pipelines.retriever.keys import BLOCK, Keys
from data_pipelines.retriever.routes import CELLS, SHARDS, Routes
from retro_jax.errors import UserError
from retro_jax.storage import files

_ROUTED = f"{files.TEMPORARY}routed"  # while shards are built
_SHARD_BYTES = 3 << 30  # of an index shard's keys in float32; building takes about three times that


def plan_shards(chunks: int, keys: int, dimension: int, config: IndexConfig) -> list[range]:
    """Cuts the chunk ids of a database into the ranges of its index shards, of about equal size."""
    most = config.shard_keys or max(1, _SHARD_BYTES // (4 * dimension))
    count = max(1, -(-keys // most))
    cuts = [chunks * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def prepare_index(
    directory: Path,
    keys: Keys,
    config: IndexConfig,
    *,
    runner: Runner = InProcess(),
    routes: Routes | None = None,
) -> Manifest:
    """Builds the index over all keys, or the shards that are missing of it.

    A shard that was interrupted before its manifest was written is built anew.

    Args:
      directory: where it goes: the index itself, or a directory for each of several shards.
      keys: the database's keys.
      config: its settings.
      runner: where shards are built.
      routes: of an earlier revision, which these keys follow if they are routed and have several shards.

    Returns:
      The manifest. Facts: keys (indexed), and the plan; of several shards the largest one's plan, and
      the hash of each; of routed ones also the keys of each.
    """
    count = keys.manifest.fact("keys")
    ranges = plan_shards(len(keys), count, keys.dimension, config)
    if len(ranges) == 1:
        return _build_shard(directory, keys, config, ranges[0])
    shards = routes.count if routes is not None and config.visit_shards else len(ranges)
    settings = _settings(config) | {"shards": shards}
    stage = Stage(directory, KIND, settings, {"keys": (keys.manifest, keys.directory)}, claim=False)
    if stage.done:
        return stage.manifest()
    for ids in ranges:
        plan_index(min(len(ids), count), keys.dimension, config)
    stage.claim()
    work: BuildShard | BuildRouted = BuildShard(
        files.absolute(directory), keys, config, tuple(ranges)
    )
    if config.visit_shards:
        work = _route(stage, keys, config, shards, routes, runner)
        ranges = [range(len(keys) // shards)] * shards  # about, for the progress bar
    numbers = range(shards)
    missing = [
        i for i in numbers if not (stage.directory / shard_folder(i) / MANIFEST_FILE).is_file()
    ]
    sizes = [len(ids) for ids in ranges]
    run_counted(runner, work, missing, sizes, what="index", unit="chunk")
    parts = [Manifest.open(stage.directory / shard_folder(i), KIND) for i in numbers]
    facts = {
        "keys": sum(part.fact("keys") for part in parts),
        "plan": max(parts, key=lambda part: part.fact("keys")).fact("plan"),
        "shards": [part.hash for part in parts],
    }
    if not config.visit_shards:
        return stage.finish(facts, [])
    facts |= {"keys": count, "sizes": [part.fact("keys") for part in parts]}
    return stage.finish(facts, [CELLS, SHARDS])


def _route(
    stage: Stage,
    keys: Keys,
    config: IndexConfig,
    shards: int,
    routes: Routes | None,
    runner: Runner,
) -> "BuildRouted":
    """Divides keys among shards, or what is missing of it; what builds these."""
    if stage.missing([CELLS, SHARDS]):
        (routes or Routes.train(keys, shards)).write(stage)
    folder = stage.directory / _ROUTED
    with files.writing(folder):
        folder.mkdir(exist_ok=True)
    parts = tuple(keys.database.shards)
    work = RouteKeys(files.absolute(stage.directory), keys, config.shard_copies)
    missing = [i for i in range(len(parts)) if not mapped_arrays.there(folder / f"{i:05d}", 2)]
    sizes = [len(part) for part in parts]
    run_counted(runner, work, missing, sizes, what="routes", unit="chunk")
    return BuildRouted(files.absolute(stage.directory), keys, config)


@dataclasses.dataclass(frozen=True)
class RouteKeys:
    """Finds the index shards of the keys of one shard of the database."""

    directory: str
    keys: Keys
    copies: int

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Leaves the chunk ids of each index shard, ascending, and where each shard's end."""
        folder, part = pathlib.Path(self.directory), self.keys.database.shards[index]
        routes, ids, shards = Routes.open(folder), [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for block_ids, block in self.keys.blocks(within=part):
            nearest = routes.visits(block, self.copies)
            ids.append(np.repeat(block_ids, nearest.shape[1]))
            shards.append(nearest.ravel())
            report(len(block_ids))
        every = np.concatenate(shards)
        order = np.argsort(every, kind="stable")
        bounds = np.cumsum(np.bincount(every, minlength=routes.count), dtype=np.int64)
        arrays = [np.concatenate(ids)[order], np.concatenate([[0], bounds])]
        mapped_arrays.write(folder / _ROUTED / f"{index:05d}", arrays)
        return len(every)


@dataclasses.dataclass(frozen=True)
class BuildRouted:
    """Builds one index shard over the keys that were routed to it."""

    directory: str
    keys: Keys
    config: IndexConfig

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Builds shard `index` unless it is there; returns its number of keys."""
        folder, parts = pathlib.Path(self.directory), [np.zeros(0, np.int64)]
        for number in range(len(self.keys.database.shards)):
            ids, bounds = mapped_arrays.mapped(folder / _ROUTED / f"{number:05d}", 2)
            parts.append(np.array(ids[bounds[index] : bounds[index + 1]]))
        place = folder / shard_folder(index)
        manifest = _build_shard(place, self.keys, self.config, np.concatenate(parts), index)
        report(manifest.fact("keys"))
        return manifest.fact("keys")


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
        manifest = _build_shard(
            f"{self.directory}/{shard_folder(index)}", self.keys, self.config, ids
        )
        report(len(ids))
        return manifest.fact("keys")


def _settings(config: IndexConfig) -> dict[str, Any]:
    """The settings in a manifest; later options only where they are used."""
    fields = dataclasses.asdict(config)
    for name in ("shard_keys", "recall_target", "visit_shards", "shard_copies"):
        if fields[name] == getattr(IndexConfig, name):
            del fields[name]
    return {"config": fields, "distance": "squared_l2"}


def _build_shard(
    directory: Path,
    keys: Keys,
    config: IndexConfig,
    within: range | np.ndarray,
    route: int | None = None,
) -> Manifest:
    """Builds the index over the keys of some chunks, unless it is there already."""
    settings = _settings(config)
    whole = route is None and len(within) == len(keys)
    if route is not None:
        settings["route"] = route
    elif isinstance(within, range) and not whole:
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
    for block_ids, block in _blocks(keys, within):
        ids[filled : filled + len(block_ids)] = block_ids
        vectors[filled : filled + len(block_ids)] = block
        filled += len(block_ids)
    if whole and filled != keys.manifest.fact("keys"):
        expected = keys.manifest.fact("keys")
        raise UserError(
            f"{keys.directory} holds {filled} keys: expected {expected} by its manifest"
        )
    plan = plan_index(filled, keys.dimension, config)

    def write(folder: pathlib.Path) -> list[str]:
        nonlocal vectors
        files.write_arrays(folder / CHUNK_IDS, [ids[:filled]])
        if filled:
            built = KINDS[plan.kind].build(vectors[:filled], plan, config.training_sample)
            vectors = np.empty(
                0, np.float32
            )  # ScaNN has a copy, and makes two more while it writes
            built.save(folder)
        return [CHUNK_IDS]

    return stage.publish(write, {"keys": filled, "plan": plan})


def _blocks(keys: Keys, within: range | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids [n] and keys [n, d] of chunks with text, some at a time."""
    if isinstance(within, range):
        yield from keys.blocks(within=within)
        return
    for first in range(0, len(within), BLOCK):
        yield within[first : first + BLOCK], keys.rows(within[first : first + BLOCK])
