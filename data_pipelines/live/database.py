"""The retrieval database of a workdir for readers that stay: a server, or Python.

    databases = LiveDatabases(W)           opens the newest revision
    databases.newest().find(chunks, 2)
    databases.refresh()                    opens revisions that were published, or taken back, since

A revision is opened whole before it is handed out, and goes on working for whoever holds it: its
files are mapped, and nothing published is ever rewritten.
"""

import collections
import pathlib
import threading

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.batches.batches import keep_part
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.retriever import revisions
from data_pipelines.retriever.retriever import Retriever
from retro_jax.batch import Neighbour
from retro_jax.errors import UserError

_WARM_UP = 64  # chunks that are searched for before the first request
_KEPT = 4  # revisions that stay open besides those that somebody holds

# One search at a time in a process: revisions share the embedder, which is not made for threads.
_SEARCH = threading.Lock()


class LiveDatabase:
    """A database at one revision; implements retro_jax.generate.live_database.LiveDatabase.

    Attributes:
      revision, digest: its number and hash. tokenizer: that of its chunks.
    """

    def __init__(
        self,
        workdir: Path,
        revision: int | None = None,
        *,
        model: str | None = None,
        part: str = "both",
    ) -> None:
        """Opens all parts of a revision, and searches it once.

        Args:
          workdir: W. revision: None for the newest.
          model: the folder of the BERT that made the keys, where it is no packaged one.
          part: what of a neighbour the model reads (BatchConfig.neighbour_part).

        Raises:
          UserError: something is missing, damaged, or does not belong to the rest.
        """
        self.tokenizer = Tokenizer.open(pathlib.Path(workdir) / "tokenizer")
        self._retriever = Retriever.open(workdir, model=model, revision=revision)
        self._database, self._part = self._retriever.database, part
        self.revision: int = self._database.manifest.revision
        self.digest: str = self._database.manifest.hash
        self.find(np.full((1, CHUNK_LENGTH), self.tokenizer.eos_id, np.int32), 1)

    @property
    def score(self) -> str:
        """What scores are: "squared_l2" or "bm25"."""
        return str(self._retriever.ranking.settings["score"])

    def search_some(self, count: int) -> None:
        """Searches for so many of its own chunks, one at a time and many at once, as requests do."""
        ids = np.linspace(0, len(self._database) - 1, count).astype(np.int64)
        chunks = self._database.chunks(ids).astype(np.int32)
        for part in [*np.array_split(chunks, count), *np.array_split(chunks, 4)]:
            self.find(part, 1)

    def find(self, chunks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 and scores float32 [n, k] of the nearest chunks of chunks [n, 64]; -1 for none."""
        with _SEARCH:
            return self._retriever.neighbours(chunks, k)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """[n, k, 128] int32 tokens of neighbours, as the model reads them."""
        return keep_part(self._database.values(ids), self._part, self._database.pad_id)

    def neighbour(self, chunk: int, score: float) -> Neighbour:
        """Where a chunk is from, and its text."""
        database = self._database
        record = database.record(database.document(chunk))
        tokens = database.value(chunk)
        text, continuation = (
            self.tokenizer.decode(part[part != database.pad_id])
            for part in (tokens[:CHUNK_LENGTH], tokens[CHUNK_LENGTH:])
        )
        return Neighbour(
            document=record.id,
            corpus=record.corpus,
            place=chunk - record.first_chunk,
            score=float(score),
            revision=self.revision,
            text=text,
            continuation=continuation,
        )


class LiveDatabases:
    """The revisions of a workdir's database; implements retro_jax.generate.live_database's protocol.

    Attributes:
      workdir: W. tokenizer: of all revisions.
    """

    def __init__(
        self,
        workdir: Path,
        revision: int | None = None,
        *,
        model: str | None = None,
        part: str = "both",
    ) -> None:
        """Opens one revision, the newest by default; with a number, `refresh` keeps to it."""
        self.workdir = pathlib.Path(workdir)
        self._fixed, self._model, self._part = revision, model, part
        self._open: collections.OrderedDict[str, LiveDatabase] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._newest = self._opened(self._latest())
        self.tokenizer = self._newest.tokenizer

    def newest(self) -> LiveDatabase:
        """The newest revision that is open."""
        return self._newest

    def refresh(self) -> bool:
        """Takes up the newest revision on disk; whether it is another one. It may take seconds.

        Raises:
          UserError: it cannot be opened; the one before stays.
        """
        database = self._opened(self._latest())
        changed = database is not self._newest
        self._newest = database
        return changed

    def warm_up(self) -> None:
        """Searches for chunks of the database, whose embeddings are of all the usual lengths."""
        self._newest.search_some(_WARM_UP)

    def at(self, revision: int) -> LiveDatabase:
        """A revision by its number, which is opened at need.

        Raises:
          UserError: there is none of this number, or none any more.
        """
        latest = self._latest()
        if not 0 <= revision <= latest:
            raise UserError(
                f"revision {revision} of {self.workdir.name} is gone or has not been made: expected 0"
                f" to {latest}"
            )
        return self._opened(revision)

    def _latest(self) -> int:
        """The number of the newest revision that counts."""
        latest = revisions.latest(self.workdir)
        return latest if self._fixed is None else self._fixed

    def _opened(self, revision: int) -> LiveDatabase:
        """A revision, opened once; another database of the same number is another one."""
        with self._lock:
            digest = _digest(self.workdir, revision)
            database = self._open.get(digest)
            if database is None:
                database = LiveDatabase(self.workdir, revision, model=self._model, part=self._part)
                self._open[digest] = database
            self._open.move_to_end(digest)
            while len(self._open) > _KEPT:
                self._open.popitem(last=False)
            return database


def tokenizer_for(
    data: Path, *, trained_on: str | None, own: Path, run: Path | None = None
) -> Tokenizer:
    """The tokeniser of prepared data that a model is to read.

    Args:
      data: the prepared directory. trained_on: the hash of the chunks that the model was trained on.
      own: the tokeniser that the model was trained with, where it is known to be.
      run: of the model, for errors.

    Raises:
      UserError: the data is neither what the model was trained on nor of the same tokeniser.
    """
    chunks, mine = Manifest.read(pathlib.Path(data) / "chunks" / "train"), pathlib.Path(own)
    same = mine.is_dir() and Manifest.read(mine).hash == chunks.parents.get("tokenizer")
    if chunks.hash != trained_on and not same:
        raise UserError(
            f"{run or 'the model'} and {pathlib.Path(data) / 'chunks' / 'train'} do not belong"
            f" together: expected chunks {(trained_on or '(none)')[:12]}, or others of {mine}; found"
            f" {chunks.hash[:12]}"
        )
    return Tokenizer.open(pathlib.Path(data) / "tokenizer")


def _digest(workdir: pathlib.Path, revision: int) -> str:
    """The hash of a revision, without opening it."""
    if not revision:
        return Manifest.read(workdir / "chunks" / "train").hash
    return Manifest.read(revisions.folder_of(workdir, revision) / revisions.KIND).hash
