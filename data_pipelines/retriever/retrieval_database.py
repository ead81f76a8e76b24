"""The retrieval database of a workdir at one of its revisions: chunks, keys, index, scores of terms."""

import pathlib
from collections.abc import Callable
from typing import Any

from data_pipelines.artefacts.manifest import Path
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever import revisions
from data_pipelines.retriever.bm25 import KIND as BM25
from data_pipelines.retriever.bm25 import Bm25
from data_pipelines.retriever.index import Index
from data_pipelines.retriever.keys import Keys
from retro_jax.errors import UserError


class Database:
    """What is retrieved from. Parts beside the chunks are opened when they are first asked for.

    Attributes:
      chunks: ids are its.
    """

    def __init__(
        self,
        chunks: ChunkDatabase,
        workdir: Path | None = None,
        *,
        keys: Keys | None = None,
        index: Index | None = None,
        bm25: Bm25 | None = None,
        verify: bool = False,
    ) -> None:
        """Takes parts that are open already; `open` is for those of a workdir."""
        self.chunks, self._workdir, self._verify = chunks, workdir, verify
        self._keys, self._index, self._bm25 = keys, index, bm25

    @classmethod
    def open(
        cls, workdir: Path, revision: int | None = None, *, verify: bool = False
    ) -> "Database":
        """Opens the retrieval database of a workdir.

        Args:
          workdir: where `prepare` put it.
          revision: which one; None for the newest.
          verify: hash every file again.

        Raises:
          UserError: something is missing, damaged, or does not belong to the rest; here, or when that
            part is asked for.
        """
        chunks = revisions.open_database(workdir, revision, verify=verify)
        return cls(chunks, workdir, verify=verify)

    def __reduce__(self) -> tuple[Callable[..., "Database"], tuple[Any, ...]]:
        """Pickles by the places of the parts that are open: worker processes map the files."""
        return _opened, (self.chunks, self._workdir, self._keys, self._index, self._bm25)

    @property
    def keys(self) -> Keys:
        """The chunks' keys; a UserError where there are none."""
        if self._keys is None:
            self._keys = revisions.open_keys(self.chunks, self._path("keys"), verify=self._verify)
        return self._keys

    @property
    def index(self) -> Index:
        """The index over the keys."""
        if self._index is None:
            path = self._path("index")
            self._index = revisions.open_index(self.keys, path, verify=self._verify)
        return self._index

    @property
    def bm25(self) -> Bm25:
        """BM25's scores of the chunks' terms."""
        if self._bm25 is None:
            path = revisions.folder_of(self._path(BM25), self.chunks.manifest.revision) / BM25
            self._bm25 = Bm25.open(path, self.chunks, verify=self._verify)
        return self._bm25

    def _path(self, part: str) -> pathlib.Path:
        """The workdir; a UserError for a part that was not given where there is none."""
        if self._workdir is None:
            raise UserError(f"{self.chunks.directory} was opened without its {part}: expected it")
        return pathlib.Path(self._workdir)


def _opened(
    chunks: ChunkDatabase,
    workdir: Path | None,
    keys: Keys | None,
    index: Index | None,
    bm25: Bm25 | None,
) -> Database:
    """A database of parts that are open."""
    return Database(chunks, workdir, keys=keys, index=index, bm25=bm25)
