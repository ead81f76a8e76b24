"""Neighbours while a text is generated: of its chunks as they are completed.

    LiveRetrieval.open([Source("W")], 2)                       of one database, its newest revision
    LiveRetrieval.open([Source("W", 3, exclude=[("code", "a.py")])], 2)
    LiveRetrieval.open([Source("W"), Source("V")], 2)          the two nearest of both
    LiveRetrieval.open([Source("W"), Source("V", neighbours=1)], 2)    V gives one, W the other
    FixedNeighbours.open("facts.jsonl", tokenizer, 2)          the same ones for every chunk

All databases have one tokeniser. Those without a number of neighbours of their own share what is left:
the nearest of all of them are read.
"""

import ast
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import SETTINGS_FILE, Path
from data_pipelines.batches.batches import keep_part
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.retriever.candidates import Found
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.revisions import numbers_of
from retro_jax.config import require
from retro_jax.errors import UserError

_SPARE = 8  # neighbours that are asked for beside the wanted ones, where documents are left out
_MODEL = "KeysConfig.model = "


@dataclasses.dataclass(frozen=True)
class Source:
    """A database that neighbours come from.

    Attributes:
      workdir: W. revision: of the database; None for the newest.
      neighbours: of a chunk that come from it; 0: what no other claims, the nearest of all such.
      exclude: documents that are never retrieved, as (corpus, id).
      bert_folder: the BERT that made the keys; None for a packaged one, or the one of the preparation.
    """

    workdir: Path
    revision: int | None = None
    neighbours: int = 0
    exclude: tuple[tuple[str, str], ...] = ()
    bert_folder: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """DIRECTORY or DIRECTORY=NEIGHBOURS, as flags have it."""
        place, equals, count = text.partition("=")
        if equals and not (count.isdecimal() and int(count)):
            raise UserError(f"database {text!r}: expected DIRECTORY or DIRECTORY=NEIGHBOURS")
        return cls(place, neighbours=int(count or 0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", tuple(self.exclude))
        require(self.neighbours >= 0, self, "neighbours", "a number, 0 for those that are left")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a neighbour is from: the number of its source, its chunk's id there, and its score."""

    source: int
    chunk: int
    score: float


class SearchedDatabase:
    """A database that can be asked for the neighbours of any chunk.

    Attributes:
      retriever: searches it. chunks: of its revision. claimed: Source.neighbours.
    """

    def __init__(
        self, retriever: Retriever, *, claimed: int = 0, exclude: Sequence[tuple[str, str]] = ()
    ):
        """Takes a retriever; names of documents that are not there are refused."""
        self.retriever, self.chunks, self.claimed = retriever, retriever.database, claimed
        self._excluded = np.array(numbers_of(self.chunks, exclude) if exclude else [], np.int64)

    @classmethod
    def open(cls, source: Source) -> "SearchedDatabase":
        """Opens a source, and finds the BERT that its queries need; loads neither BERT nor index."""
        model = source.bert_folder or recorded_bert(source.workdir)
        retriever = Retriever.open(source.workdir, model=model, revision=source.revision)
        retriever.check_model()
        return cls(retriever, claimed=source.neighbours, exclude=source.exclude)

    @property
    def score(self) -> str:
        """What scores are: "squared_l2" or "bm25"."""
        return str(self.retriever.ranking.settings["score"])

    def find(self, tokens: np.ndarray, k: int) -> Found:
        """Ids and scores [n, k] of chunks [n, 64], without those of excluded documents."""
        if not len(self._excluded):
            return self.retriever.neighbours(tokens, k)
        asked = k + _SPARE
        while True:
            ids, scores = self.retriever.neighbours(tokens, asked)
            wanted = (ids >= 0) & ~np.isin(self.chunks.documents(ids), self._excluded)
            enough = (wanted.sum(axis=1) >= k) | (ids < 0).any(axis=1)
            if enough.all() or asked >= len(self.chunks):
                break
            asked = min(4 * asked, len(self.chunks))
        order = np.argsort(~wanted, axis=1, kind="stable")[:, :k]
        ids = np.take_along_axis(np.where(wanted, ids, -1), order, axis=1)
        return ids, np.take_along_axis(scores, order, axis=1)


class LiveRetrieval:
    """Retrieves neighbours for a generator, and remembers where they are from.

    Attributes:
      databases: that it asks. score: what scores are, "squared_l2" or "bm25".
    """

    def __init__(self, databases: Sequence[SearchedDatabase], k: int, part: str = "both"):
        """Takes databases that are open.

        Args:
          databases: at least one, of one tokeniser and one kind of score.
          k: neighbours of a chunk. part: BatchConfig.neighbour_part, as the model was trained.

        Raises:
          UserError: the databases do not belong together, or claim other than k neighbours.
        """
        first = databases[0]
        for other in databases[1:]:
            for name, a, b in (
                ("tokeniser", _tokenizer_of(first), _tokenizer_of(other)),
                ("score", first.score, other.score),
            ):
                if a != b:
                    raise UserError(
                        f"{other.chunks.directory} has another {name} than {first.chunks.directory}:"
                        " expected databases of one"
                    )
        claimed = sum(database.claimed for database in databases)
        whole = all(database.claimed for database in databases)
        if claimed > k or (whole and claimed < k):
            raise UserError(f"the databases claim {claimed} neighbours: expected {k} in all")
        self.databases, self.score, self._k, self._part = tuple(databases), first.score, k, part
        self._found: dict[bytes, list[Place]] = {}

    @classmethod
    def open(cls, sources: Sequence[Source], k: int, part: str = "both") -> "LiveRetrieval":
        """Opens databases."""
        return cls([SearchedDatabase.open(source) for source in sources], k, part)

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """The neighbours [n, k, 128] of chunks [n, 64]; those that a database claims come first."""
        places = self.places(chunks)
        pad_id = self.databases[0].chunks.pad_id
        values = np.full((len(chunks), self._k, 2 * CHUNK_LENGTH), pad_id, np.int32)
        for row, found in enumerate(places):
            self._found[_key(chunks[row])] = found
            for slot, place in enumerate(found):
                values[row, slot] = self.databases[place.source].chunks.value(place.chunk)
        return keep_part(values, self._part, pad_id)

    def places(self, chunks: np.ndarray) -> list[list[Place]]:
        """Where the neighbours of chunks [n, 64] are, k or fewer of each."""
        rest = self._k - sum(database.claimed for database in self.databases)
        claimed: list[list[Place]] = [[] for _ in chunks]
        others: list[list[Place]] = [[] for _ in chunks]
        for number, database in enumerate(self.databases):
            count = database.claimed or rest
            if not count:
                continue
            into = claimed if database.claimed else others
            for row, found in enumerate(zip(*database.find(chunks, count), strict=True)):
                pairs = zip(*(part.tolist() for part in found), strict=True)
                into[row] += [Place(number, chunk, score) for chunk, score in pairs if chunk >= 0]
        sign = -1 if self.score == "bm25" else 1
        for row, places in enumerate(others):
            claimed[row] += sorted(places, key=lambda place: sign * place.score)[:rest]
        return claimed

    def found(self, chunk: np.ndarray) -> list[Place]:
        """Where the neighbours are of a chunk; none where it was not asked for."""
        return self._found.get(_key(chunk), [])

    def shares(self) -> list[float]:
        """Of all neighbours found so far, the share that came from each database."""
        counts = np.zeros(len(self.databases))
        for places in self._found.values():
            for place in places:
                counts[place.source] += 1
        return (counts / max(counts.sum(), 1)).tolist()

    def identity(self) -> list[dict[str, Any]]:
        """The databases by hash and revision."""
        manifests = [database.chunks.manifest for database in self.databases]
        return [{"database": m.hash, "revision": m.revision} for m in manifests]


class FixedNeighbours:
    """The same neighbours for every chunk, of a file.

    Attributes:
      tokens: [k, 128] int32.
    """

    def __init__(self, tokens: np.ndarray):
        """Takes neighbours as the model reads them."""
        self.tokens = tokens

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, k: int) -> "FixedNeighbours":
        """Reads a file of JSON lines: {"text": ...}, of which 128 tokens are read.

        Raises:
          UserError: no such file, a line of another form, or fewer than k of them.
        """
        file = pathlib.Path(path)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read ({error}): expected JSON lines") from None
        texts = []
        for number, line in enumerate(filter(str.strip, lines), 1):
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                texts.append(None)
            if not isinstance(texts[-1], str):
                raise UserError(f'{file}, line {number}: expected {{"text": "..."}}')
        if len(texts) < k:
            raise UserError(f"{file} has {len(texts)} neighbours: expected at least {k}")
        tokens = np.full((k, 2 * CHUNK_LENGTH), tokenizer.pad_id, np.int32)
        for row, text in enumerate(texts[:k]):
            ids = tokenizer.encode(text)[: 2 * CHUNK_LENGTH]
            tokens[row, : len(ids)] = ids
        return cls(tokens)

    def __call__(self, chunks: np.ndarray) -> np.ndarray:
        """[n, k, 128] of chunks [n, 64]."""
        return np.broadcast_to(self.tokens, (len(chunks), *self.tokens.shape))


def document_names(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(corpus, id) of documents given as CORPUS/ID; a UserError for other texts."""
    pairs = [text.partition("/") for text in texts]
    for text, (_, slash, _) in zip(texts, pairs, strict=True):
        if not slash:
            raise UserError(f"document {text!r}: expected CORPUS/ID")
    return tuple((corpus, document) for corpus, _, document in pairs)


def excluded_numbers(database: ChunkDatabase, texts: Sequence[str]) -> np.ndarray:
    """[d] numbers of a database's documents given as CORPUS/ID."""
    return np.array(numbers_of(database, document_names(texts)) if texts else [], np.int64)


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


def _tokenizer_of(database: SearchedDatabase) -> str | None:
    """The hash of the tokeniser that a database was made with."""
    chunks: ChunkDatabase = database.chunks
    return getattr(chunks, "parts", (chunks,))[0].manifest.parents.get("tokenizer")


def _key(chunk: np.ndarray) -> bytes:
    """A chunk as a dictionary's key."""
    return np.ascontiguousarray(chunk, np.int32).tobytes()
