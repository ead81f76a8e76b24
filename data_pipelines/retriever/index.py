"""The index over a database's keys, opened: one shard or several, whose results a search merges.

With IndexConfig.visit_shards a query visits few of the shards, the nearest by routes.py.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.retriever.candidates import Found, merge, nothing
from data_pipelines.retriever.index_config import KINDS
from data_pipelines.retriever.index_shard import KIND, IndexShard, of_rows, shard_folder
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.routes import Routes
from retro_jax.errors import UserError


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
            part = Manifest.open(folder / shard_folder(i), KIND, parents, verify)
            if part.hash != expected:
                raise UserError(
                    f"{folder} and {folder / shard_folder(i)} do not belong together: expected index"
                    f" {expected[:12]}, found {part.hash[:12]}"
                )
            shards.append(IndexShard(folder / shard_folder(i), part, keys))
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
        more = self.shards[number].search(queries[rows], k, of_rows(exclude, rows))
        ids, distances = merge([(found[0][rows], found[1][rows]), more], k)
        found[0][rows], found[1][rows] = ids, distances
