"""One shard of the index over a database's keys: queries in, chunk ids out.

A kind that cannot leave chunks out by itself is asked for more candidates than are wanted. A query that
is left with too few asks for 8 times as many, up to 1,024; one that still has too few (a chunk of a very
long document) is compared with every key, which also says when there are no more.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.retriever.candidates import Found, first_wanted, nothing, repeated
from data_pipelines.retriever.exact import ExactSearcher, squared_distances
from data_pipelines.retriever.index_config import KINDS
from data_pipelines.retriever.index_kind import IndexPlan, Searcher
from data_pipelines.retriever.keys import Keys, KeysOf
from retro_jax.storage import files

KIND = "index"
CHUNK_IDS = "chunk-ids.npy"
_WIDEN, _WIDEST = 8, 1024


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
            owners = of_rows(exclude, pending)
            results, _ = self.candidates(queries[pending], count, widen=widen, exclude=owners)
            subset = self._allowed(results, k, owners)
            enough = subset[:, -1] >= 0
            if self._says_all(count):
                enough[:] = True
            ids[pending[enough]] = subset[enough]
            pending = pending[~enough]
            count, widen = count * _WIDEN, widen * _WIDEN
        if len(pending):
            owners = of_rows(exclude, pending)
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


def shard_folder(index: int) -> str:
    """The directory of one of several index shards."""
    return f"{index:05d}"


def of_rows(exclude: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    """The excluded documents of some queries."""
    return None if exclude is None else np.asarray(exclude)[rows]
