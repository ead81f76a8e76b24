"""Documents sorted on disk, by corpus and a hash, in memory that does not grow with their number.

add(entry)               -> kept until they are `sort_bytes`, sorted -> run-00000.lines: their lines
                                                                        run-00000.rows: a row for each
                                                                        run-00000.json: rows of a corpus,
                                                                        sizes of the other files
                                                                        run-00000.contents: (content,
                                                                        order) of each, by content
Runs.find_duplicates()   <- the contents of all runs within one range at a time -> dropped-00000
Runs.sorted(corpus)      <- the rows of all runs within one range of the order at a time, merged

Runs may be written by many processes, into folders of their own.
"""

import builtins
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.corpora import SPLITS
from data_pipelines.documents.hashing import stable_hash
from retro_jax.errors import UserError
from retro_jax.storage import files

SORT_BYTES = 64 << 20
ROW = np.dtype(
    [
        ("o0", "<u8"),  # the order, as two numbers
        ("o1", "<u8"),
        ("offset", "<u8"),  # of the line in the run's file
        ("length", "<u8"),  # of the line, its end included
        ("size", "<u8"),  # UTF-8 bytes of the text
        ("run", "<u4"),
        ("split", "u1"),
    ]
)
_CONTENT = np.dtype([(name, "<u8") for name in ("c0", "c1", "o0", "o1", "corpus")])
_OVERHEAD = 400  # bytes that a record takes in memory beside its line
_LINES, _ROWS, _CONTENTS, _SPANS = ".lines", ".rows", ".contents", ".json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One document on its way.

    Attributes:
      corpus: its name.
      order: 16 bytes to sort by, within the corpus.
      content: 16 bytes that are equal for duplicates; None where they are kept.
      split: its name.
      size: UTF-8 bytes of the text.
      line: the JSON line, with its end.
    """

    corpus: str
    order: bytes
    content: bytes | None
    split: str
    size: int
    line: bytes


class RunWriter:
    """Leaves entries in a folder as sorted runs."""

    def __init__(self, folder: pathlib.Path, place: pathlib.Path, sort_bytes: int) -> None:
        """Begins with an empty folder.

        Args:
          folder: where runs go.
          place: what an error of writing names.
          sort_bytes: memory of the entries of a run.
        """
        self._folder, self._place, self._limit = folder, place, sort_bytes
        self._entries: list[Entry] = []
        self._size = 0
        self.runs = 0

    def add(self, entry: Entry) -> None:
        """Takes one."""
        self._entries.append(entry)
        self._size += len(entry.line) + _OVERHEAD
        if self._size >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Writes a run of the rows in memory."""
        if not self._entries:
            return
        self._entries.sort(key=lambda entry: (entry.corpus, entry.order))
        lengths = [len(entry.line) for entry in self._entries]
        offsets = itertools.accumulate(lengths, initial=0)
        rows = [
            (*_halves(e.order), offset, length, e.size, 0, SPLITS.index(e.split))
            for e, offset, length in zip(self._entries, offsets, lengths)
        ]
        stem = str(self._folder / f"run-{self.runs:05d}")
        with files.writing(self._place, self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            pieces: dict[str, Iterable[Any]] = {
                _LINES: (entry.line for entry in self._entries),
                _ROWS: [np.array(rows, ROW).tobytes()],
                _CONTENTS: [self._contents().tobytes()],
            }
            sizes = {end: _write(stem + end, data) for end, data in pieces.items()}
            about = {"spans": self._spans(), "sizes": sizes}
            _write(stem + _SPANS, [json.dumps(about).encode()])
        self._entries, self._size, self.runs = [], 0, self.runs + 1

    def _contents(self) -> np.ndarray:
        """Content and order of the entries that have a content, by content."""
        pairs = [
            (*_halves(e.content), *_halves(e.order), _corpus_hash(e.corpus))
            for e in self._entries
            if e.content is not None
        ]
        contents = np.array(pairs, _CONTENT)
        return contents[np.lexsort((contents["c1"], contents["c0"]))]

    def _spans(self) -> dict[str, list[int]]:
        """The first and last row of each corpus."""
        spans, place = {}, 0
        for corpus, group in itertools.groupby(self._entries, lambda entry: entry.corpus):
            count = sum(1 for _ in group)
            spans[corpus] = [place, place + count]
            place += count
        return spans


class Runs:
    """The runs of several folders, as one sorted whole.

    Attributes:
      stems: path of each run without the ends of its files' names.
    """

    def __init__(self, folders: Sequence[pathlib.Path], sort_bytes: int = SORT_BYTES) -> None:
        """Opens finished runs; `sort_bytes` of rows are in memory at a time.

        Raises:
          UserError: a file that is not as it was written.
        """
        matches = (sorted(folder.glob(f"run-*{_LINES}")) for folder in folders)
        self.stems = [str(path)[: -len(_LINES)] for path in itertools.chain.from_iterable(matches)]
        self._spans = [_checked_spans(stem) for stem in self.stems]
        self._limit = max(1, sort_bytes // (4 * ROW.itemsize))  # sorting takes copies
        self._dropped: list[pathlib.Path] = []

    @property
    def corpora(self) -> list[str]:
        """Their names, in order."""
        return sorted({corpus for spans in self._spans for corpus in spans})

    def __len__(self) -> int:
        """Their rows."""
        return sum(stop - start for spans in self._spans for start, stop in spans.values())

    @property
    def size(self) -> int:
        """Bytes of their lines."""
        return sum(pathlib.Path(stem + _LINES).stat().st_size for stem in self.stems)

    def sorted(self, corpus: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows of a corpus by increasing order, part by part; and which are duplicates."""
        spans = [(i, *blocks[corpus]) for i, blocks in enumerate(self._spans) if corpus in blocks]
        edges = _edges(sum(stop - start for _, start, stop in spans), self._limit)
        parts = [
            _Part(pathlib.Path(self.stems[run] + _ROWS), ROW, "o0", edges, span=(start, stop))
            for run, start, stop in spans
        ]
        owner = _corpus_hash(corpus)
        dropped = [_Part(path, _CONTENT, "o0", edges, corpus=owner) for path in self._dropped]
        for number in range(len(edges) + 1):
            blocks = [np.zeros(0, ROW)]
            for (run, _, _), part in zip(spans, parts):
                blocks.append(part.read(number))
                blocks[-1]["run"] = run
            rows = np.concatenate(blocks)
            rows = rows[np.lexsort((rows["o1"], rows["o0"]))]
            others = [np.zeros(0, _CONTENT), *(part.read(number) for part in dropped)]
            yield rows, _contained(rows, np.concatenate(others))

    def find_duplicates(self, folder: pathlib.Path) -> int:
        """Finds the records whose content one of another order has; returns their number.

        Args:
          folder: where the finding is kept.
        """
        paths = [pathlib.Path(stem + _CONTENTS) for stem in self.stems]
        edges = _edges(sum(p.stat().st_size for p in paths) // _CONTENT.itemsize, self._limit)
        parts = [_Part(path, _CONTENT, "c0", edges) for path in paths]
        total, self._dropped = 0, []
        for number in range(len(edges) + 1):
            blocks = [np.zeros(0, _CONTENT), *(part.read(number) for part in parts)]
            pairs = np.concatenate(blocks)
            keys = [pairs[name] for name in ("corpus", "o1", "o0", "c1", "c0")]
            pairs = pairs[np.lexsort(keys)]
            same_document = _equal(pairs[1:], pairs[:-1], ("c0", "c1", "o0", "o1", "corpus"))
            pairs = pairs[np.concatenate([[True], ~same_document])[: len(pairs)]]
            again = np.zeros(len(pairs), bool)
            again[1:] = _equal(pairs[1:], pairs[:-1], ("c0", "c1"))
            matches = pairs[again]
            path = folder / f"dropped-{number:05d}"
            with files.writing(folder):
                matches[np.lexsort((matches["o1"], matches["o0"], matches["corpus"]))].tofile(path)
            self._dropped.append(path)
            total += len(matches)
        return total

    def line(self, row: np.ndarray) -> builtins.bytes:
        """The line of one row."""
        return next(read_lines(self.stems, row.reshape(1)))


class _Part:
    """Sorted rows in a file, of which one range of a field is read at a time."""

    def __init__(
        self,
        path: pathlib.Path,
        dtype: np.dtype[Any],
        field: str,
        edges: np.ndarray,
        *,
        span: tuple[int, int] | None = None,
        corpus: int | None = None,
    ) -> None:
        """Finds where each range begins.

        Args:
          path: the file.
          dtype: of its rows.
          field: by which they are sorted.
          edges: where the second range begins, the third, ...
          span: rows that count; all by default.
          corpus: or the corpus of which they are.
        """
        self._path, self._dtype = path, dtype
        start, stop = span or (0, path.stat().st_size // dtype.itemsize)
        rows = self._read(start, stop)
        if corpus is not None:
            low = np.searchsorted(rows["corpus"], np.uint64(corpus), side="left")
            high = np.searchsorted(rows["corpus"], np.uint64(corpus), side="right")
            rows, start, stop = rows[low:high], start + int(low), start + int(high)
        cuts = start + np.searchsorted(np.ascontiguousarray(rows[field]), edges)
        self._bounds = np.concatenate([[start], cuts, [stop]])

    def read(self, number: int) -> np.ndarray:
        """The rows of one range."""
        return self._read(*self._bounds[number : number + 2].tolist())

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Some rows."""
        size = self._dtype.itemsize
        return np.fromfile(self._path, self._dtype, stop - start, offset=start * size)


def _write(path: str, data: Iterable[bytes]) -> int:
    """Writes a file; its bytes are on the disk when this returns. Returns their number."""
    with open(path, "wb") as file:
        file.writelines(data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def _checked_spans(stem: str) -> dict[str, list[int]]:
    """The rows of each corpus of a run, whose files have the sizes that they were written with."""
    path = pathlib.Path(stem + _SPANS)
    if not path.is_file():
        raise _damaged(str(path), "no such file")
    about = files.read_json(path)
    for end, size in about["sizes"].items():
        file = pathlib.Path(stem + end)
        there = file.stat().st_size if file.is_file() else 0
        if there != size:
            raise _damaged(str(file), f"{there} bytes where {size} were written")
    return about["spans"]


def _damaged(path: str, what: str) -> UserError:
    """The error of a temporary file that has changed since it was written."""
    spill = pathlib.Path(path).parent
    return UserError(f"{path} is damaged ({what}): expected it whole; remove {spill} and run again")


def read_lines(stems: Sequence[str], rows: np.ndarray) -> Iterator[bytes]:
    """The lines of rows, in their order; each run is opened once."""
    lines: list[bytes] = [b""] * len(rows)
    places = np.argsort(rows["run"], kind="stable")
    for run, group in itertools.groupby(places.tolist(), lambda row: rows["run"][row]):
        with open(stems[run] + _LINES, "rb") as file:
            for row in group:
                file.seek(int(rows["offset"][row]))
                lines[row] = file.read(int(rows["length"][row]))
                if len(lines[row]) != rows["length"][row] or lines[row][-1:] != b"\n":
                    raise _damaged(stems[run] + _LINES, "a line that ends too early")
    yield from lines


def repeated(rows: np.ndarray) -> np.ndarray | None:
    """A row of sorted ones whose order another has too; None if there is none."""
    same = np.flatnonzero(_equal(rows[1:], rows[:-1], ("o0", "o1")))
    return rows[same[0]] if len(same) else None


def first_of_repeated(rows: np.ndarray) -> np.ndarray:
    """[n] bool: which of some sorted rows are the first of their order."""
    firsts = np.ones(len(rows), bool)
    firsts[1:] = ~_equal(rows[1:], rows[:-1], ("o0", "o1"))
    return firsts


def _corpus_hash(corpus: str) -> int:
    """The hash that represents a corpus beside a content."""
    return int.from_bytes(stable_hash(corpus, "corpus")[:8], "little")


def _edges(total: int, limit: int) -> np.ndarray:
    """Where ranges of a hash begin, the first one left out, so that none has much over `limit` rows."""
    count = max(1, -(-total // limit))
    return np.array([(1 << 64) * i // count for i in range(1, count)], np.uint64)


def _contained(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[n] bool: which rows have the order of one of the others."""
    names = ["o0", "o1"]
    both = np.zeros(len(others) + len(rows), [(name, "<u8") for name in names])
    for name in names:
        both[name] = np.concatenate([others[name], rows[name]])
    theirs = np.arange(len(both)) < len(others)
    places = np.lexsort((~theirs, both["o1"], both["o0"]))
    first = np.ones(len(both), bool)
    ordered = both[places]
    first[1:] = ~_equal(ordered[1:], ordered[:-1], ("o0", "o1"))
    group = np.cumsum(first) - 1
    mask = np.zeros(len(both), bool)
    mask[places] = theirs[places][first][group] if len(both) else False
    return mask[len(others) :]


def _equal(rows: np.ndarray, others: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """[n] bool: which rows have the same values in some fields."""
    same = np.ones(len(rows), bool)
    for name in names:
        same &= rows[name] == others[name]
    return same


def _halves(data: bytes) -> tuple[int, int]:
    """16 bytes as two numbers that are ordered as the bytes are."""
    return int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
