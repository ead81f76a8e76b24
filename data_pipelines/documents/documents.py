"""The documents stage: corpora in, one directory of sorted JSON lines for each split out.

    corpus --read in portions, by the runner--> .spill/CORPUS/portion-00000/run-00000... sorted by a hash
           --one pass over the rows of all runs--> .spill/plan/train-00000.npy ...: the lines of each shard
           --by the runner--> {train,validation,test}/documents-00000.jsonl, ...

The order in which a corpus is read, the portions, the runs and the runner do not show in the result.
"""

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from data_pipelines.artefacts.manifest import Manifest, Path, shard_name
from data_pipelines.artefacts.runner import InProcess, Runner, run_counted
from data_pipelines.artefacts.stage import Stage
from data_pipelines.corpora import SPLITS, CorpusConfig, Document, TextCorpus
from data_pipelines.corpora.in_memory import written
from data_pipelines.documents import inputs
from data_pipelines.documents.external_sort import SORT_BYTES
from data_pipelines.documents.hashing import split_of, stable_fraction, stable_hash
from data_pipelines.documents.line_ids import corpora_of_line_ids
from data_pipelines.documents.reading import Sorting, read_corpora
from data_pipelines.documents.selection import Counts, KnownDocuments, WriteShard, plan_shards
from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

__all__ = [
    "KIND",
    "DocumentsConfig",
    "KnownDocuments",
    "prepare_documents",
    "read_documents",
    "read_shard",
    "split_of",
    "stable_fraction",
    "stable_hash",
]

KIND = "documents"
DROPPED = ("duplicates", "repeated_ids", "beyond_limit", "known")  # of what was read
_log = logging.getLogger(__name__)
SPILL = ".spill"  # of what was read, until the shards are written
_PLAN = "plan"
_IN_MEMORY = ".in-memory"  # no corpus has such a name


@dataclasses.dataclass(frozen=True)
class DocumentsConfig:
    """Which documents there are, and which split each belongs to.

    Attributes:
      corpora: the corpora, in files or in memory; each needs a name of its own.
      validation: share of documents in the validation split, by a hash of the id. A document keeps
        its split when others come or go; a larger share takes documents from train only.
      test: share of documents in the test split, in the same way.
      skip_bad_documents: count documents that cannot be read, and continue.
      shard_bytes: size at which a shard ends; more where there would be over 4,096 shards.
      sort_bytes: bytes of documents that a process sorts in memory; the result does not depend on it.
    """

    corpora: tuple[CorpusConfig | TextCorpus, ...]
    validation: float = 0.05
    test: float = 0.05
    skip_bad_documents: bool = False
    shard_bytes: int = 64 << 20
    sort_bytes: int = SORT_BYTES

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
        require(self.sort_bytes > 0, self, "sort_bytes", "a positive number")

    def settings(self, split: str) -> dict[str, Any]:
        """The settings in a split's manifest: all that its bytes depend on."""
        corpora = {corpus.name: corpus.settings for corpus in self.corpora}
        fields = ("validation", "test", "skip_bad_documents", "shard_bytes")
        return {"split": split, "corpora": corpora} | {name: getattr(self, name) for name in fields}


def prepare_documents(
    directory: Path,
    config: DocumentsConfig,
    *,
    known: KnownDocuments | None = None,
    appended: Sequence[Path] = (),
    runner: Runner = InProcess(),
) -> dict[str, Manifest]:
    """Writes DIRECTORY/{train,validation,test}, or what is missing of them.

    Args:
      directory: where they go.
      config: the corpora.
      known: documents of an earlier database, which are left out; there may be no others.
      appended: where later revisions have their documents: the files that those were made of are no
        change of the corpora.
      runner: where corpora are read and shards written; the bytes do not depend on it.

    Returns:
      The manifest of each split. Facts: documents, bytes, per corpus documents and bytes, the
      content of each shard, and the documents left out of each corpus by reason.

    Raises:
      UserError: a corpus that is missing, empty or bad, two documents of one id, no training
        document, or a directory made with other settings or of files that have changed since.
    """
    folder = pathlib.Path(directory)
    parents = {} if known is None else known.parents
    numbered = corpora_of_line_ids(folder)
    stages = {
        split: Stage(folder / split, KIND, _settings(config, split, numbered), parents, claim=False)
        for split in SPLITS
    }
    if any(stage.begun for stage in stages.values()):
        _refuse_changed_inputs(folder, config, [pathlib.Path(path) for path in appended])
    if not all(stage.done for stage in stages.values()):
        _write_splits(folder, stages, config, known, runner)
    shutil.rmtree(folder / SPILL, ignore_errors=True)
    return {split: stage.manifest() for split, stage in stages.items()}


def _settings(config: DocumentsConfig, split: str, numbered: Set[str]) -> dict[str, Any]:
    """A split's settings, as an older version recorded those of corpora with ids of lines."""
    settings = config.settings(split)
    for name in numbered & set(settings["corpora"]):
        settings["corpora"][name].pop("ids", None)
    return settings


def _refuse_changed_inputs(
    folder: pathlib.Path, config: DocumentsConfig, appended: Sequence[pathlib.Path]
) -> None:
    """Raises if a corpus is no longer that of which a begun stage was made."""
    before, now = inputs.recorded(folder), dict[str, inputs.Identity]()
    records = [inputs.recorded(path) for path in appended]
    for corpus in config.corpora:
        if isinstance(corpus, TextCorpus) or corpus.name not in before:
            continue  # a manifest has the hash of texts in memory; older versions recorded nothing
        try:
            identity = inputs.identity_of(corpus)
            if identity not in [record.get(corpus.name) for record in records]:
                now[corpus.name] = identity
        except UserError as error:  # a corpus is not needed any more once it was read
            _log.warning("not compared with %s: %s", folder, error)
    expected = "the same, a new workdir, or for more documents --append"
    inputs.refuse_changes(folder, before, now, expected)


def _write_splits(
    folder: pathlib.Path,
    stages: Mapping[str, Stage],
    config: DocumentsConfig,
    old_documents: KnownDocuments | None,
    runner: Runner,
) -> None:
    """Reads all corpora and writes what the stages have not got yet."""
    corpora = written(config.corpora, folder / SPILL / _IN_MEMORY)
    corpora.sort(key=lambda corpus: corpus.name)
    sorting = Sorting(config.validation, config.test, config.skip_bad_documents, config.sort_bytes)
    in_files = [corpus for corpus in config.corpora if isinstance(corpus, CorpusConfig)]
    identities = inputs.identities_of(in_files)
    done, read = read_corpora(folder / SPILL, corpora, sorting, runner), {}
    now = inputs.identities_of(in_files)
    inputs.refuse_changes(folder, identities, now, "none to change while it is read: run again")
    for corpus in corpora:
        reading, runs = done[corpus.name]
        if reading.first_bad:
            message = f"{reading.counts['bad']} bad documents left out; {reading.first_bad}"
            _log.warning("corpus %r: %s", corpus.name, message)
        counts: Counts = {name: reading.counts[name] for name in ("documents", "bad", "empty")}
        counts |= {"duplicates": 0, "beyond_limit": 0, "source": reading.source}
        if reading.labels:
            counts["labels"] = dict(sorted(reading.labels.items()))
        read[corpus.name] = corpus, counts, runs
    plans = folder / SPILL / _PLAN
    with files.writing(plans):
        plans.mkdir(exist_ok=True)
    shards = plan_shards(plans, read, config.shard_bytes, old_documents)
    if not shards["train"] and old_documents is None:
        names = ", ".join(read)
        raise UserError(f"{folder}: no document of {names} is in the training split: expected some")
    counted = {name: counts for name, (_, counts, _) in read.items()}
    check_counts(folder, counted, sum(s["documents"] for split in SPLITS for s in shards[split]))
    if identities:
        inputs.record(folder, identities)
    _write_shards(folder, stages, shards, counted, runner)


def check_counts(folder: pathlib.Path, reading: Mapping[str, Mapping[str, Any]], kept: int) -> int:
    """Raises unless all documents that were read were kept or dropped; returns how many were read.

    Args:
      folder: of the documents.
      reading: the counts of each corpus, as a manifest has them.
      kept: documents of all splits.
    """
    read = sum(counts["documents"] for counts in reading.values())
    dropped = sum(counts.get(reason, 0) for counts in reading.values() for reason in DROPPED)
    if read != kept + dropped:
        raise UserError(
            f"{folder}: of {read:,} documents that were read {kept:,} are kept and {dropped:,} left"
            " out: expected that to be all; remove it and run again"
        )
    return read


def _write_shards(
    folder: pathlib.Path,
    stages: Mapping[str, Stage],
    shards: Mapping[str, list[Counts]],
    counted: Mapping[str, Counts],
    runner: Runner,
) -> None:
    """Writes the shards and manifests that are missing."""
    for stage in stages.values():
        stage.claim()  # not before every corpus has proved good: a typing error claims nothing
    every = [(split, i) for split in SPLITS for i in range(len(shards[split]))]
    plans = files.absolute(folder / SPILL / _PLAN)
    work = WriteShard(files.absolute(folder), plans, tuple(every))
    missing = [
        index
        for index, (split, i) in enumerate(every)
        if not stages[split].done and stages[split].missing([shard_name(KIND, i, ".jsonl")])
    ]
    sizes = [shards[split][i]["documents"] for split, i in every]
    run_counted(runner, work, missing, sizes, what="documents", unit="document", logged=False)
    for split, stage in stages.items():
        if stage.done:
            continue
        facts: dict[str, Any] = {
            "documents": sum(shard["documents"] for shard in shards[split]),
            "bytes": sum(shard["bytes"] for shard in shards[split]),
            "shards": shards[split],
            "reading": counted,
        }
        stage.finish(facts, [shard_name(KIND, i, ".jsonl") for i in range(len(shards[split]))])


def read_shard(path: Path) -> Iterator[Document]:
    """The documents of one shard, in order."""
    with open(path, "rb") as file:
        for line in file:
            yield Document(**json.loads(line))


def read_documents(directory: Path, manifest: Manifest) -> Iterator[Document]:
    """The documents of one split, in order."""
    for shard in manifest.shards:
        yield from read_shard(pathlib.Path(directory) / shard.name)
