"""Corpora read portion by portion, wherever the runner is, into sorted runs on disk.

    corpus --listed--> listing.jsonl, cut into portions of some files --a worker each-->
    portion-00000/run-00000..., portion-00001/run-00000..., ...

A portion's folder is whole or not there, so what a killed run had read is not read again, unless the
listing is another: a file that came, went or changed.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.corpora import (
    CorpusConfig,
    Document,
    Reading,
    SourceFile,
    check_reading,
    files_of,
    parts_of,
    read_file,
)
from data_pipelines.documents.external_sort import Entry, Runs, RunWriter
from data_pipelines.documents.hashing import split_of, stable_hash
from retro_jax.errors import UserError
from retro_jax.storage import files

_LISTING, _STARTS, _IDENTITY, _FACTS = "listing.jsonl", "starts.npy", "identity.json", "facts.json"
_FORMAT = 3  # of a portion: what another version left is read again
_PORTION_FILES, _PORTION_BYTES = 1000, 16 << 20
_PART_BYTES = 64 << 20  # of a larger file of JSON lines or Parquet, which several workers read
_FILES_AT_ONCE = 1 << 14  # whose parts are known before they are listed


@dataclasses.dataclass(frozen=True)
class Sorting:
    """What becomes of a document besides its text, and how much memory sorting takes.

    Attributes:
      validation, test, skip_bad: as DocumentsConfig has them.
      sort_bytes: bytes of documents in the memory of a process.
    """

    validation: float
    test: float
    skip_bad: bool
    sort_bytes: int

    def entry(self, document: Document, corpus: CorpusConfig) -> Entry:
        """A document on its way."""
        fields = {"id": document.id, "corpus": document.corpus, "text": document.text}
        line = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        split = split_of(document.id, validation=self.validation, test=self.test)
        text = document.text
        return Entry(
            corpus=document.corpus,
            order=stable_hash(document.id, "order"),
            content=stable_hash(text, "text") if corpus.drops_duplicates else None,
            split=corpus.split or split,
            size=len(text.encode()),
            line=line.encode() + b"\n",
        )


@dataclasses.dataclass(frozen=True)
class ReadPortion:
    """Reads portions of several corpora, which are numbered through.

    Attributes:
      folder: where each corpus has a folder of its name.
      corpora: the corpora; portions[i] are those of corpus i.
      sorting: what becomes of documents.
    """

    folder: str
    corpora: tuple[CorpusConfig, ...]
    portions: tuple[int, ...]
    sorting: Sorting

    def place(self, index: int) -> tuple[CorpusConfig, int]:
        """The corpus of a portion, and its number there."""
        ends = list(itertools.accumulate(self.portions))
        corpus = next(i for i, end in enumerate(ends) if index < end)
        return self.corpora[corpus], index - ends[corpus] + self.portions[corpus]

    def path(self, index: int) -> pathlib.Path:
        """The folder of a portion."""
        corpus, number = self.place(index)
        return pathlib.Path(self.folder, corpus.name, f"portion-{number:05d}")

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Reads portion `index`; returns its documents. `report` receives counts of bytes."""
        (corpus, number), path = self.place(index), self.path(index)
        reading = Reading(self.sorting.skip_bad)
        with _new_folder(path) as folder:
            writer = RunWriter(folder, path.parent, self.sorting.sort_bytes)
            for file in _listed(path.parent, number):
                for document in read_file(corpus, file, reading):
                    writer.add(self.sorting.entry(document, corpus))
                report(file.size)
            writer.flush()
            files.write_atomically(folder / _FACTS, files.to_json(vars(reading)))
        return reading.counts["documents"]


@dataclasses.dataclass(frozen=True)
class Parts:
    """Cuts large files: where frames and row groups begin is read from the file."""

    corpus: CorpusConfig
    most: int

    def __call__(self, file: SourceFile) -> list[SourceFile]:
        """The parts of a file."""
        return list(parts_of(self.corpus, file, self.most))


def read_corpora(
    folder: pathlib.Path, corpora: Sequence[CorpusConfig], sorting: Sorting, runner: Runner
) -> dict[str, tuple[Reading, Runs]]:
    """Reads corpora into `folder`, or what is missing of them.

    Returns:
      For each corpus by name: what was counted, and its runs.

    Raises:
      UserError: a corpus that is missing, empty or bad, or what was read of it is damaged.
    """
    for corpus in corpora:  # all, before any is read: a wrong path is reported at once
        _list(folder / corpus.name, corpus, sorting, runner)
    starts = {c.name: np.load(folder / c.name / _STARTS) for c in corpora}
    portions = tuple(len(starts[c.name]) for c in corpora)
    work = ReadPortion(files.absolute(folder), tuple(corpora), portions, sorting)
    sizes = np.concatenate([starts[c.name][:, 1] for c in corpora]).tolist()
    missing = [i for i in range(sum(portions)) if not work.path(i).is_dir()]
    run_counted(runner, work, missing, sizes, what="reading", unit="B", logged=False)
    done = {}
    for corpus in corpora:
        paths = [p for i in range(sum(portions)) if (p := work.path(i)).parent.name == corpus.name]
        reading = Reading()
        for path in paths:
            reading.add(_reading_of(files.read_json(path / _FACTS)))
        check_reading(corpus, reading)
        runs = Runs(paths, sorting.sort_bytes)
        if len(runs) != reading.counts["documents"]:
            raise UserError(
                f"{folder / corpus.name} has {len(runs):,} documents of corpus {corpus.name!r}:"
                f" expected the {reading.counts['documents']:,} that were read; remove it and run"
                " again"
            )
        done[corpus.name] = reading, runs
    return done


def _reading_of(facts: dict[str, Any]) -> Reading:
    """A portion's counts."""
    counters = {name: collections.Counter(facts[name]) for name in ("counts", "labels")}
    return Reading(**(facts | counters))


def _list(folder: pathlib.Path, corpus: CorpusConfig, sorting: Sorting, runner: Runner) -> None:
    """Writes the list of a corpus's files, and empties the folder if the list there differs."""
    digest, starts = hashlib.sha256(), list[tuple[int, int, int]]()
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with files.temporary_name(folder / _LISTING) as temporary:
        offset = count = size = 0
        with open(temporary, "wb") as listing:
            for file in _parts(corpus, runner):
                line = json.dumps(list(vars(file).values())).encode() + b"\n"
                if not starts or count == _PORTION_FILES or size + file.size > _PORTION_BYTES:
                    starts.append((offset, 0, 0))
                    count = size = 0
                digest.update(line)
                listing.write(line)
                offset, count, size = offset + len(line), count + 1, size + file.size
                starts[-1] = (starts[-1][0], size, count)
        read = dataclasses.replace(corpus, repeated_ids="refuse")  # it matters after reading
        identity = files.plain([_FORMAT, read, sorting, digest.hexdigest()])
        record = folder / _IDENTITY
        if record.is_file() and files.read_json(record)["identity"] == identity:
            return
        for path in folder.iterdir():
            if path != temporary:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with open(temporary, "rb") as listing:
            os.fsync(listing.fileno())
        temporary.rename(folder / _LISTING)
    with files.temporary_name(folder / _STARTS) as temporary:
        array = np.array(starts, np.int64)
        files.write_hashed(temporary, lambda file: np.save(file, array))
        temporary.rename(folder / _STARTS)
    files.write_atomically(record, files.to_json({"identity": identity}))


def _parts(corpus: CorpusConfig, runner: Runner) -> Iterator[SourceFile]:
    """The files of a corpus in order, large ones in parts; several large ones are looked at at once."""
    every, work = files_of(corpus), Parts(corpus, _PART_BYTES)
    while bulk := list(itertools.islice(every, _FILES_AT_ONCE)):
        large = [file for file in bulk if file.size > _PART_BYTES]
        parts = dict((runner if len(large) > 1 else InProcess()).run(work, large))
        for file in bulk:
            yield from parts.get(file, [file])


def _listed(folder: pathlib.Path, portion: int) -> Iterator[SourceFile]:
    """The files of a portion."""
    offset, _, count = np.load(folder / _STARTS, mmap_mode="r")[portion].tolist()
    with open(folder / _LISTING, "rb") as listing:
        listing.seek(offset)
        for line in itertools.islice(listing, count):
            yield SourceFile(*json.loads(line))


@contextlib.contextmanager
def _new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder under a temporary name, which gets its own when all went well."""
    temporary = path.parent / f"{files.TEMPORARY}{os.getpid()}-{path.name}"
    try:
        with files.writing(path.parent):
            temporary.mkdir()
        yield temporary
        try:
            files.sync_folder(temporary)
            temporary.rename(path)
            files.sync_folder(path.parent)
        except OSError:
            if not path.is_dir():  # another worker, which was taken for dead, made it too
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
