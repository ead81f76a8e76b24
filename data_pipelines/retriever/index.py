"""The index over a database's keys: built once, published with its manifest, never rebuilt.

More keys than fit into memory at once are cut into index shards, each of a range of chunk ids, each
built, published and loaded by itself; a search merges what each finds. With IndexConfig.visit_shards the
keys are divided by nearness instead (routes.py), and a query visits few of the shards.

Training a tree gives another result each time, so an index is identified by the hash of its files and
everything made with it names that hash.

A kind that cannot leave chunks out by itself is asked for more candidates than are wanted. A query that
is left with too few asks for 8 times as many, up to 1,024; one that still has too few (a chunk of a very
long document) is compared with every key, which also says when there are no more.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts import mapped_arrays
from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path, Stage
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.retriever.candidates import Found, first_wanted, merge, nothing, repeated
from data_pipelines.retriever.exact import ExactSearcher, squared_distances
from data_pipelines.retriever.index_config import KINDS, IndexConfig, plan_index
from data_pipelines.retriever.index_kind import IndexPlan, Searcher
from data_pipelines.retriever.keys import BLOCK, Keys, KeysOf
from data_pipelines.retriever.routes import CELLS, SHARDS, Routes
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "index"
CHUNK_IDS = "chunk-ids.npy"
_ROUTED = f"{files.TEMPORARY}routed"  # while shards are built
_SHARD_BYTES = 3 << 30  # of an index shard's keys in float32; building takes about three times that
_WIDEN, _WIDEST = 8, 1024


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
    missing = [i for i in numbers if not (stage.directory / _folder(i) / MANIFEST_FILE).is_file()]
    sizes = [len(ids) for ids in ranges]
    run_counted(runner, work, missing, sizes, what="index", unit="chunk")
    parts = [Manifest.open(stage.directory / _folder(i), KIND) for i in numbers]
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
        place = folder / _folder(index)
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
        manifest = _build_shard(f"{self.directory}/{_folder(index)}", self.keys, self.config, ids)
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


class IndexShard:
    """An opened index over the keys of a range of chunks: queries in, chunk ids out.

    Attributes:
      directory, manifest: where it is from.
      plan: how it was built.
      ids: the range of chunk ids whose keys it may have.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        keys: Keys,
        chunks: range | None = None,
    ) -> None:
        """Opens it; nothing is loaded yet.

        Args:
          directory, manifest: where it is from.
          keys: what it was built from, or keys of a larger database that contain these.
          chunks: the ids that the chunks it was built from have in that database; None for all.
        """
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.plan = IndexPlan(**manifest.fact("plan"))
        self.keys = keys
        self._chunks = range(len(keys)) if chunks is None else chunks
        start, stop = manifest.settings.get("chunks", (0, len(self._chunks)))
        self.ids = self._chunks[start:stop]

    def __reduce__(self) -> tuple[Callable[..., "IndexShard"], tuple[Any, ...]]:
        """Pickles by its place, so that worker processes load it themselves."""
        return IndexShard, (
            files.absolute(self.directory),
            self.manifest,
            self.keys,
            self._chunks,
        )

    def moved(self, keys: Keys, chunks: range) -> "IndexShard":
        """The same as part of a larger database: its keys, and which of its chunks are indexed here."""
        return IndexShard(self.directory, self.manifest, keys, chunks)

    def __len__(self) -> int:
        """Keys."""
        return self.manifest.fact("keys")

    @functools.cached_property
    def _loaded(self) -> tuple[Searcher, np.ndarray]:
        """The searcher and the chunk ids: reading them may take seconds, so not before the need."""
        chunk_ids = np.load(self.directory / CHUNK_IDS) + self._chunks.start
        keys = KeysOf(self.keys, chunk_ids)
        return KINDS[self.plan.kind].load(self.directory, self.plan, keys), chunk_ids

    def release(self) -> None:
        """Gives the memory back; the next search loads it again."""
        self.__dict__.pop("_loaded", None)

    def candidates(
        self,
        queries: np.ndarray,
        count: int,
        *,
        widen: int = 1,
        exclude: np.ndarray | None = None,
    ) -> Found:
        """What the index itself finds: as `Searcher.search`, but chunk ids, and any count."""
        ids, distances = nothing(len(queries), count)
        limit = min(count, len(self))
        if limit and len(queries):
            searcher, chunk_ids = self._loaded
            queries = np.asarray(queries, np.float32)
            places, values = searcher.search(queries, limit, widen=widen, exclude=exclude)
            ids[:, :limit] = np.where(places < 0, -1, chunk_ids[np.maximum(places, 0)])
            distances[:, :limit] = values
        return ids, distances

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> Found:
        """Finds the nearest chunks; arguments and result as for `Index.search`."""
        ids = np.full((len(queries), k), -1, np.int64)
        pending = np.flatnonzero(~np.isnan(queries[:, 0])) if len(self) else np.zeros(0, np.int64)
        count, widen = self._first_count(k), 1
        most = max(_WIDEST, count)
        while len(pending) and count <= most:
            owners = _at(exclude, pending)
            results, _ = self.candidates(queries[pending], count, widen=widen, exclude=owners)
            subset = self._allowed(results, k, owners)
            enough = subset[:, -1] >= 0
            if self._says_all(count):
                enough[:] = True
            ids[pending[enough]] = subset[enough]
            pending = pending[~enough]
            count, widen = count * _WIDEN, widen * _WIDEN
        if len(pending):
            owners = _at(exclude, pending)
            routed = "route" in self.manifest.settings
            own = self._loaded[1] if routed else self.ids
            ids[pending] = compare_all(self.keys, queries[pending], k, owners, own)[0]
        return scored(self.keys, queries, ids)

    def _first_count(self, k: int) -> int:
        """How many candidates are asked for first: as many whether any document is left out or none.

        ScaNN finds other keys where it is asked for more. Tables leave out each query's own document,
        a search while a text is generated none, and both are to find the same.
        """
        return k if KINDS[self.plan.kind].excludes else 2 * k + 16

    def _says_all(self, count: int) -> bool:
        """Whether so many candidates are all that there are."""
        kind = KINDS[self.plan.kind]
        return kind.complete(self.plan) and (kind.excludes or count >= len(self))

    def _allowed(self, ids: np.ndarray, k: int, exclude: np.ndarray | None) -> np.ndarray:
        """The first k of candidates [n, m] that are not removed, excluded or repeated: [n, k]."""
        documents = self.keys.database.live_documents(ids)
        mask = (documents >= 0) & ~repeated(ids)
        if exclude is not None:
            mask &= documents != exclude[:, None]
        return first_wanted(ids, mask, k)


def compare_all(
    keys: Keys,
    queries: np.ndarray,
    k: int,
    exclude: np.ndarray | None = None,
    ids: range | np.ndarray | None = None,
) -> Found:
    """As `Index.search`, by comparing every key: what recall is measured against.

    Args:
      keys, queries, k, exclude: as there.
      ids: of the chunks to choose from, ascending; None for all.
    """
    subset = KeysOf(keys, range(len(keys)) if ids is None else ids)
    places, distances = ExactSearcher(subset, on_devices=False).search(queries, k, exclude)
    return subset.ids(places), distances


def scored(keys: Keys, queries: np.ndarray, ids: np.ndarray) -> Found:
    """Ids [n, k] in the order of their exact distances, and these; equal ones by id, none last."""
    scores = squared_distances(keys.rows, queries, ids)
    order = np.lexsort((ids, scores), axis=-1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


@dataclasses.dataclass(frozen=True)
class RoutedShards:
    """Index shards that a query visits few of.

    Attributes:
      routes: to them. visit: how many.
      first: the number of the first of them among all shards of the index.
    """

    routes: Routes
    visit: int
    first: int = 0

    @property
    def numbers(self) -> range:
        """Of the shards."""
        return range(self.first, self.first + self.routes.count)


class Index:
    """An opened index of one or several shards.

    Attributes:
      directory, manifest: where it is from.
      shards: in the order of their chunk ids, or of their routes.
      routed: of which of them a query visits few; of each revision that has such shards.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        shards: Sequence[IndexShard],
        routed: Sequence[RoutedShards] = (),
    ) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.shards, self.routed = tuple(shards), tuple(routed)

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
        visit = manifest.settings["config"].get("visit_shards", 0)
        routed = [RoutedShards(Routes.open(folder), visit)] if visit else []
        return cls(folder, manifest, shards, routed)

    def __len__(self) -> int:
        """Keys; copies do not count."""
        return self.manifest.fact("keys")

    @property
    def complete(self) -> bool:
        """Whether every true neighbour is found."""
        if any(part.visit < part.routes.count for part in self.routed):
            return False
        return all(KINDS[shard.plan.kind].complete(shard.plan) for shard in self.shards)

    def search(
        self,
        queries: np.ndarray,
        k: int,
        exclude: np.ndarray | None = None,
        *,
        release: bool = False,
    ) -> Found:
        """Finds the nearest chunks that are not removed.

        Args:
          queries: [n, d] float32; a row of NaN (no text) finds nothing.
          k: how many.
          exclude: [n] numbers of the database's documents to leave out; -1 for none.
          release: give the memory of each shard back when it was searched.

        Returns:
          Chunk ids [n, k] int64, unique in each row, and squared L2 distances [n, k] float32,
          ascending (equal ones by id); -1 and infinity where there are no more.
        """
        if k < 1:
            raise UserError(f"k is {k}: expected at least one neighbour")
        if not self.routed and not release:
            return merge([shard.search(queries, k, exclude) for shard in self.shards], k)
        found, visited = nothing(len(queries), k), self.visited(queries)
        for number in np.unique(visited).tolist():
            rows = np.flatnonzero((visited == number).any(1))
            self._search_rows(found, number, queries, rows, exclude)
            if release:
                self.shards[number].release()
        self.fill(found, visited, queries, exclude, release=release)
        return found

    def visited(self, queries: np.ndarray) -> np.ndarray:
        """[n, m] int64: the numbers of the shards that queries [n, d] visit."""
        routed = {number for part in self.routed for number in part.numbers}
        others = [number for number in range(len(self.shards)) if number not in routed]
        columns = [np.tile(np.array(others, np.int64), (len(queries), 1))]
        columns += [part.first + part.routes.visits(queries, part.visit) for part in self.routed]
        return np.concatenate(columns, axis=1)

    def fill(
        self,
        found: Found,
        visited: np.ndarray,
        queries: np.ndarray,
        exclude: np.ndarray | None = None,
        *,
        release: bool = False,
    ) -> None:
        """Searches the other shards too for those queries that found too few neighbours.

        Args:
          found: ids [n, k] and distances [n, k], which are completed.
          visited: [n, m] the shards that were searched.
          queries, exclude: as for `search`.
          release: give the memory of each shard back.
        """
        lacking = np.flatnonzero((found[0][:, -1] < 0) & ~np.isnan(queries[:, 0]))
        for number, shard in enumerate(self.shards if len(lacking) else ()):
            rows = lacking[(visited[lacking] != number).all(1)]
            if len(rows):
                self._search_rows(found, number, queries, rows, exclude)
                if release:
                    shard.release()

    def _search_rows(
        self,
        found: Found,
        number: int,
        queries: np.ndarray,
        rows: np.ndarray,
        exclude: np.ndarray | None,
    ) -> None:
        """Adds what one shard finds for some of the queries."""
        k = found[0].shape[1]
        more = self.shards[number].search(queries[rows], k, _at(exclude, rows))
        ids, distances = merge([(found[0][rows], found[1][rows]), more], k)
        found[0][rows], found[1][rows] = ids, distances


def _folder(index: int) -> str:
    """The directory of one of several index shards."""
    return f"{index:05d}"


def _at(exclude: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    """The excluded documents of some queries."""
    return None if exclude is None else np.asarray(exclude)[rows]
