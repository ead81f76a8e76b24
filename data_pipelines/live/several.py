"""Other sources of neighbours than one database: several of them at once, or the texts of a file.

    SeveralDatabases([first, second], [0, 0], 2)     the two nearest of both
    SeveralDatabases([first, second], [0, 1], 2)     the second gives one, the first the other
    FixedNeighbours.open("facts.jsonl", tokenizer)   the same ones for every chunk

Both implement the protocol retro_jax.generate.live_database.LiveDatabase. Databases that claim no
number of neighbours share what is left: the nearest of all of them are read. The ids of several
databases follow each other:

    database     first           second
    chunks       0 1 2 ... n-1   n n+1 ...
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Path
from data_pipelines.batches.batches import keep_part_of_text
from data_pipelines.chunk_database.database import CHUNK_LENGTH, ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.trace_sources import DatabaseLibrary
from data_pipelines.live.database import LiveDatabase
from data_pipelines.retriever.candidates import Found
from retro_jax.batch import Neighbour
from retro_jax.errors import UserError
from retro_jax.report.views import NeighbourSource, NeighbourView
from retro_jax.storage import files


class SeveralDatabases:
    """Databases that are searched together.

    Attributes:
      databases: that are asked. score: what scores are, "squared_l2" or "bm25".
      revision: of the first one. digest: the hashes of all.
    """

    def __init__(self, databases: Sequence[LiveDatabase], claims: Sequence[int], k: int) -> None:
        """Takes databases that are open.

        Args:
          databases: at least one, of one tokeniser and one kind of score.
          claims: of a chunk's neighbours those that come from each; 0: of what no other claims.
          k: neighbours of a chunk.

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
        if sum(claims) > k or (all(claims) and sum(claims) < k):
            raise UserError(f"the databases claim {sum(claims)} neighbours: expected {k} in all")
        self.databases, self.score = tuple(databases), first.score
        self.revision = first.revision
        self.digest = "+".join(database.digest for database in databases)
        self._claims, self._k = tuple(claims), k
        self._ends = np.cumsum([len(database.chunks) for database in databases])

    def find(self, chunks: np.ndarray, k: int) -> Found:
        """Ids and scores [n, k] of chunks [n, 64]; those that a database claims come first."""
        if k != self._k:
            raise UserError(f"k is {k}: expected {self._k}, which the databases share")
        rest, none = k - sum(self._claims), -np.inf if self.score == "bm25" else np.inf
        claimed: list[list[tuple[int, float]]] = [[] for _ in chunks]
        others: list[list[tuple[int, float]]] = [[] for _ in chunks]
        for number, (database, claim) in enumerate(zip(self.databases, self._claims, strict=True)):
            if not (claim or rest):
                continue
            into = claimed if claim else others
            for row, found in enumerate(zip(*database.find(chunks, claim or rest), strict=True)):
                pairs = zip(*(part.tolist() for part in found), strict=True)
                into[row] += [(self._first(number) + i, score) for i, score in pairs if i >= 0]
        sign = -1 if self.score == "bm25" else 1
        ids, scores = np.full((len(chunks), k), -1, np.int64), np.full((len(chunks), k), none)
        for row, left in enumerate(others):
            places = claimed[row] + sorted(left, key=lambda place: sign * place[1])[:rest]
            for slot, place in enumerate(places):
                ids[row, slot], scores[row, slot] = place
        return ids, scores.astype(np.float32)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """[n, k, R] int32 tokens of neighbours, as the model reads them."""
        values = self.databases[0].values(np.full_like(ids, -1))
        owners = self.owners(ids)
        for number, database in enumerate(self.databases):
            own = owners == number
            if own.any():
                found = database.values(np.where(own, ids - self._first(number), -1))
                values[own] = found[own]
        return values

    def neighbour(self, chunk: int, score: float) -> Neighbour:
        """Where a chunk is from, and its text."""
        database, inner = self.part(chunk)
        return database.neighbour(inner, score)

    def views(self, ids: np.ndarray, scores: np.ndarray, reader: np.ndarray) -> list[NeighbourView]:
        """As LiveDatabase."""
        views: list[NeighbourView] = []
        for chunk, score in zip(ids[ids >= 0].tolist(), scores[ids >= 0], strict=True):
            database, inner = self.part(chunk)
            views += database.views(np.array([inner]), np.array([score]), reader)
        return views

    def without(self, documents: Sequence[str]) -> "SeveralDatabases":
        """The same, but for some documents of the first database, as CORPUS/ID."""
        databases = [self.databases[0].without(documents), *self.databases[1:]]
        return SeveralDatabases(databases, self._claims, self._k)

    def votes(self) -> Callable[[np.ndarray], tuple[int, np.ndarray]] | None:
        """What asks the first one's token memory; None where it has none."""
        return self.databases[0].votes()

    def library(self) -> "SeveralLibraries":
        """What a page of traces asks of documents and tokens."""
        return SeveralLibraries(self)

    def owners(self, ids: np.ndarray) -> np.ndarray:
        """[...] int: which database each of some ids is of; -1 for none."""
        return np.where(ids < 0, -1, np.searchsorted(self._ends, ids, side="right"))

    def part(self, chunk: int) -> tuple[LiveDatabase, int]:
        """The database of a chunk, and its id there."""
        number = int(self.owners(np.array(chunk)))
        return self.databases[number], chunk - self._first(number)

    def shares(self, ids: np.ndarray) -> list[float]:
        """Of neighbours [...] the share that came from each database."""
        counts = np.bincount(self.owners(ids[ids >= 0]), minlength=len(self.databases))
        return (counts / max(counts.sum(), 1)).tolist()

    def identity(self) -> list[dict[str, Any]]:
        """The databases by hash and revision."""
        return [{"database": each.digest, "revision": each.revision} for each in self.databases]

    def _first(self, number: int) -> int:
        """The first id of a database."""
        return int(self._ends[number]) - len(self.databases[number].chunks)


class SeveralLibraries:
    """The library of the first database, with the sources of all."""

    def __init__(self, several: SeveralDatabases) -> None:
        """Takes the databases."""
        self._several = several
        self._libraries = [database.library() for database in several.databases]
        first = self._libraries[0]
        self.piece, self.label = first.piece, first.label
        self.document, self.votes = first.document, first.votes

    def sources(self, ids: np.ndarray, scores: np.ndarray) -> list[NeighbourSource | None]:
        """As DatabaseLibrary."""
        found: list[NeighbourSource | None] = []
        for chunk, score in zip(ids.tolist(), scores, strict=True):
            if chunk < 0:
                found.append(None)
                continue
            database, inner = self._several.part(chunk)
            library = self._libraries[self._several.databases.index(database)]
            found += library.sources(np.array([inner]), np.array([score]))
        return found


class FixedNeighbours:
    """The same neighbours for every chunk, of a file.

    Attributes:
      tokens: [n, R] int32, R 128 or fewer (BatchConfig.neighbour_part).
      revision: 0. digest: of nothing. score: as a database's.
    """

    revision, digest, score = 0, "", "squared_l2"

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, name: str = "") -> None:
        """Takes neighbours as the model reads them, and the name of their file."""
        self.tokens, self._tokenizer, self._name = tokens, tokenizer, name

    @classmethod
    def open(
        cls, path: Path, tokenizer: Tokenizer, k: int, part: str = "both"
    ) -> "FixedNeighbours":
        """Reads a file of JSON lines: {"text": ...}, of which the model reads `part` of 128 tokens.

        Raises:
          UserError: no such file, a line of another form, or fewer than k of them.
        """
        file = pathlib.Path(path)
        texts = []
        for number, line in enumerate(files.read_text_lines(file, "JSON lines"), 1):
            if not line.strip():
                continue
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError, RecursionError):
                texts.append(None)
            if not isinstance(texts[-1], str):
                raise UserError(f'{file}, line {number}: expected {{"text": "..."}}')
        if len(texts) < k:
            raise UserError(f"{file} has {len(texts)} neighbours: expected at least {k}")
        tokens = np.full((k, 2 * CHUNK_LENGTH), tokenizer.pad_id, np.int32)
        for row, text in enumerate(texts[:k]):
            ids = tokenizer.encode(text)[: 2 * CHUNK_LENGTH]
            tokens[row, : len(ids)] = ids
        tokens = keep_part_of_text(tokens, part, tokenizer.pad_id)
        return cls(tokens, tokenizer, file.name)

    def find(self, chunks: np.ndarray, k: int) -> Found:
        """The first k neighbours, for each of chunks [n, 64]."""
        if k > len(self.tokens):
            raise UserError(f"k is {k}: expected {len(self.tokens)} at most, of {self._name}")
        ids = np.tile(np.arange(k, dtype=np.int64), (len(chunks), 1))
        return ids, np.zeros(ids.shape, np.float32)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """[n, k, R] int32 tokens of neighbours."""
        return self.tokens[ids]

    def neighbour(self, chunk: int, score: float) -> Neighbour:
        """The line of the file, and its text."""
        tokens = self.tokens[chunk]
        tokens = tokens[tokens != self._tokenizer.pad_id]
        text, rest = (
            self._tokenizer.decode(part) for part in (tokens[:CHUNK_LENGTH], tokens[CHUNK_LENGTH:])
        )
        return Neighbour(f"line {chunk + 1}", self._name, 0, score, 0, text, rest)

    def views(self, ids: np.ndarray, scores: np.ndarray, reader: np.ndarray) -> list[NeighbourView]:
        """None: the file is known to who wrote it."""
        return []

    def without(self, documents: Sequence[str]) -> "FixedNeighbours":
        """Raises a UserError: there are no documents."""
        raise UserError(f"document {documents[0]!r}: expected none with neighbours of a file")

    def votes(self) -> None:
        """There is no token memory."""

    def library(self) -> DatabaseLibrary:
        """Raises a UserError: a trace names documents."""
        raise UserError(f"a trace with neighbours of {self._name}: expected a database")


def _tokenizer_of(database: LiveDatabase) -> str | None:
    """The hash of the tokeniser that a database was made with."""
    chunks: ChunkDatabase = database.chunks
    return getattr(chunks, "parts", (chunks,))[0].manifest.parents.get("tokenizer")
