"""Publishing a revision of a retrieval database: its sums, and which documents it has no more.

revisions.py says how revisions are stored and read.
"""

import copy
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.revisions import (
    KIND,
    REMOVED_FILE,
    JoinedDatabase,
    folder_of,
    open_database,
    open_keys,
)
from retro_jax.errors import UserError

_REMOVED_AT_ONCE = 1000  # documents whose chunks are read together


_SUMS = ("documents", "chunks", "tokens", "bytes", "words", "lines")


def publish(
    workdir: Path,
    revision: int,
    removed: Sequence[int],
    added: Keys | ChunkDatabase | None = None,
) -> Manifest:
    """Publishes a revision: from now on it is the newest.

    Args:
      workdir: W.
      revision: its number, one more than the newest.
      removed: numbers of documents of the previous revision that are removed by this one.
      added: the chunks that it adds, and their keys where the database has any.

    Returns:
      The manifest of W/revisions/REVISION/database. Facts: as those of a chunk database, of the documents
      that are not removed, but `documents`, `chunks` and `shards` count all; added and removed documents.
    """
    previous = open_database(workdir, revision - 1)
    parents = {"previous": (previous.manifest, previous.directory)}
    parts = list(previous.parts) if isinstance(previous, JoinedDatabase) else [previous]
    chunks = added.database if isinstance(added, Keys) else added
    if chunks is not None:
        parents["chunks"] = (chunks.manifest, chunks.directory)
        parts.append(chunks)
    if isinstance(added, Keys):
        parents["keys"] = (added.manifest, added.directory)
    _check_same_tokens(parts)
    every = np.unique(np.concatenate([previous.removed, np.asarray(removed, np.int64)]))
    digest = hashlib.sha256(np.asarray(removed, np.int64).tobytes()).hexdigest()
    settings = parts[0].manifest.settings | {"removed": digest}
    stage = Stage(folder_of(workdir, revision) / KIND, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    if stage.missing([REMOVED_FILE]):
        stage.write_array(REMOVED_FILE, every)
    facts: dict[str, Any] = {
        "documents": sum(part.num_documents for part in parts),
        "chunks": sum(map(len, parts)),
        "shards": [len(ids) for part in parts for ids in part.shards],
        "corpora": _corpora(previous, parts, np.asarray(removed, np.int64), chunks),
        "added": chunks.num_documents if chunks is not None else 0,
        "removed": len(every),
    }
    if isinstance(added, Keys) or (pathlib.Path(workdir) / "keys" / "train").is_dir():
        new = added.manifest.fact("keys") if isinstance(added, Keys) else 0
        facts["keys"] = _live_keys(previous, workdir, removed) + new
    return stage.finish(facts, revision=revision)


def publish_compacted(workdir: Path, revision: int, added: Keys | ChunkDatabase) -> Manifest:
    """Publishes a compaction of the newest revision.

    Args:
      workdir: W.
      revision: its number, one more than the newest.
      added: all chunks that are left, and their keys where the database has any.

    Returns:
      The manifest of W/revisions/REVISION/database, as `publish` makes it.
    """
    before = folder_of(workdir, revision - 1) / KIND
    chunks = added.database if isinstance(added, Keys) else added
    parents = {
        "previous": (Manifest.open(before, KIND), before),
        "chunks": (chunks.manifest, chunks.directory),
    }
    if isinstance(added, Keys):
        parents["keys"] = (added.manifest, added.directory)
    stage = Stage(folder_of(workdir, revision) / KIND, KIND, chunks.manifest.settings, parents)
    if stage.missing([REMOVED_FILE]):
        stage.write_array(REMOVED_FILE, np.zeros(0, np.int64))
    facts = {name: chunks.manifest.fact(name) for name in ("documents", "chunks", "shards")}
    facts |= {"corpora": chunks.manifest.fact("corpora"), "compacted": True}
    facts |= {"added": 0, "removed": 0}
    if isinstance(added, Keys):
        facts["keys"] = added.manifest.fact("keys")
    return stage.finish(facts, revision=revision)


def _live_keys(previous: ChunkDatabase, workdir: Path, removed: Sequence[int]) -> int:
    """Keys of a database without some documents that it had."""
    keys = open_keys(previous, workdir)
    count = previous.manifest.facts.get("keys")
    if count is None:  # of revision 0, or of one before this was counted
        count = keys.manifest.fact("keys") - _keys_of(keys, previous.removed)
    return count - _keys_of(keys, np.asarray(removed, np.int64))


def _keys_of(keys: Keys, documents: np.ndarray) -> int:
    """How many chunks of some documents have keys."""
    count = 0
    for numbers in np.array_split(documents, max(1, -(-len(documents) // _REMOVED_AT_ONCE))):
        records = [keys.database.record(number) for number in numbers.tolist()]
        ids = [np.arange(r.first_chunk, r.first_chunk + r.chunks) for r in records]
        count += int((~np.isnan(keys.rows(_concatenated(ids))[:, 0])).sum())
    return count


def _corpora(
    previous: ChunkDatabase,
    parts: Sequence[ChunkDatabase],
    removed: np.ndarray,
    added: ChunkDatabase | None,
) -> dict[str, dict[str, Any]]:
    """Sums and ranges of each corpus, without what is removed."""
    corpora = copy.deepcopy(previous.manifest.fact("corpora"))
    if added is not None:
        first = sum(map(len, parts[:-1]))
        for name, fact in added.manifest.fact("corpora").items():
            ranges = [[a + first, b + first] for a, b in fact["ranges"]]
            entry = corpora.setdefault(name, {"ranges": []})
            entry["ranges"] += ranges
            for field in _SUMS:
                if field in fact:
                    entry[field] = entry.get(field, 0) + fact[field]
    cuts: dict[str, list[range]] = {}
    for numbers in np.array_split(removed, max(1, -(-len(removed) // _REMOVED_AT_ONCE))):
        records = [previous.record(number) for number in numbers.tolist()]
        ids = [np.arange(r.first_chunk, r.first_chunk + r.chunks) for r in records]
        tokens = (previous.chunks(_concatenated(ids)) != previous.pad_id).sum(1)
        ends = np.cumsum(tokens)[np.cumsum([r.chunks for r in records], dtype=np.int64) - 1]
        for record, count in zip(records, np.diff(ends, prepend=0).tolist(), strict=True):
            fact = corpora[record.corpus]
            of_record = dataclasses.asdict(record) | {"documents": 1, "tokens": count}
            for field in _SUMS:
                if field in fact:
                    fact[field] -= of_record[field]
            cut = range(record.first_chunk, record.first_chunk + record.chunks)
            cuts.setdefault(record.corpus, []).append(cut)
    for name, of_corpus in cuts.items():
        corpora[name]["ranges"] = list(_without(corpora[name]["ranges"], of_corpus))
    return corpora


def _without(ranges: Sequence[Sequence[int]], cuts: Sequence[range]) -> Iterator[list[int]]:
    """Ranges without others, each of which is within one of them."""
    rest = sorted(cuts, key=lambda cut: cut.start, reverse=True)
    for start, stop in sorted(map(tuple, ranges)):
        while rest and rest[-1].start < stop:
            cut = rest.pop()
            if start < cut.start:
                yield [start, cut.start]
            start = cut.stop
        if start < stop:
            yield [start, stop]


def _check_same_tokens(parts: Sequence[ChunkDatabase]) -> None:
    """Raises unless all parts were made with one tokeniser."""
    for part in parts[1:]:
        if part.manifest.parents.get("tokenizer") != parts[0].manifest.parents.get("tokenizer"):
            raise UserError(
                f"{part.directory} and {parts[0].directory} do not belong together: expected chunks of"
                " the same tokeniser"
            )


def _concatenated(ids: Sequence[np.ndarray]) -> np.ndarray:
    """Ids one after the other; none of none."""
    return np.concatenate([np.zeros(0, np.int64), *ids])
