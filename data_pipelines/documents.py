"""The documents stage: corpora in, one directory of sorted JSON lines for each split out.

    corpus --read once--> .spill/CORPUS/bucket-000, 001, ...   by the first bits of a hash of the id
           --bucket by bucket, sorted by that hash--> duplicates out, the first max_documents kept
           --by another hash of the id--> {train,validation,test}/documents-00000.jsonl, ...

Buckets are ranges of the hash, so one bucket in memory at a time gives the whole corpus in order. The
order in which a corpus is read, and the number of buckets, do not show in the result.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from data_pipelines import files
from data_pipelines.corpora import SPLITS, CorpusConfig, Document, Reading, read_corpus
from data_pipelines.manifest import Manifest, Parents, Path, Stage, shard_name
from data_pipelines.spill import HASH_BYTES, Spill
from retro_jax.config import require
from retro_jax.errors import UserError

KIND = "documents"
_SPILL = ".spill"
_COMPLETE = "complete.json"

Counts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DocumentsConfig:
    """Which documents there are, and which split each belongs to.

    Attributes:
      corpora: the corpora, each of its own name.
      validation, test: the shares of documents in these splits, by a hash of the id: a document never
        changes its split when others come or go, or moves but out of train when a share grows.
      skip_bad_documents: count documents that cannot be read, and go on.
      shard_bytes: size at which a shard ends.
      buckets: files into which a corpus is sorted; memory is the size of the corpus over this.
    """

    corpora: tuple[CorpusConfig, ...]
    validation: float = 0.05
    test: float = 0.05
    skip_bad_documents: bool = False
    shard_bytes: int = 64 << 20
    buckets: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "corpora", tuple(self.corpora))  # gin gives lists
        names = [corpus.name for corpus in self.corpora]
        require(bool(names), self, "corpora", "at least one CorpusConfig")
        require(len(set(names)) == len(names), self, "corpora", "a name of its own for each")
        trains = any(corpus.split in (None, "train") for corpus in self.corpora)
        require(trains, self, "corpora", "a corpus that is not put into another split than train")
        for field in ("validation", "test"):
            require(0 <= getattr(self, field) < 1, self, field, "a share from 0 to 1")
        require(self.validation + self.test < 1, self, "test", "validation + test less than 1")
        require(self.shard_bytes > 0, self, "shard_bytes", "a positive number")
        require(0 < self.buckets <= 4096, self, "buckets", "1 to 4096")

    def settings(self, split: str) -> dict[str, Any]:
        """What a split's manifest holds: all that its bytes depend on."""
        corpora = {corpus.name: corpus.settings for corpus in self.corpora}
        fields = ("validation", "test", "skip_bad_documents", "shard_bytes")
        return {"split": split, "corpora": corpora} | {name: getattr(self, name) for name in fields}


def stable_hash(text: str, purpose: str) -> bytes:
    """16 bytes that depend on the text and on what they are for, and on nothing else."""
    person = purpose.encode()
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES, person=person).digest()


def stable_fraction(text: str, purpose: str) -> float:
    """A hash as a number in [0, 1)."""
    return int.from_bytes(stable_hash(text, purpose)[:6], "big") / 2**48


def split_of(document_id: str, *, validation: float, test: float) -> str:
    """The split of a document: a function of its id alone."""
    place = stable_fraction(document_id, "split")
    if place < test:
        return "test"
    # Counted from the other end, so that a larger share of one split takes nothing from the other.
    return "validation" if place >= 1 - validation else "train"


def prepare_documents(
    directory: Path, config: DocumentsConfig, *, known: "KnownDocuments | None" = None
) -> dict[str, Manifest]:
    """Writes DIRECTORY/{train,validation,test}, or what is missing of them.

    Args:
      directory: where they go.
      config: the corpora.
      known: documents of an earlier database, which are left out; there may be no others.

    Returns:
      The manifest of each split. Facts: documents, bytes, per corpus documents and bytes, what each
      shard holds, and what was left out while reading each corpus and why.

    Raises:
      UserError: a corpus that is missing, empty or bad, two documents of one id, no training
        document, or a directory made with other settings.
    """
    folder = pathlib.Path(directory)
    parents = {} if known is None else known.parents
    stages = {
        split: Stage(folder / split, KIND, config.settings(split), parents, claim=False)
        for split in SPLITS
    }
    if not all(stage.done for stage in stages.values()):
        _write_splits(folder, stages, config, known)
    shutil.rmtree(folder / _SPILL, ignore_errors=True)
    return {split: stage.manifest() for split, stage in stages.items()}


def _write_splits(
    folder: pathlib.Path,
    stages: Mapping[str, Stage],
    config: DocumentsConfig,
    known: "KnownDocuments | None",
) -> None:
    """Reads all corpora and writes what the stages have not got yet."""
    corpora = sorted(config.corpora, key=lambda corpus: corpus.name)
    spills = {c.name: Spill(folder / _SPILL / c.name, config.buckets) for c in corpora}
    reading = {c.name: _fill(spills[c.name], folder / _SPILL / c.name, c, config) for c in corpora}
    for stage in stages.values():
        stage.claim()  # not before every corpus has proved good: a typing error claims nothing
    writers = {split: _Writer(stage, config.shard_bytes) for split, stage in stages.items()}
    for corpus in corpora:
        selected = _select(spills[corpus.name], corpus, reading[corpus.name], known)
        for split, line in selected:
            writers[split].add(corpus.name, line)
        for writer in writers.values():
            writer.cut()  # a shard holds one corpus
    if not writers["train"].shards and known is None:
        names = ", ".join(reading)
        raise UserError(f"{folder}: no document of {names} is in the training split: expected some")
    for writer in writers.values():
        writer.finish(reading)


class KnownDocuments:
    """Documents that need not be taken again, by corpus and id.

    Attributes:
      parents: the database that holds them, for `Stage`.
    """

    def __init__(self, names: Iterable[tuple[str, str]], parents: Parents) -> None:
        """Takes (corpus, id) of each; keeps 8 bytes of it."""
        hashes = (_name_hash(corpus, name) for corpus, name in names)
        self._hashes = np.sort(np.fromiter(hashes, np.uint64))
        self.parents = parents

    def __contains__(self, name: tuple[str, str]) -> bool:
        """Whether (corpus, id) is one of them."""
        wanted = np.uint64(_name_hash(*name))
        place = np.searchsorted(self._hashes, wanted)
        return bool(place < len(self._hashes) and self._hashes[place] == wanted)


def _name_hash(corpus: str, name: str) -> int:
    """64 bits of a document's corpus and id."""
    return int.from_bytes(stable_hash(f"{corpus}\0{name}", "known")[:8], "big")


def read_shard(path: Path) -> Iterator[Document]:
    """The documents of one shard, in order."""
    with open(path, "rb") as file:
        for line in file:
            yield Document(**json.loads(line))


def read_documents(directory: Path, manifest: Manifest) -> Iterator[Document]:
    """The documents of one split, in order."""
    for shard in manifest.shards:
        yield from read_shard(pathlib.Path(directory) / shard.name)


class _Writer:
    """Collects the lines of one split into shards."""

    def __init__(self, stage: Stage, shard_bytes: int):
        self._stage, self._limit = stage, shard_bytes
        self._lines: list[bytes] = []
        self._size = 0
        self._corpus = ""
        self.shards: list[dict[str, Any]] = []

    def add(self, corpus: str, line: bytes) -> None:
        """Takes one document; a shard that it would overfill ends before it."""
        if self._lines and self._size + len(line) > self._limit:
            self.cut()
        self._corpus = corpus
        self._lines.append(line)
        self._size += len(line)

    def cut(self) -> None:
        """Ends the shard, and writes it unless an earlier run has."""
        if not self._lines:
            return
        name = shard_name(KIND, len(self.shards), ".jsonl")
        if not self._stage.done and self._stage.missing([name]):
            self._stage.write_file(name, self._write)
        facts = {"corpus": self._corpus, "documents": len(self._lines), "bytes": self._size}
        self.shards.append(facts)
        self._lines, self._size = [], 0

    def _write(self, file: BinaryIO) -> None:
        """The shard's bytes."""
        file.writelines(self._lines)

    def finish(self, reading: dict[str, Counts]) -> None:
        """Writes the manifest."""
        if self._stage.done:
            return
        names = [shard_name(KIND, i, ".jsonl") for i in range(len(self.shards))]
        facts = {
            "documents": sum(shard["documents"] for shard in self.shards),
            "bytes": sum(shard["bytes"] for shard in self.shards),
            "shards": self.shards,
            "reading": reading,
        }
        self._stage.finish(facts, names)


def _fill(
    spill: Spill, folder: pathlib.Path, corpus: CorpusConfig, config: DocumentsConfig
) -> Counts:
    """Reads a corpus into its spill, unless an earlier run did to the end; what was counted."""
    complete = folder / _COMPLETE
    identity = files.plain([corpus, config])
    if complete.is_file():
        found = files.read_json(complete)
        if found["identity"] == identity:
            return found["counts"]
    reading = Reading(config.skip_bad_documents)
    try:
        spill.start()
        for document in read_corpus(corpus, reading):
            content = stable_hash(document.text, "text") if corpus.drops_duplicates else None
            spill.add(
                stable_hash(document.id, "order"), content, _payload(document, corpus, config)
            )
        spill.close()
        _refuse_repeated(spill, corpus)
    except BaseException:
        spill.discard()
        raise
    if reading.first_bad:
        logging.warning(
            "corpus %r: %d bad documents left out; %s",
            corpus.name,
            reading.counts["bad"],
            reading.first_bad,
        )
    counts: Counts = {name: reading.counts[name] for name in ("documents", "bad", "empty")}
    counts |= {"duplicates": spill.duplicates(), "beyond_limit": 0, "source": reading.source}
    files.write_atomically(complete, files.to_json({"identity": identity, "counts": counts}))
    return counts


def _refuse_repeated(spill: Spill, corpus: CorpusConfig) -> None:
    """Raises if two documents have one id."""
    repeated = spill.repeated()
    if repeated is not None:
        name = json.loads(repeated.split(b" ", 2)[2])["id"]
        raise UserError(
            f"corpus {corpus.name!r} has two documents {name!r}: expected an id of its own for each"
        )


def _payload(document: Document, corpus: CorpusConfig, config: DocumentsConfig) -> bytes:
    """Split, UTF-8 bytes and JSON line of a document."""
    split = corpus.split or split_of(document.id, validation=config.validation, test=config.test)
    fields = {"id": document.id, "corpus": document.corpus, "text": document.text}
    line = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
    return f"{split} {len(document.text.encode())} {line}".encode()


def _select(
    spill: Spill, corpus: CorpusConfig, counts: Counts, known: KnownDocuments | None
) -> Iterator[tuple[str, bytes]]:
    """Split and JSON line of each document that is kept, in order; completes the counts."""
    kept = size = 0
    for _, payload, duplicate in spill.records():
        split, length, line = payload.split(b" ", 2)
        if duplicate:
            continue
        size += int(length)
        if _is_beyond(corpus.max_documents, kept + 1) or _is_beyond(corpus.max_bytes, size):
            # Nothing later is taken either, however short: the selection is a prefix of the order.
            counts["beyond_limit"] = counts["documents"] - counts["duplicates"] - kept
            return
        kept += 1
        if known is not None and (corpus.name, json.loads(line)["id"]) in known:
            counts["known"] = counts.get("known", 0) + 1
            continue
        yield split.decode(), line + b"\n"


def _is_beyond(limit: int | None, value: int) -> bool:
    """Whether a limit is set and passed."""
    return limit is not None and value > limit
