"""Documents cut into chunks of 64 tokens, each of one document, and the database that reads them.

bos text eos          t0 .. t63 | t64 .. t127 | t128 eos pad .. pad       a document of three chunks
value of chunk i      chunk i and its continuation: chunk i + 1 if it belongs to the same document,
                      else padding
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.opened_once import opened_once
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted, silent
from data_pipelines.artefacts.sharded_rows import ShardedRows
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.leakage.near_documents import KIND as LEAKAGE
from data_pipelines.leakage.near_documents import kept_counts, kept_documents
from retro_jax.errors import UserError
from retro_jax.storage import files

KIND = "chunks"
CHUNK_LENGTH = 64
CHUNKS, DOCUMENTS = "chunks", "documents"
RECORDS_FILE = "documents.jsonl"
_BATCH_CHARACTERS = 4_000_000  # of text that is tokenised at once
_STRIDE = 64  # documents between places in documents.jsonl that are remembered
_RECORDS_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class DocumentRecord:
    """What is known of a document without its text.

    Attributes:
      id, corpus: as its reader named them.
      first_chunk, chunks: its chunks are first_chunk .. first_chunk + chunks - 1.
      bytes, words, lines: UTF-8 bytes, words between whitespace, and line ends of its text.
    """

    id: str
    corpus: str
    first_chunk: int
    chunks: int
    bytes: int
    words: int
    lines: int


def prepare_chunks(
    directory: Path,
    documents_directory: Path,
    tokenizer_directory: Path,
    *,
    leakage_directory: Path | None = None,
    runner: Runner = InProcess(),
) -> Manifest:
    """Tokenises one split's documents into a chunk database, or what is missing of it.

    Args:
      directory: where it goes.
      documents_directory: the split's documents.
      tokenizer_directory: the tokeniser.
      leakage_directory: which documents are withdrawn; None for none.
      runner: where shards are made; the bytes do not depend on it.

    Returns:
      Its manifest. Facts: documents, chunks, tokens (without padding), padding (share of all
      positions), the chunks of each shard, and for each corpus documents, chunks, tokens, bytes,
      words, lines and its ranges of chunks.
    """
    documents = Manifest.open(documents_directory, "documents")
    tokenizer = Tokenizer.open(tokenizer_directory)
    settings = {
        "chunk_length": CHUNK_LENGTH,
        "dtype": np.dtype(token_dtype(max(tokenizer.vocab_size, tokenizer.pad_id + 1))).name,
        "vocab_size": tokenizer.vocab_size,
        "pad_id": tokenizer.pad_id,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }
    parents = {
        "documents": (documents, documents_directory),
        "tokenizer": (tokenizer.manifest, tokenizer_directory),
    }
    leakage = None
    if leakage_directory is not None:
        of_documents = {"documents": (documents, documents_directory)}
        leakage = Manifest.open(leakage_directory, LEAKAGE, of_documents)
        parents[LEAKAGE] = (leakage, leakage_directory)
    stage = Stage(directory, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    names = [shard_files(i) for i in range(len(documents.shards))]
    work = ChunkShard(
        files.absolute(directory),
        files.absolute(documents_directory),
        files.absolute(tokenizer_directory),
        runner.threads,
        None if leakage_directory is None else files.absolute(leakage_directory),
    )
    missing = [i for i, pair in enumerate(names) if stage.missing(pair)]
    counts = kept_counts(documents, leakage)
    run_counted(runner, work, missing, counts, what="chunks", unit="document")
    return finish_chunks(stage, names)


def token_dtype(ids: int) -> type[np.unsignedinteger]:
    """The smallest of uint16 and uint32 that represents ids in [0, ids)."""
    return np.uint16 if ids <= 1 << 16 else np.uint32


@dataclasses.dataclass(frozen=True)
class ChunkShard:
    """Makes one chunk shard of one documents shard: a pure function of the two parents.

    Attributes:
      directory, documents_directory, tokenizer_directory, leakage_directory: as for `prepare_chunks`.
      threads: of the tokeniser.
    """

    directory: str
    documents_directory: str
    tokenizer_directory: str
    threads: int = 1
    leakage_directory: str | None = None

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its number of chunks. `report` receives counts of documents."""
        stage = Stage.attach(self.directory)
        tokenizer = opened_once(Tokenizer.open, self.tokenizer_directory, threads=self.threads)
        manifest = Manifest.read(self.documents_directory)
        leakage = self.leakage_directory
        shard_counts = kept_counts(manifest, None if leakage is None else Manifest.read(leakage))
        first = sum(shard_counts[:index])
        rows, counts, records = [np.zeros((0, CHUNK_LENGTH), stage.settings["dtype"])], [], []
        for batch in _batches(kept_documents(self.documents_directory, index, leakage)):
            for document, ids in zip(
                batch, tokenizer.encode_batch([d.text for d in batch]), strict=True
            ):
                rows.append(chunk_rows(ids, tokenizer, stage.settings["dtype"]))
                counts.append(len(rows[-1]))
                text = document.text
                measures = [len(text.encode()), len(text.split()), text.count("\n")]
                records.append([document.id, document.corpus, counts[-1], len(ids) + 2, *measures])
            report(len(batch))
        if len(records) != shard_counts[index]:
            path = pathlib.Path(self.documents_directory) / manifest.shards[index].name
            raise UserError(f"{path} has {len(records)} documents: expected {shard_counts[index]}")
        chunks, owners = shard_files(index)
        wide = np.int32 if sum(shard_counts) < 1 << 31 else np.int64
        every = np.arange(first, first + len(counts), dtype=wide)
        numbers = np.repeat(every, np.array(counts, np.int64))
        stage.write_array(owners, numbers)
        stage.write_array(chunks, np.concatenate(rows), facts=records)
        return len(numbers)


def chunk_rows(ids: np.ndarray, tokenizer: Tokenizer, dtype: str) -> np.ndarray:
    """One document's tokens [n] as [ceil((n + 2) / 64), 64]: bos + ids + eos, the last row padded."""
    rows = -(-(len(ids) + 2) // CHUNK_LENGTH)
    flat = np.full(rows * CHUNK_LENGTH, tokenizer.pad_id, dtype)
    flat[0] = tokenizer.bos_id
    flat[1 : len(ids) + 1] = ids
    flat[len(ids) + 1] = tokenizer.eos_id
    return flat.reshape(rows, CHUNK_LENGTH)


class ChunkDatabase:
    """The chunks of one split, read from memory maps; ids are positions in the whole database.

    Attributes:
      directory, manifest: where it is from.
      shards: the range of chunk ids of each shard.
      corpora: name -> ranges of its chunk ids: one, or several where documents were appended to the
        database or removed from it.
      pad_id, bos_id, eos_id, vocab_size: of the tokens.
      removed: [n] int64 numbers of the documents that were removed, ascending: their chunks keep their
        ids, but are in no corpus and are nobody's neighbours.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        """Use `open`."""
        self.directory, self.manifest = pathlib.Path(directory), manifest
        settings = manifest.settings
        self.pad_id: int = settings["pad_id"]
        self.bos_id: int = settings["bos_id"]
        self.eos_id: int = settings["eos_id"]
        self.vocab_size: int = settings["vocab_size"]
        self._chunks, self._owners = (
            ShardedRows([self.directory / name for name in manifest.shard_names(prefix, ".npy")])
            for prefix in (f"{CHUNKS}-", f"{DOCUMENTS}-")
        )
        self._bounds = self._chunks.bounds
        held, shapes = manifest.fact("shards"), (self._chunks.shapes, self._owners.shapes)
        for rows, owners, expected in zip(*shapes, held, strict=True):
            if rows != (expected, CHUNK_LENGTH) or owners != (expected,):
                raise UserError(
                    f"{self.directory} has a shard of {rows} chunks and {owners} document"
                    f" numbers: expected {expected} of {CHUNK_LENGTH} tokens"
                )
        self.removed = np.zeros(0, np.int64)
        bounds = self._bounds.tolist()
        self.shards = [range(a, b) for a, b in itertools.pairwise(bounds)]
        facts = manifest.fact("corpora")
        self.corpora = {
            name: [range(a, b) for a, b in facts[name]["ranges"]] for name in sorted(facts)
        }

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> "ChunkDatabase":
        """Opens a finished database; `verify` hashes every shard.

        Raises:
          UserError: no chunk database there, or a shard that is missing, truncated or changed.
        """
        return cls(directory, Manifest.open(directory, KIND, verify=verify))

    def __reduce__(self) -> tuple[Callable[..., "ChunkDatabase"], tuple[str, Manifest]]:
        """Pickles by its place, so that worker processes map the files themselves."""
        return ChunkDatabase, (files.absolute(self.directory), self.manifest)

    def __len__(self) -> int:
        """Chunks."""
        return int(self._bounds[-1])

    @property
    def num_documents(self) -> int:
        """Documents."""
        return self.manifest.fact("documents")

    def value(self, i: int) -> np.ndarray:
        """[128] int32: chunk i and its continuation, or padding; all padding for -1."""
        return self.values(np.array([i]))[0]

    def document(self, i: int) -> int:
        """The number of the document that contains chunk i."""
        return int(self.documents(np.array([i]))[0])

    def chunks(self, ids: np.ndarray) -> np.ndarray:
        """[..., 64] int32: the tokens of chunks `ids` [...]; all padding for -1.

        Raises:
          IndexError: an id that is neither -1 nor a chunk of the database.
        """
        return self._gather(self._chunks, ids, self.pad_id, (CHUNK_LENGTH,), np.int32)

    def documents(self, ids: np.ndarray) -> np.ndarray:
        """[...] int64: the document numbers of chunks `ids` [...]; -1 for -1."""
        return self._gather(self._owners, ids, -1, (), np.int64)

    def corpus_of(self, ids: np.ndarray) -> np.ndarray:
        """[...] names of the corpora of chunks `ids` [...]; empty for -1 and removed ones."""
        ranges = sorted(
            (r.start, r.stop, name) for name, held in self.corpora.items() for r in held if r
        )
        if not ranges:
            return np.full(np.shape(ids), "")
        starts, stops, names = (np.array(column) for column in zip(*ranges))
        range_index = np.maximum(np.searchsorted(starts, ids, side="right") - 1, 0)
        return np.where(
            (ids >= starts[range_index]) & (ids < stops[range_index]), names[range_index], ""
        )

    def is_removed(self, documents: np.ndarray) -> np.ndarray:
        """[...] bool: which of the documents [...] were removed; -1 was not."""
        places = np.searchsorted(self.removed, documents)
        candidates = np.append(self.removed, -2)[places]
        return candidates == documents

    def live_documents(self, ids: np.ndarray) -> np.ndarray:
        """[...] int64: as `documents`, but -1 for those of removed documents too."""
        documents = self.documents(ids)
        return (
            np.where(self.is_removed(documents), -1, documents) if len(self.removed) else documents
        )

    def live_ids(self, places: np.ndarray) -> np.ndarray:
        """[...] int64: the chunks at places [...] among those of documents that were not removed."""
        ranges = sorted((r.start, r.stop) for parts in self.corpora.values() for r in parts if r)
        starts, stops = np.array(ranges, np.int64).reshape(-1, 2).T
        ends = np.cumsum(stops - starts)
        number = np.searchsorted(ends, places, side="right")
        return stops[number] - (ends[number] - places)

    @property
    def live_chunks(self) -> int:
        """Chunks of documents that were not removed."""
        return sum(len(part) for parts in self.corpora.values() for part in parts)

    def values(self, ids: np.ndarray) -> np.ndarray:
        """[..., 128] int32: chunks `ids` [...] and their continuations; all padding for -1."""
        ids = np.asarray(ids, np.int64)
        following = np.where((ids >= 0) & (ids + 1 < len(self)), ids + 1, -1)
        owners, following_owners = self.documents(np.stack([ids, following]))
        following = np.where(owners == following_owners, following, -1)
        return np.concatenate([*self.chunks(np.stack([ids, following]))], axis=-1)

    def record(self, d: int) -> DocumentRecord:
        """What is known of document number d."""
        if not 0 <= d < self.num_documents:
            raise IndexError(f"document {d} of {self.num_documents}")
        starts = self._record_starts
        with open(self.directory / RECORDS_FILE, "rb") as file:
            file.seek(int(starts[d // _STRIDE]))
            line = next(itertools.islice(file, d % _STRIDE, None))
        return DocumentRecord(**json.loads(line))

    def records(self) -> Iterator[DocumentRecord]:
        """All documents, in order."""
        with open(self.directory / RECORDS_FILE, "rb") as file:
            for line in file:
                yield DocumentRecord(**json.loads(line))

    @functools.cached_property
    def _record_starts(self) -> np.ndarray:
        """[n] int64: where every 64th line of documents.jsonl begins, found in one pass over it."""
        parts, first, count = [np.zeros(1, np.int64)], 0, 0
        with open(self.directory / RECORDS_FILE, "rb") as file:
            while block := file.read(_RECORDS_BLOCK):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
                skipped = -(count + 1) % _STRIDE
                parts.append(ends[skipped::_STRIDE] + first)
                first, count = first + len(block), count + len(ends)
        return np.concatenate(parts)

    def _gather(
        self,
        shards: ShardedRows,
        ids: np.ndarray,
        fill: int,
        inner: tuple[int, ...],
        dtype: Any,
    ) -> np.ndarray:
        """Rows `ids` [...] of the concatenated shards as [..., *inner]; `fill` for -1."""
        ids = np.asarray(ids, np.int64)
        flat = ids.ravel()
        if flat.size and (flat.min() < -1 or flat.max() >= len(self)):
            bad = flat[(flat < -1) | (flat >= len(self))][0]
            raise IndexError(
                f"chunk {bad} of {len(self)} in {self.directory}: expected it there, or -1"
            )
        rows = np.full((flat.size, *inner), fill, dtype)
        shards.gather(flat, rows)
        return rows.reshape(*ids.shape, *inner)


def shard_files(index: int) -> tuple[str, str]:
    """The two files of a shard: its chunks, and their document numbers."""
    return shard_name(CHUNKS, index), shard_name(DOCUMENTS, index)


def _batches(documents: Iterable[Any]) -> Iterator[list[Any]]:
    """Documents in lists of about _BATCH_CHARACTERS of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Totals:
    """Sums over the documents while documents.jsonl is written."""

    def __init__(self) -> None:
        self.documents = self.chunks = self.tokens = 0
        self.corpora: dict[str, dict[str, Any]] = {}

    def add(self, record: DocumentRecord, tokens: int) -> None:
        """Counts one document."""
        empty = {"documents": 0, "chunks": 0, "tokens": 0, "bytes": 0, "words": 0, "lines": 0}
        corpus = self.corpora.setdefault(record.corpus, {**empty, "ranges": []})
        for name in ("chunks", "bytes", "words", "lines"):
            corpus[name] += getattr(record, name)
        corpus["documents"] += 1
        corpus["tokens"] += tokens
        end = record.first_chunk + record.chunks
        if corpus["ranges"] and corpus["ranges"][-1][1] == record.first_chunk:
            corpus["ranges"][-1][1] = end
        else:
            corpus["ranges"].append([record.first_chunk, end])
        self.documents, self.chunks, self.tokens = self.documents + 1, end, self.tokens + tokens


def finish_chunks(stage: Stage, names: list[tuple[str, str]]) -> Manifest:
    """Gathers documents.jsonl and the facts from what the shards recorded.

    Args:
      stage: whose shards are all there, each with the list of its documents as facts.
      names: the two files of each shard.
    """
    totals = _Totals()
    counts = []

    def write(file: BinaryIO) -> None:
        for chunks, _ in names:
            before = totals.chunks
            for name, corpus, count, tokens, *measures in stage.shard_facts(chunks):
                record = DocumentRecord(name, corpus, totals.chunks, count, *measures)
                totals.add(record, tokens)
                line = json.dumps(vars(record), ensure_ascii=False)
                file.write(line.encode() + b"\n")
            counts.append(totals.chunks - before)

    stage.write_file(RECORDS_FILE, write)
    positions = totals.chunks * CHUNK_LENGTH
    facts = {
        "documents": totals.documents,
        "chunks": totals.chunks,
        "tokens": totals.tokens,
        "padding": 1 - totals.tokens / positions if positions else 0.0,
        "shards": counts,
        "corpora": totals.corpora,
    }
    order = [chunks for chunks, _ in names] + [owners for _, owners in names]
    return stage.finish(facts, [*order, RECORDS_FILE])
