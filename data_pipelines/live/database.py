"""A workdir's retrieval database as generation asks it, and its revisions for readers that stay.

    database = LiveDatabase.open(W)            one revision: chunks in, neighbours out
    database.find(chunks, 2)
    database.without(["code/a.py"])            the same, but for some documents
    databases = LiveDatabases(W)               for a server, or Python: opens the newest revision
    databases.refresh()                        opens revisions that were published, or taken back, since

A revision is opened whole before it is handed out, and goes on working for whoever holds it: its
files are mapped, and nothing published is ever rewritten.
"""

import ast
import collections
import copy
import functools
import pathlib
import threading
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.artefacts.manifest import SETTINGS_FILE, Manifest, Path
from data_pipelines.batches.batches import keep_part
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.text_view import Viewer
from data_pipelines.evaluation.trace_sources import DatabaseLibrary
from data_pipelines.retriever import revisions
from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.token_memory.drafts import memory_votes
from data_pipelines.token_memory.memory import TokenMemory
from data_pipelines.token_memory.workdir_memory import open_existing
from retro_jax.batch import Neighbour
from retro_jax.errors import UserError
from retro_jax.report.views import NeighbourView

_WARM_UP = 64  # chunks that are searched for before the first request
_KEPT = 4  # revisions that stay open besides those that somebody holds
_SPARE = 8  # neighbours that are asked for beside the wanted ones, where documents are left out
_MODEL = "KeysConfig.model = "

# One search at a time in a process: revisions share the embedder, which is not made for threads.
_SEARCH = threading.Lock()


class LiveDatabase:
    """A database at one revision; implements retro_jax.generate.live_database.LiveDatabase.

    Attributes:
      chunks: of the revision. tokenizer: that of its chunks.
      revision, digest: its number and hash. score: what scores are, "squared_l2" or "bm25".
    """

    def __init__(self, retriever: Retriever, tokenizer: Tokenizer, part: str = "both") -> None:
        """Takes what is open; `open` takes a workdir.

        Args:
          retriever: of the revision. tokenizer: that of its chunks.
          part: what of a neighbour the model reads (BatchConfig.neighbour_part).
        """
        self.chunks: ChunkDatabase = retriever.database
        self.tokenizer, self._retriever, self._part = tokenizer, retriever, part
        self.score = str(retriever.ranking.settings["score"])
        self._excluded = np.zeros(0, np.int64)

    @classmethod
    def open(
        cls,
        workdir: Path,
        revision: int | None = None,
        *,
        model: str | None = None,
        part: str = "both",
    ) -> "LiveDatabase":
        """Opens a revision, and finds the BERT that its queries need; loads neither BERT nor index.

        Args:
          workdir: W. revision: None for the newest.
          model: the folder of the BERT that made the keys; None for a packaged one, or that of the
            preparation. part: as for `LiveDatabase`.

        Raises:
          UserError: something is missing, damaged, or does not belong to the rest.
        """
        tokenizer = Tokenizer.open(pathlib.Path(workdir) / "tokenizer")
        model = model or recorded_bert(workdir)
        retriever = Retriever.open(workdir, model=model, revision=revision)
        retriever.check_model()
        return cls(retriever, tokenizer, part)

    @property
    def revision(self) -> int:
        """Its number."""
        return self.chunks.manifest.revision

    @property
    def digest(self) -> str:
        """Its hash."""
        return self.chunks.manifest.hash

    def without(self, documents: Sequence[str]) -> "LiveDatabase":
        """The same database, in which some documents, as CORPUS/ID, are never found.

        Raises:
          UserError: there is no such document.
        """
        other = copy.copy(self)
        other._excluded = np.union1d(self._excluded, excluded_numbers(self.chunks, documents))
        return other

    def search_some(self, count: int) -> None:
        """Searches for so many of its own chunks, one at a time and many at once, as requests do."""
        ids = np.linspace(0, len(self.chunks) - 1, count).astype(np.int64)
        chunks = self.chunks.chunks(ids).astype(np.int32)
        for part in [*np.array_split(chunks, count), *np.array_split(chunks, 4)]:
            self.find(part, 1)

    def find(self, chunks: np.ndarray, k: int) -> Found:
        """Ids int64 and scores float32 [n, k] of the nearest chunks of chunks [n, 64]; -1 for none."""
        if not len(self._excluded):
            return self._search(chunks, k)
        asked = k + _SPARE
        while True:
            ids, scores = self._search(chunks, asked)
            wanted = (ids >= 0) & ~np.isin(self.chunks.documents(ids), self._excluded)
            enough = (wanted.sum(axis=1) >= k) | (ids < 0).any(axis=1)
            if enough.all() or asked >= len(self.chunks):
                break
            asked = min(4 * asked, len(self.chunks))
        order = np.argsort(~wanted, axis=1, kind="stable")[:, :k]
        ids = np.take_along_axis(np.where(wanted, ids, -1), order, axis=1)
        return ids, np.take_along_axis(scores, order, axis=1)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """[n, k, R] int32 tokens of neighbours, as the model reads them."""
        return keep_part(self.chunks.values(ids), self._part, self.chunks.pad_id)

    def neighbour(self, chunk: int, score: float) -> Neighbour:
        """Where a chunk is from, and its text."""
        database = self.chunks
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

    def views(self, ids: np.ndarray, scores: np.ndarray, reader: np.ndarray) -> list[NeighbourView]:
        """Neighbours [k] as text; runs that the tokens `reader` [n] share with them are marked."""
        return Viewer(self.tokenizer, self.chunks).neighbours(ids, scores, reader, self.score)

    def votes(self) -> Callable[[np.ndarray], tuple[int, np.ndarray]] | None:
        """What asks its token memory; None where none was built of it."""
        memory = self._memory
        return None if memory is None else memory_votes(memory, self._excluded)

    def library(self) -> DatabaseLibrary:
        """What a page of traces asks of its documents, tokens and token memory."""
        return DatabaseLibrary(self.tokenizer, self.chunks, self._memory, self.score)

    @functools.cached_property
    def _memory(self) -> TokenMemory | None:
        """The token memory, where it was built."""
        return open_existing(self.chunks)

    def _search(self, chunks: np.ndarray, k: int) -> Found:
        """The retriever's answer."""
        with _SEARCH:
            return self._retriever.neighbours(chunks, k)


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
                model, part = self._model, self._part
                database = LiveDatabase.open(self.workdir, revision, model=model, part=part)
                # All parts are loaded before anybody waits for them.
                database.find(np.full((1, CHUNK_LENGTH), database.tokenizer.eos_id, np.int32), 1)
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


def document_names(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(corpus, id) of documents given as CORPUS/ID; a UserError for other texts."""
    pairs = [text.partition("/") for text in texts]
    for text, (_, slash, _) in zip(texts, pairs, strict=True):
        if not slash:
            raise UserError(f"document {text!r}: expected CORPUS/ID")
    return tuple((corpus, document) for corpus, _, document in pairs)


def excluded_numbers(database: ChunkDatabase, texts: Sequence[str]) -> np.ndarray:
    """[d] numbers of a database's documents given as CORPUS/ID."""
    numbers = revisions.numbers_of(database, document_names(texts)) if texts else []
    return np.array(numbers, np.int64)


def recorded_bert(workdir: Path) -> str | None:
    """The BERT folder that W was prepared with, where it still is; None for a packaged one."""
    path = pathlib.Path(workdir) / SETTINGS_FILE
    if not path.is_file():
        return None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(_MODEL):
            name = str(ast.literal_eval(line.removeprefix(_MODEL)))
            return name if pathlib.Path(name).is_dir() else None
    return None


def _digest(workdir: pathlib.Path, revision: int) -> str:
    """The hash of a revision, without opening it."""
    if not revision:
        return Manifest.read(workdir / "chunks" / "train").hash
    return Manifest.read(revisions.folder_of(workdir, revision) / revisions.KIND).hash
