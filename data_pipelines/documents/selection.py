"""Which documents are kept, and which line of which run goes into which shard.

One pass over the sorted rows of all corpora decides, without reading a text; one range of rows
is in memory at a time. The decisions are written to one file per shard, for workers to follow.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from data_pipelines.artefacts.manifest import Parents, shard_name
from data_pipelines.artefacts.runner import silent
from data_pipelines.artefacts.stage import Stage
from data_pipelines.corpora import SPLITS, CorpusConfig, places_of
from data_pipelines.documents.external_sort import (
    ROW,
    Runs,
    first_of_repeated,
    read_lines,
    repeated,
)
from data_pipelines.documents.hashing import stable_hash
from retro_jax.errors import UserError
from retro_jax.storage import files

Counts = dict[str, Any]
_STEMS = "stems.json"
MOST_SHARDS = 4096  # of a split, about: its shards are larger where there would be more


class KnownDocuments:
    """Documents that need not be taken again, by corpus and id.

    Attributes:
      parents: the database that contains them, for `Stage`.
    """

    def __init__(
        self,
        names: Iterable[tuple[int, str]],
        name_of: Callable[[int], tuple[str, str]],
        parents: Parents,
    ) -> None:
        """Keeps 16 bytes of each.

        Args:
          names: number and id of each.
          name_of: corpus and id of a number: equal hashes are only a reason to look.
          parents: as the attribute.
        """
        pairs = ((_half(name), number) for number, name in names)
        halves = np.fromiter(pairs, [("half", "<u8"), ("number", "<i8")])
        self._known = halves[np.argsort(halves["half"], kind="stable")]
        self._name_of = name_of
        self.parents = parents

    def among(
        self, rows: np.ndarray, corpus: str, id_of: Callable[[np.ndarray], str]
    ) -> np.ndarray:
        """[n] bool: which rows of a corpus are known."""
        starts = np.searchsorted(self._known["half"], rows["o0"], side="left")
        stops = np.searchsorted(self._known["half"], rows["o0"], side="right")
        mask = np.zeros(len(rows), bool)
        for row in np.flatnonzero(starts < stops).tolist():
            name = corpus, id_of(rows[row])
            numbers = self._known["number"][starts[row] : stops[row]].tolist()
            mask[row] = any(self._name_of(number) == name for number in numbers)
        return mask


def _half(name: str) -> int:
    """The first number of a document's order."""
    return int.from_bytes(stable_hash(name, "order")[:8], "big")


class ShardPlan:
    """Cuts the rows of one split into shards."""

    def __init__(self, folder: pathlib.Path, split: str, shard_bytes: int) -> None:
        """Leaves a file for each shard in `folder`."""
        self._folder, self._split, self._limit = folder, split, shard_bytes
        self._held: list[np.ndarray] = []
        self._size = 0
        self.shards: list[Counts] = []

    def add(self, corpus: str, rows: np.ndarray) -> None:
        """Takes rows in order; a shard ends before the one that would overfill it."""
        ends = np.cumsum(rows["length"].astype(np.int64))
        first = 0
        while first < len(rows):
            before = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, self._limit - self._size + before, side="right"))
            if last <= first and not self._size:
                last = first + 1  # larger than a shard, so in one of its own
            last = max(first, last)
            self._held.append(rows[first:last])
            self._size += int(ends[last - 1]) - before if last > first else 0
            first = last
            if first < len(rows):
                self.cut(corpus)

    def cut(self, corpus: str) -> None:
        """Ends the shard."""
        if not self._size:
            return
        rows = np.concatenate(self._held)
        with files.writing(self._folder):
            np.save(plan_path(self._folder, self._split, len(self.shards)), rows)
        self.shards.append({"corpus": corpus, "documents": len(rows), "bytes": self._size})
        self._held, self._size = [], 0


def plan_path(folder: pathlib.Path, split: str, number: int) -> pathlib.Path:
    """Where the rows of a shard wait."""
    return folder / f"{split}-{number:05d}.npy"


def plan_shards(
    folder: pathlib.Path,
    read: Mapping[str, tuple[CorpusConfig, Counts, Runs]],
    shard_bytes: int,
    known: KnownDocuments | None,
) -> dict[str, list[Counts]]:
    """Decides the content of every shard.

    Args:
      folder: where the decisions go.
      read: of each corpus its settings, its counts, which are completed, and its runs.
      shard_bytes: size at which a shard ends.
      known: documents that are left out.

    Returns:
      For each split its shards: corpus, documents, bytes.

    Raises:
      UserError: two documents of one id, or two corpora of one name.
    """
    every = sum(_most_bytes(corpus, runs) for corpus, _, runs in read.values())
    shard_bytes = max(shard_bytes, every // MOST_SHARDS)
    plans = {split: ShardPlan(folder, split, shard_bytes) for split in SPLITS}
    stems = [stem for _, _, runs in read.values() for stem in runs.stems]
    files.write_atomically(folder / _STEMS, files.to_json({"stems": stems}))
    firsts = dict(
        zip(read, itertools.accumulate((len(r[2].stems) for r in read.values()), initial=0))
    )
    for name in read:
        _, counts, runs = read[name]
        path = folder / name
        path.mkdir(exist_ok=True)
        counts["duplicates"] = runs.find_duplicates(path)
    owners = sorted((name, owner) for owner, (_, _, runs) in read.items() for name in runs.corpora)
    for (name, owner), (other, rival) in itertools.pairwise(owners):
        if name == other:
            raise UserError(
                f"the corpora {owner!r} and {rival!r} both hold documents of {name!r}: expected"
                " other names"
            )
    for name, owner in owners:
        corpus, counts, runs = read[owner]
        for rows in _kept(name, corpus, counts, runs, known):
            for split, plan in plans.items():
                subset = rows[rows["split"] == SPLITS.index(split)]
                subset["run"] += firsts[owner]
                plan.add(name, subset)
        for plan in plans.values():
            plan.cut(name)  # a shard contains one corpus
    return {split: plan.shards for split, plan in plans.items()}


def _most_bytes(corpus: CorpusConfig, runs: Runs) -> int:
    """Bytes of the lines that are kept of a corpus, about, by its limits."""
    size, labels = runs.size, len(runs.corpora)
    if corpus.max_documents is not None:
        size = min(size, size * corpus.max_documents * labels // max(1, len(runs)))
    return size if corpus.max_bytes is None else min(size, corpus.max_bytes * labels)


def _kept(
    name: str,
    corpus: CorpusConfig,
    counts: Counts,
    runs: Runs,
    old_documents: KnownDocuments | None,
) -> Iterator[np.ndarray]:
    """The rows of a corpus that are kept, in order; completes the counts."""

    def id_of(row: np.ndarray) -> str:
        return json.loads(runs.line(row))["id"]

    count = size = 0
    for rows, duplicate in runs.sorted(name):
        if corpus.ids_from_content or corpus.repeated_ids == "keep_first":
            # Sorting is stable: the first row is that of the first line. By content, all are equal.
            reason = "duplicates" if corpus.ids_from_content else "repeated_ids"
            firsts = first_of_repeated(rows)
            counts[reason] = counts.get(reason, 0) + int((~firsts).sum())
            rows, duplicate = rows[firsts], duplicate[firsts]
        again = repeated(rows)
        if again is not None:
            places = " and ".join(itertools.islice(places_of(corpus, name, id_of(again)), 2))
            raise UserError(
                f"corpus {name!r} has two documents {id_of(again)!r}: expected an id of its own for"
                f" each (see {places}); CorpusConfig.repeated_ids = 'keep_first' takes the first"
            )
        rows = rows[~duplicate]
        # Nothing later is taken either, however short: the selection is a prefix of the order.
        sizes = np.cumsum(rows["size"].astype(np.int64)) + size
        most = len(rows) if corpus.max_documents is None else corpus.max_documents - count
        if corpus.max_bytes is not None:
            most = min(most, int(np.searchsorted(sizes, corpus.max_bytes, side="right")))
        most = max(0, min(most, len(rows)))
        counts["beyond_limit"] += len(rows) - most
        size = int(sizes[-1]) if len(rows) else size
        rows = rows[:most]
        count += most
        if old_documents is not None:
            there = old_documents.among(rows, name, id_of)
            counts["known"] = counts.get("known", 0) + int(there.sum())
            rows = rows[~there]
        yield rows


@functools.lru_cache(maxsize=1)
def _stems(path: str, written: int) -> list[str]:
    """The stems of all runs, read once by a process for each file that was written at a path."""
    return files.read_json(pathlib.Path(path))["stems"]


@dataclasses.dataclass(frozen=True)
class WriteShard:
    """Writes documents shards by their plans.

    Attributes:
      directory: of the documents, with a folder for each split.
      plans: where `plan_shards` left its decisions.
      shards: split and number of each.
    """

    directory: str
    plans: str
    shards: tuple[tuple[str, int], ...]

    def __call__(self, index: int, report: Callable[[int], object] = silent) -> int:
        """Writes shard `index`; returns its documents."""
        split, number = self.shards[index]
        folder = pathlib.Path(self.plans)
        rows = np.load(plan_path(folder, split, number))
        assert rows.dtype == ROW
        stems = _stems(str(folder / _STEMS), (folder / _STEMS).stat().st_mtime_ns)

        def write(file: BinaryIO) -> None:
            file.writelines(read_lines(stems, rows))

        stage = Stage.attach(pathlib.Path(self.directory, split))
        stage.write_file(shard_name("documents", number, ".jsonl"), write)
        report(len(rows))
        return len(rows)
