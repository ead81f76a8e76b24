"""Looks up the longest ending of a text that occurs in a database, and what followed it there."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.token_memory.build import KIND, part_names, token_width
from retro_jax.errors import UserError

LONGEST = 32  # tokens of an ending that are compared, unless a caller says otherwise
MOST_VOTES = 64  # occurrences that vote, unless a caller says otherwise
_SPARE = 64  # times as many are looked at, where some may not vote


Located = tuple[np.ndarray, np.ndarray, np.ndarray]  # chunks, places and documents of votes


@dataclasses.dataclass(frozen=True)
class Match:
    """The longest ending of a text that occurs in the database, and the tokens that followed it.

    Attributes:
      length: tokens of the ending; 0 where not even the last token occurs.
      tokens: [v] int64, the token after each occurrence: its vote.
      occurrences: of the ending, before some were chosen to vote.
      locate: finds where these tokens are, when that is first asked.
    """

    length: int
    tokens: np.ndarray
    occurrences: int
    locate: Callable[[], Located]

    @functools.cached_property
    def _located(self) -> Located:
        """Chunks, places and documents of the votes."""
        return self.locate()

    @property
    def chunks(self) -> np.ndarray:
        """[v] int64 ids of the chunks in which the tokens are."""
        return self._located[0]

    @property
    def places(self) -> np.ndarray:
        """[v] int64, where in their chunks the tokens are."""
        return self._located[1]

    @property
    def documents(self) -> np.ndarray:
        """[v] int64 numbers of the documents in which the tokens are."""
        return self._located[2]

    def share(self, token: int) -> float:
        """The share of the votes that a token has, from 0 to 1."""
        return float(np.mean(self.tokens == token)) if len(self.tokens) else 0.0

    def chosen(self, rows: np.ndarray) -> "Match":
        """The same with some of its votes."""
        located = tuple(column[rows] for column in self._located)
        return dataclasses.replace(
            self, tokens=self.tokens[rows], locate=lambda: cast(Located, located)
        )


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
                    f"{folder} is missing: expected the token memory of {source.directory}, which"
                    " launch.evaluate --retrieval=tokens builds"
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
        found = [part.longest(query) for part, query in zip(self._parts, queries)]
        barred = self.database.removed
        if exclude is not None and len(exclude):
            barred = np.union1d(barred, exclude)
        barred_places = 0  # of an ending all of whose documents may not vote
        for length in range(max((each for each, _ in found), default=0), 0, -1):
            reaching = [i for i, each in enumerate(found) if each[0] >= length]
            ranges = [self._parts[i].range_of(queries[i], length, found[i][1]) for i in reaching]
            total = sum(map(len, ranges))
            if total == barred_places:  # the same places as those of the longer ending
                continue
            barred_places = total
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
        if not len(barred):
            return self._match(parts, ranges, min(most, total) if most else total, total)
        # A removed document takes no other's place: where one is met, more occurrences are looked at.
        tries = [(most, most), (_SPARE * most, 1)]
        for count, least in [*(each for each in tries if 0 < each[0] < total), (total, 1)]:
            match = self._match(parts, ranges, count, total)
            rows = np.flatnonzero(~np.isin(match.documents, barred))
            if len(rows) >= least:
                among = len(rows) if count == total else total
                if 0 < most < len(rows):
                    rows = rows[np.arange(most) * len(rows) // most]
                return dataclasses.replace(match.chosen(rows), occurrences=among)
        return None

    def _match(
        self, parts: "Sequence[_Part]", ranges: Sequence[range], count: int, total: int
    ) -> Match:
        """The votes of so many endings, in equal distances over all ranges, of any documents."""
        numbers = np.arange(count) if count == total else np.arange(count) * total // count
        if len(parts) == 1:
            following = [parts[0].following(numbers + ranges[0].start)]
        else:
            bounds, following = np.cumsum([0, *map(len, ranges)]).tolist(), []
            for part, span, (low, high) in zip(parts, ranges, itertools.pairwise(bounds)):
                inside = numbers[(numbers >= low) & (numbers < high)]
                following.append(part.following(inside - low + span.start))

        def locate() -> Located:
            pairs = [part.located(each) for part, each in zip(parts, following, strict=True)]
            chunks, places = (np.concatenate(column) for column in zip(*pairs, strict=True))
            return chunks, places, self.database.documents(chunks)

        tokens = [part.tokens(each) for part, each in zip(parts, following, strict=True)]
        return Match(0, tokens[0] if len(tokens) == 1 else np.concatenate(tokens), total, locate)


def _nothing() -> Match:
    """No match."""
    none = np.zeros(0, np.int64)
    return Match(0, none, 0, lambda: (none, none, none))


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

    def longest(self, query: bytes) -> tuple[int, int]:
        """Tokens of the longest ending that occurs, and the first place whose ending is not below it."""
        position = self._first(query, 0, len(self._places))
        return max(self._shared(i, query) for i in (position - 1, position)), position

    def range_of(self, query: bytes, length: int, near: int) -> range:
        """The places in the order of the endings that share their last `length` tokens with it.

        They are around the place that `longest` gave, and looked for from there outwards.
        """
        prefix = query[: length * self._width]
        low, step = near - 1, 1
        while low >= 0 and self._ending(low, len(prefix)) >= prefix:
            low, step = low - step, 2 * step
        high, step = near, 1
        while high < len(self._places) and self._ending(high, len(prefix)) <= prefix:
            high, step = high + step, 2 * step
        first = self._first(prefix, max(low + 1, 0), near)
        return range(first, self._first(prefix, near, min(high, len(self._places)), after=True))

    def following(self, numbers: np.ndarray) -> np.ndarray:
        """Where in the text the tokens after endings are, given by their places in the order."""
        return self._order[numbers].astype(np.int64) - 1

    def tokens(self, following: np.ndarray) -> np.ndarray:
        """The tokens there."""
        return self._text[following].astype(np.int64)

    def located(self, following: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Their chunks, and their places in these."""
        forwards = len(self._text) - 1 - following
        chunks = np.searchsorted(self._starts, forwards, side="right") - 1
        return chunks + self._first_chunk, forwards - self._starts[chunks]

    def _first(self, query: bytes, low: int, high: int, after: bool = False) -> int:
        """The first place of a range whose ending is not below the query, or above what it begins."""
        size, places, text, width = len(query), self._places, self._bytes, self._width
        while low < high:
            middle = (low + high) // 2
            at = places[middle] * width
            ending = bytes(text[at : at + size])
            if ending < query or (after and ending == query):
                low = middle + 1
            else:
                high = middle
        return low

    def _ending(self, position: int, size: int) -> bytes:
        """The first bytes of an ending of the order."""
        at = self._places[position] * self._width
        return bytes(self._bytes[at : at + size])

    def _shared(self, position: int, query: bytes) -> int:
        """Tokens that an ending of the order shares with the query."""
        if not 0 <= position < len(self._places):
            return 0
        ending = self._ending(position, len(query))
        size = min(len(ending), len(query))
        differing = int.from_bytes(ending[:size], "big") ^ int.from_bytes(query[:size], "big")
        return (size - (differing.bit_length() + 7) // 8) // self._width
