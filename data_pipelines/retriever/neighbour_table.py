"""A neighbour table on the disk: ids and scores of the nearest chunks, by chunk."""

import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.artefacts import bucket_copy
from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.sharded_rows import ShardedRows
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.revisions import folder_of
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "neighbours"
IDS, SCORES = "neighbours", "scores"


class NeighbourTable:
    """A split's neighbour table, read from memory maps.

    Attributes:
      directory, manifest: where it is from.
      k: neighbours a chunk, at most.
      database: chunks of the retrieval database that its ids point into; 0 in a table that does not say.
      score: "squared_l2" or "bm25". retriever: what found them.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        self.k: int = manifest.settings["k"]
        self.database: int = manifest.facts.get("database", 0)
        self.score: str = manifest.settings["score"]
        self.retriever: str = manifest.settings.get("retriever", "dense")
        self._ids = self._opened(manifest.shard_names(f"{IDS}-"))

    @classmethod
    def open(
        cls,
        directory: Path,
        queries: ChunkDatabase | None = None,
        retrieval: ChunkDatabase | None = None,
        *,
        verify: bool = False,
    ) -> "NeighbourTable":
        """Opens a table.

        Args:
          directory: where it is.
          queries: the chunks it must belong to.
          retrieval: the database its ids must point into.
          verify: hash every shard again.

        Raises:
          UserError: none there, damaged, or one of other databases; it names the directories.
        """
        databases = {"chunks": queries, "database": retrieval}
        parents = {role: (db.manifest, db.directory) for role, db in databases.items() if db}
        return cls(directory, Manifest.open(directory, KIND, parents, verify))

    @classmethod
    def of(
        cls, workdir: Path, split: str, queries: ChunkDatabase, database: ChunkDatabase
    ) -> "NeighbourTable":
        """Opens the table of a split of a workdir against a database, whatever its revision is.

        Raises:
          UserError: none there, damaged, or one of other databases; it names the directories.
        """
        path = folder_of(workdir, database.manifest.revision) / KIND / split
        return cls.open(path, queries, database)

    def __reduce__(self) -> tuple[Callable[..., "NeighbourTable"], tuple[str, Manifest]]:
        """Pickles by its place, so that worker processes map the files themselves."""
        return NeighbourTable, (files.absolute(self.directory), self.manifest)

    def __len__(self) -> int:
        """Chunks."""
        return len(self._ids)

    def ids(self, chunk_ids: np.ndarray, k: int | None = None) -> np.ndarray:
        """[..., k] int64 neighbours of chunks [...], nearest first; -1 for none.

        Raises:
          UserError: k is larger than the table's.
        """
        return self._gather(self._ids, chunk_ids, k)

    def scores(self, chunk_ids: np.ndarray, k: int | None = None) -> np.ndarray:
        """[..., k] float32: squared L2 distances, ascending, or BM25's scores, descending.

        Infinity, or minus infinity, where there is no neighbour.
        """
        return self._gather(self._scores, chunk_ids, k)

    @functools.cached_property
    def _scores(self) -> ShardedRows:
        """Training does without them, and so does its copy of a table."""
        names = self.manifest.shard_names(f"{SCORES}-")
        return self._opened([bucket_copy.fetch(self.directory, name).name for name in names])

    def _opened(self, names: Sequence[str]) -> ShardedRows:
        """Shards of k columns."""
        shards = ShardedRows([self.directory / name for name in names])
        for name, shape in zip(names, shards.shapes, strict=True):
            if shape[1:] != (self.k,):
                raise UserError(
                    f"{self.directory / name} has shape {shape}: expected [n, {self.k}]"
                )
        return shards

    def _gather(self, shards: ShardedRows, chunk_ids: np.ndarray, k: int | None) -> np.ndarray:
        """The first k columns of some rows."""
        k = self.k if k is None else k
        if not 0 < k <= self.k:
            raise UserError(f"k is {k}: expected at most {self.k}, which {self.directory} holds")
        chunk_ids = np.asarray(chunk_ids, np.int64)
        flat = chunk_ids.ravel()
        if flat.size and not (flat.min() >= 0 and flat.max() < len(self)):
            raise IndexError(
                f"chunk {flat.min()} or {flat.max()} of {len(self)} in {self.directory}"
            )
        rows = np.empty((flat.size, k), shards.dtype)
        shards.gather(flat, rows)
        return rows.reshape(*chunk_ids.shape, k)


def shard_names(index: int) -> tuple[str, str]:
    """The two files of a shard: ids, and their scores."""
    return shard_name(IDS, index), shard_name(SCORES, index)
