"""Looks up the longest ending of a text that occurs in a database, and what followed it there."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.token_memory.build import KIND, part_names, token_width
from retro_jax.errors import UserError

LONGEST = 32  # tokens of an ending that are compared, unless a caller says otherwise
MOST_VOTES = 64  # occurrences that vote, unless a caller says otherwise


@dataclasses.dataclass(frozen=True)
class Match:
    """The longest ending of a text that occurs in the database, and the tokens that followed it.

    Attributes:
      length: tokens of the ending; 0 where not even the last token occurs.
      tokens: [v] int64, the token after each occurrence: its vote.
      chunks: [v] int64 ids of the chunks in which these tokens are. places: [v] int64, where in them.
      documents: [v] int64 numbers of the documents in which they are.
      occurrences: of the ending, before some were chosen to vote.
    """

    length: int
    tokens: np.ndarray
    chunks: np.ndarray
    places: np.ndarray
    documents: np.ndarray
    occurrences: int

    def share(self, token: int) -> float:
        """The share of the votes that a token has, from 0 to 1."""
        return float(np.mean(self.tokens == token)) if len(self.tokens) else 0.0


class TokenMemory:
    """The token memories of a database's revisions as one.

    Attributes:
      database: the chunks, of the revision that is asked; its removed documents do not vote.
      manifests: of each revision's own token memory.
    """

    def __init__(
        self, database: ChunkDatabase, parts: "Sequence[_Part]", manifests: Sequence[Manifest]
    ):
        """Use `open`."""
        self.database, self.manifests = database, tuple(manifests)
        self._parts = tuple(parts)

    @property
    def hashes(self) -> tuple[str, ...]:
        """Of each manifest."""
        return tuple(manifest.hash for manifest in self.manifests)

    @classmethod
    def open(
        cls, directories: Sequence[Path], database: ChunkDatabase, *, verify: bool = False
    ) -> "TokenMemory":
        """Opens the token memory of a database.

        Args:
          directories: one for each of the database's parts: revision 0 and each that added documents.
          database: of one revision, or several joined.
          verify: hash every file again.

        Raises:
          UserError: one is missing, damaged, or of another database.
        """
        databases = list(getattr(database, "parts", (database,)))
        if len(directories) != len(databases):
            raise UserError(
                f"{len(directories)} token memories for the {len(databases)} parts of"
                f" {database.directory}: expected one for each"
            )
        parts, manifests, first = [], [], 0
        for directory, source in zip(directories, databases, strict=True):
            folder = pathlib.Path(directory)
            if not (folder / MANIFEST_FILE).is_file():
                raise UserError(
                    f"{folder} is missing: expected the token memory of {source.directory};"
                    " run launch.prepare --stages=token_memory"
                )
            parents = {"database": (source.manifest, source.directory)}
            manifest = Manifest.open(folder, KIND, parents, verify)
            for i, (start, _) in enumerate(manifest.fact("parts")):
                parts.append(_Part.open(folder, i, first + start, token_width(source)))
            manifests.append(manifest)
            first += len(source)
        return cls(database, parts, manifests)

    def match(
        self,
        text: np.ndarray,
        *,
        longest: int = LONGEST,
        most_votes: int = MOST_VOTES,
        exclude: np.ndarray | None = None,
    ) -> Match:
        """The longest ending of a text that occurs in documents that may vote.

        Args:
          text: [n] tokens of one document from bos on, without padding; only its last `longest` count.
          longest: tokens that are compared at most.
          most_votes: occurrences that vote; of more, so many are taken in equal distances of the order
            of what precedes them. With 0 all vote.
          exclude: [d] numbers of documents that may not vote, beside removed ones.
        """
        ending = np.asarray(text)[-longest:]
        if not len(ending) or ending[-1] == self.database.eos_id:
            return _nothing()
        queries = [part.encode(ending) for part in self._parts]
        lengths = [part.longest(query) for part, query in zip(self._parts, queries)]
        barred = self.database.removed
        if exclude is not None and len(exclude):
            barred = np.union1d(barred, exclude)
        for length in range(max(lengths, default=0), 0, -1):
            reaching = [i for i in range(len(self._parts)) if lengths[i] >= length]
            ranges = [self._parts[i].range_of(queries[i], length) for i in reaching]
            match = self._votes([self._parts[i] for i in reaching], ranges, most_votes, barred)
            if match is not None:
                return dataclasses.replace(match, length=length)
        return _nothing()

    def _votes(
        self,
        parts: "Sequence[_Part]",
        ranges: Sequence[range],
        most: int,
        barred: np.ndarray,
    ) -> Match | None:
        """The votes of the endings in ranges of the order; None where no document may vote."""
        total = sum(map(len, ranges))
        if most and total > most:
            subset = self._chosen(parts, ranges, np.arange(most) * total // most, barred)
            if len(subset.tokens):
                return dataclasses.replace(subset, occurrences=total)
        every = self._chosen(parts, ranges, np.arange(total), barred)
        if most and len(every.tokens) > most:
            rows = np.arange(most) * len(every.tokens) // most
            every = _subset(every, rows)
        return every if len(every.tokens) else None

    def _chosen(
        self,
        parts: "Sequence[_Part]",
        ranges: Sequence[range],
        numbers: np.ndarray,
        barred: np.ndarray,
    ) -> Match:
        """The votes with these numbers, counted over all ranges, of documents that may vote."""
        bounds = np.cumsum([0, *map(len, ranges)]).tolist()
        columns = []
        for part, span, (low, high) in zip(parts, ranges, itertools.pairwise(bounds)):
            inside = numbers[(numbers >= low) & (numbers < high)] - low + span.start
            columns.append(part.following(inside))
        tokens, chunks, places = (np.concatenate(column) for column in zip(*columns))
        documents = self.database.documents(chunks)
        if len(barred):
            free = ~np.isin(documents, barred)
            match = Match(0, tokens, chunks, places, documents, int(free.sum()))
            return _subset(match, free)
        return Match(0, tokens, chunks, places, documents, len(tokens))


def _subset(match: Match, rows: np.ndarray) -> Match:
    """A match with some of its votes."""
    names = ("tokens", "chunks", "places", "documents")
    return dataclasses.replace(match, **{name: getattr(match, name)[rows] for name in names})


def _nothing() -> Match:
    """No match."""
    none = np.zeros(0, np.int64)
    return Match(0, none, none, none, none, 0)


def _memory(array: np.ndarray) -> memoryview:
    """An array as a view of its memory: single items and slices are ten times as fast as NumPy's."""
    return memoryview(cast(Any, array)) if len(array) else memoryview(b"")


class _Part:
    """One part's sorted endings, read from memory maps."""

    def __init__(
        self,
        text: np.ndarray,
        order: np.ndarray,
        starts: np.ndarray,
        *,
        first_chunk: int,
        width: int,
    ):
        """Use `open`."""
        self._text, self._order, self._starts = text, order, starts
        self._bytes = _memory(text.view(np.uint8))
        self._places = _memory(order)
        self._first_chunk, self._width = first_chunk, width

    @classmethod
    def open(cls, folder: pathlib.Path, index: int, first_chunk: int, width: int) -> "_Part":
        """Maps the files of part `index`, whose first chunk has the id `first_chunk`."""
        arrays = [np.load(folder / name, mmap_mode="r") for name in part_names(index)]
        return cls(*arrays, first_chunk=first_chunk, width=width)

    def encode(self, ending: np.ndarray) -> bytes:
        """An ending as the text has it: backwards, big-endian."""
        return ending[::-1].astype(f">u{self._width}").tobytes()

    def longest(self, query: bytes) -> int:
        """Tokens of the longest ending that occurs."""
        position = self._first(query)
        return max(self._shared(i, query) for i in (position - 1, position))

    def range_of(self, query: bytes, length: int) -> range:
        """The places in the order of the endings that share their last `length` tokens with it."""
        prefix = query[: length * self._width]
        return range(self._first(prefix), self._first(prefix, after=True))

    def following(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens after endings, given by their places in the order; their chunks and places."""
        backwards = self._order[numbers].astype(np.int64) - 1
        forwards = len(self._text) - 1 - backwards
        chunks = np.searchsorted(self._starts, forwards, side="right") - 1
        tokens = self._text[backwards].astype(np.int64)
        return tokens, chunks + self._first_chunk, forwards - self._starts[chunks]

    def _first(self, query: bytes, after: bool = False) -> int:
        """The first place in the order whose ending is not below the query, or above what it begins."""
        low, high, size = 0, len(self._places), len(query)
        while low < high:
            middle = (low + high) // 2
            at = self._places[middle] * self._width
            ending = bytes(self._bytes[at : at + size])
            if ending < query or (after and ending == query):
                low = middle + 1
            else:
                high = middle
        return low

    def _shared(self, position: int, query: bytes) -> int:
        """Tokens that an ending of the order shares with the query."""
        if not 0 <= position < len(self._places):
            return 0
        at = self._places[position] * self._width
        ending = bytes(self._bytes[at : at + len(query)])
        size = min(len(ending), len(query))
        differing = int.from_bytes(ending[:size], "big") ^ int.from_bytes(query[:size], "big")
        return (size - (differing.bit_length() + 7) // 8) // self._width
