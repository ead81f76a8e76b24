"""Documents and chunks of a database of several revisions, copied without what was removed.

Rows move, and nothing is tokenised again. Documents are ordered by corpus, within a corpus as before,
so that a corpus is one range of chunks and its sequences are the same.

    revisions' documents --> one plan: the documents of each new shard --a worker each--> new shards
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import (
    KIND,
    ChunkDatabase,
    finish_chunks,
    shard_files,
)
from data_pipelines.documents.documents import KIND as DOCUMENTS
from data_pipelines.documents.selection import MOST_SHARDS
from data_pipelines.leakage.near_documents import KIND as LEAKAGE
from data_pipelines.leakage.near_documents import kept_counts, kept_lines
from retro_jax.storage import files


@dataclasses.dataclass(frozen=True)
class CompactionPlan:
    """Which documents of a database a compaction has, in its order.

    Attributes:
      numbers: [d] int64, their numbers in the database.
      firsts, counts: [d] int64, their first chunks in it, and how many chunks each has.
      bounds: [shards + 1] int64, where the documents of each new shard begin, and the last ones end.
    """

    numbers: np.ndarray
    firsts: np.ndarray
    counts: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, database: ChunkDatabase, shard_bytes: int) -> "CompactionPlan":
        """Plans shards of one corpus and at most so many bytes of text, or one longer document.

        They are larger where there would be too many, as those of documents are. Memory is 40 bytes for each document.
        """
        corpora = {name: i for i, name in enumerate(sorted(database.corpora))}
        columns = [("corpus", "<i4"), ("first", "<i8"), ("chunks", "<i8"), ("bytes", "<i8")]
        rows = np.fromiter(
            ((corpora[r.corpus], r.first_chunk, r.chunks, r.bytes) for r in database.records()),
            columns,
        )
        numbers = np.flatnonzero(~database.is_removed(np.arange(len(rows))))
        numbers = numbers[np.argsort(rows["corpus"][numbers], kind="stable")]
        rows = rows[numbers]
        ends = np.cumsum(rows["bytes"])
        shard_bytes = max(shard_bytes, int(ends[-1]) // MOST_SHARDS if len(ends) else 0)
        borders = np.flatnonzero(np.diff(rows["corpus"])) + 1
        bounds = [0]
        for border in [*borders.tolist(), len(rows)]:
            while bounds[-1] < border:
                first = bounds[-1]
                limit = shard_bytes + (int(ends[first - 1]) if first else 0)
                fitting = int(np.searchsorted(ends, limit, side="right"))
                bounds.append(min(border, max(first + 1, fitting)))
        return cls(numbers, rows["first"], rows["chunks"], np.array(bounds, np.int64))

    @classmethod
    def read(cls, path: Path) -> "CompactionPlan":
        """What `write` wrote."""
        return cls(*files.read_arrays(pathlib.Path(path), 4))

    def write(self, path: Path) -> None:
        """Writes it to a file."""
        fields = (self.numbers, self.firsts, self.counts, self.bounds)
        files.write_arrays(pathlib.Path(path), fields)

    @property
    def shards(self) -> list[range]:
        """The documents of each new shard, by their places in the plan."""
        return [range(a, b) for a, b in itertools.pairwise(self.bounds.tolist())]

    def chunk_ids(self, places: range) -> np.ndarray:
        """[n] int64: the chunks in the old database of the documents at some places."""
        part = slice(places.start, places.stop)
        firsts, counts = self.firsts[part], self.counts[part]
        ends = np.cumsum(counts)
        return np.repeat(firsts - (ends - counts), counts) + np.arange(counts.sum())


def compact_documents(
    directory: Path,
    database: ChunkDatabase,
    parts: Sequence[ChunkDatabase],
    plan_file: Path,
    *,
    runner: Runner = InProcess(),
) -> Manifest:
    """Copies the text of the documents of a plan.

    Args:
      directory: where it goes.
      database: of all revisions. parts: the databases that it is joined of.
      plan_file: of the plan.
      runner: where shards are written.

    Raises:
      UserError: the documents of a revision are missing or damaged.
    """
    plan = CompactionPlan.read(plan_file)
    sources: list[_Source] = []
    settings: dict[str, Any] = {}
    for part in parts:
        sources.append(_Source.of(part))
        manifest = Manifest.open(sources[-1].documents, DOCUMENTS)
        old = settings.get("corpora", {})
        settings = manifest.settings | settings
        settings["corpora"] = manifest.settings.get("corpora", {}) | old
    stage = Stage(
        directory, DOCUMENTS, settings, {"database": (database.manifest, database.directory)}
    )
    if stage.done:
        return stage.manifest()
    names = [shard_name(DOCUMENTS, i, ".jsonl") for i in range(len(plan.shards))]
    missing = [i for i, name in enumerate(names) if stage.missing([name])]
    work = CopyDocuments(files.absolute(directory), files.absolute(plan_file), tuple(sources))
    sizes = [len(places) for places in plan.shards]
    run_counted(runner, work, missing, sizes, what="documents", unit="document")
    corpora = [database.record(int(plan.numbers[p.start])).corpus for p in plan.shards]
    shards = [
        {"corpus": corpus, "documents": len(places), "bytes": stage.shard_facts(name)}
        for corpus, places, name in zip(corpora, plan.shards, names, strict=True)
    ]
    size = sum(shard["bytes"] for shard in shards)
    facts = {"documents": len(plan.numbers), "bytes": size, "shards": shards, "reading": {}}
    return stage.finish(facts, names)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where the text of a chunk database is.

    Attributes:
      documents, leakage: directories; the latter of what was withdrawn, if anything was.
      count: documents of the database.
    """

    documents: str
    leakage: str | None
    count: int

    @classmethod
    def of(cls, part: ChunkDatabase) -> "_Source":
        """That of one database."""
        folder = pathlib.Path(files.absolute(part.directory)).parent.parent
        withdrawn = LEAKAGE in part.manifest.parents
        return cls(
            str(folder / DOCUMENTS / part.directory.name),
            str(folder / LEAKAGE) if withdrawn else None,
            part.num_documents,
        )

    def lines(self, numbers: np.ndarray) -> Iterator[bytes]:
        """The lines of documents by their numbers [n], ascending."""
        leakage = None if self.leakage is None else Manifest.read(self.leakage)
        bounds = np.cumsum([0, *kept_counts(Manifest.read(self.documents), leakage)])
        cuts = np.searchsorted(numbers, bounds)
        for shard in np.flatnonzero(np.diff(cuts)).tolist():
            wanted = set((numbers[cuts[shard] : cuts[shard + 1]] - bounds[shard]).tolist())
            lines = kept_lines(self.documents, shard, self.leakage)
            yield from (line for number, line in enumerate(lines) if number in wanted)


@dataclasses.dataclass(frozen=True)
class CopyDocuments:
    """Writes one shard of documents; the fields are absolute paths and the sources, in order."""

    directory: str
    plan_file: str
    sources: tuple[_Source, ...]

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its documents."""
        plan, size = CompactionPlan.read(self.plan_file), 0
        places = plan.shards[index]
        numbers = plan.numbers[places.start : places.stop]
        bounds = np.cumsum([0, *(source.count for source in self.sources)])
        cuts = np.searchsorted(numbers, bounds)
        stage = Stage.attach(self.directory)
        lines: list[bytes] = []
        for i, source in enumerate(self.sources):
            lines += source.lines(numbers[cuts[i] : cuts[i + 1]] - bounds[i])
        size = sum(map(len, lines))

        def write(file: BinaryIO) -> None:
            file.writelines(lines)

        stage.write_file(shard_name(DOCUMENTS, index, ".jsonl"), write, facts=size)
        report(len(places))
        return len(places)


def compact_chunks(
    directory: Path,
    database: ChunkDatabase,
    documents: tuple[Manifest, Path],
    tokenizer: tuple[Manifest, Path],
    plan_file: Path,
    *,
    runner: Runner = InProcess(),
) -> Manifest:
    """Copies the chunks of the documents of a plan: what `prepare_chunks` would make of them.

    Args:
      directory: where they go.
      database: of all revisions.
      documents, tokenizer: what `compact_documents` wrote, and W's tokeniser: manifest and place.
      plan_file: of the plan.
      runner: where shards are written.
    """
    names = ("chunk_length", "dtype", "vocab_size", "pad_id", "bos_id", "eos_id")
    settings = {n: database.manifest.settings[n] for n in names}
    stage = Stage(directory, KIND, settings, {"documents": documents, "tokenizer": tokenizer})
    if stage.done:
        return stage.manifest()
    plan = CompactionPlan.read(plan_file)
    pairs = [shard_files(i) for i in range(len(plan.shards))]
    missing = [i for i, pair in enumerate(pairs) if stage.missing(pair)]
    work = CopyChunks(files.absolute(directory), database, files.absolute(plan_file))
    sizes = [len(places) for places in plan.shards]
    run_counted(runner, work, missing, sizes, what="chunks", unit="document")
    return finish_chunks(stage, pairs)


@dataclasses.dataclass(frozen=True)
class CopyChunks:
    """Writes one shard of chunks; the fields are those of `compact_chunks`."""

    directory: str
    database: ChunkDatabase
    plan_file: str

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its chunks."""
        plan, stage = CompactionPlan.read(self.plan_file), Stage.attach(self.directory)
        places, total = plan.shards[index], len(plan.numbers)
        ids, counts = plan.chunk_ids(places), plan.counts[places.start : places.stop]
        rows = self.database.chunks(ids).astype(stage.settings["dtype"])
        ends = np.cumsum(counts)
        tokens = np.diff(np.cumsum((rows != self.database.pad_id).sum(1))[ends - 1], prepend=0)
        records = []
        for place, count in zip(places, tokens.tolist(), strict=True):
            r = self.database.record(int(plan.numbers[place]))
            records.append([r.id, r.corpus, r.chunks, count, r.bytes, r.words, r.lines])
        numbers = np.arange(places.start, places.stop)
        chunks, owners = shard_files(index)
        wide = np.int32 if total < 1 << 31 else np.int64
        stage.write_array(owners, np.repeat(numbers, counts).astype(wide))
        stage.write_array(chunks, rows, facts=records)
        report(len(places))
        return len(ids)
