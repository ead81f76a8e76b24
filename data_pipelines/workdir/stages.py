"""The stages of a preparation, and `prepare`, the one call that runs them.

    prepare("W", PrepareConfig(DocumentsConfig(corpora)))

documents, leakage, tokenizer, chunks, duplicates, keys, index, bm25, neighbours: those that the
settings ask for, each into its own directory of W. A finished stage is not run again; after a kill,
the same call resumes. A directory that was made with other settings is refused, and never deleted.
"""

import contextlib
import dataclasses
import fcntl
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path
from data_pipelines.artefacts.runner import InProcess, Runner
from data_pipelines.chunk_database.base_tokenizer import prepare_base_tokenizer
from data_pipelines.chunk_database.database import prepare_chunks
from data_pipelines.chunk_database.tokenizer import train_tokenizer
from data_pipelines.corpora import SPLITS
from data_pipelines.corpora.sources import WORKDIR_MARK
from data_pipelines.documents.documents import DROPPED, check_counts, prepare_documents
from data_pipelines.retriever import revisions
from data_pipelines.retriever.bm25 import prepare_bm25
from data_pipelines.retriever.filled_slots import describe, share_filled, warn_of_few
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.keys import prepare_keys
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir import leakage_report
from data_pipelines.workdir.preparation import (
    Preparation,
    PrepareConfig,
    open_keys,
    prepare_table,
)
from data_pipelines.workdir.settings_file import SETTINGS_FILE, settings_text
from retro_jax.errors import UserError
from retro_jax.storage import files

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StageOf:
    """A stage of the preparation.

    Attributes:
      places: the directories in W that it fills.
      run: makes the missing ones, and returns a line about their content, and a count for the
        rate with its unit.
      wanted: whether the settings ask for it.
    """

    places: tuple[str, ...]
    run: Callable[[Preparation], tuple[str, int, str]]
    wanted: Callable[[Preparation], bool] = lambda p: True


def prepare(
    workdir: Path,
    config: PrepareConfig,
    *,
    runner: Runner | None = None,
    stages: Sequence[str] | None = None,
    report: Callable[[str], object] = _log.info,
    settings: str | None = None,
) -> list[str]:
    """Prepares W: corpora in, chunks with their neighbours out; or what is missing of it.

    Args:
      workdir: W; made if it is not there.
      config: every setting.
      runner: where shards are made; this process by default. The bytes do not depend on it.
      stages: only these, in their usual order; all that the settings ask for by default.
      report: receives a line about each stage; Python's logging by default, at level INFO.
      settings: what W/prepare.gin will contain; by default the bindings of `config`.

    Returns:
      The names of the stages that had anything to do.

    Raises:
      UserError: bad input, directories that were made with other settings, an unknown stage, or
        another process that prepares W.
    """
    names, directory = chosen_stages(stages), pathlib.Path(workdir)
    preparation = Preparation(directory, config, runner or InProcess(), report)
    with only_one(directory):
        if revisions.purged(directory, 0):
            newest = revisions.latest(directory)
            base = revisions.base_of(directory, newest)
            report(f"there already: revision {newest}, and those before {base} are purged")
            return []
        new_stages = [name for name in names if run_stage(name, preparation)]
        if new_stages:
            text = settings_text(config) if settings is None else settings
            files.write_atomically(directory / SETTINGS_FILE, text.encode())
    return new_stages


def chosen_stages(names: Sequence[str] | None) -> list[str]:
    """Stages in the order in which they run; all of them for None.

    Raises:
      UserError: a name that is no stage, or no name.
    """
    choices = ",".join(ALL_STAGES)
    if names is None:
        return list(ALL_STAGES)
    for name in names:
        if name not in ALL_STAGES:
            raise UserError(f"stages={name}: expected some of {choices}")
    if not names:
        raise UserError(f"stages is empty: expected some of {choices}")
    return [name for name in ALL_STAGES if name in names]


def run_stage(name: str, preparation: Preparation) -> bool:
    """Runs one stage and reports a line about it; returns whether there was anything to do."""
    stage, start = ALL_STAGES[name], time.perf_counter()
    if not stage.wanted(preparation):
        return False
    done = all((preparation.directory / p / MANIFEST_FILE).is_file() for p in stage.places)
    if not done:
        preparation.report(f"{name}: ...")
    line, count, unit = stage.run(preparation)
    seconds = time.perf_counter() - start
    took = "there already" if done else f"{seconds:.1f} s, {count / seconds:,.0f} {unit} a second"
    preparation.report(f"{name}: {line} ({took})")
    return not done


@contextlib.contextmanager
def only_one(directory: pathlib.Path) -> Iterator[None]:
    """Makes W, and keeps other preparations out of it until the end.

    Raises:
      UserError: another one is running.
    """
    with files.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / WORKDIR_MARK, "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory} is being prepared by another process: expected none"
            ) from None
        yield


def _documents(p: Preparation) -> tuple[str, int, str]:
    """Reads the corpora into splits."""
    newest = revisions.latest(p.directory)
    folders = [revisions.folder_of(p.directory, r) / "documents" for r in range(1, newest + 1)]
    manifests = prepare_documents(
        p.directory / "documents", p.config.documents, appended=folders, runner=p.runner
    )
    counts = {split: manifest.fact("documents") for split, manifest in manifests.items()}
    size = sum(manifest.fact("bytes") for manifest in manifests.values())
    left_out = _left_out(manifests["train"])
    total = sum(counts.values())
    read = check_counts(p.directory / "documents", manifests["train"].fact("reading"), total)
    summary = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    line = f"{summary}; {size / 1e6:,.1f} MB; {total:,} of {read:,} readable documents{left_out}"
    return line, size // 1000, "kB"


def _check_count(path: pathlib.Path, count: int, expected: int, unit: str) -> None:
    """Raises unless a directory has as many of something as its parent."""
    if count != expected:
        raise UserError(
            f"{path} has {count:,} {unit}: expected {expected:,}, as many as it was made of"
        )


def _left_out(manifest: Manifest) -> str:
    """How many documents were not taken, by reason."""
    reading = manifest.fact("reading").values()
    reasons = ("bad", "empty", *DROPPED)
    sums = {reason: sum(counts.get(reason, 0) for counts in reading) for reason in reasons}
    parts = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in sums.items() if n)
    return f"; left out: {parts}" if parts else ""


def _leakage(p: Preparation) -> tuple[str, int, str]:
    """Withdraws training documents that are near-copies of held-out ones."""
    leakage_report.refuse_late(p.directory)
    manifest = leakage_report.withdraw(p, p.directory)
    assert manifest is not None
    count = manifest.fact("documents")
    documents = Manifest.read(p.directory / "documents" / "train").fact("documents")
    _check_count(p.directory / "leakage", count, documents, "documents")
    if manifest.fact("withdrawn") == count:
        raise UserError(
            f"{p.directory / 'leakage'}: all {count} training documents are near-copies of held-out"
            " ones: expected some that are not"
        )
    leakage_report.write_report(p.directory)
    return leakage_report.told(manifest), count, "documents"


def _duplicates(p: Preparation) -> tuple[str, int, str]:
    """Counts held-out chunks that occur almost verbatim in the training split."""
    manifest = leakage_report.count(p, p.directory)
    leakage_report.write_report(p.directory)
    return leakage_report.told_of_chunks(manifest), manifest.fact("chunks"), "chunks"


def _tokenizer(p: Preparation) -> tuple[str, int, str]:
    """Trains the tokeniser on the training split, or takes an existing model's."""
    if base := p.config.tokenizer.base:
        manifest = prepare_base_tokenizer(p.directory / "tokenizer", base)
        tokens = manifest.fact("tokens")
        return f"{tokens:,} tokens, those of {base}", tokens, "tokens"
    manifest = train_tokenizer(
        p.directory / "tokenizer", p.directory / "documents" / "train", p.config.tokenizer
    )
    size = manifest.fact("training_bytes")
    line = f"{manifest.fact('vocab_size'):,} tokens, trained on {size / 1e6:,.1f} MB"
    return line, size // 1000, "kB"


def _chunks(p: Preparation) -> tuple[str, int, str]:
    """Cuts every split's documents into chunks."""
    counts, total, withdrawn = {}, 0, 0
    for split in SPLITS:
        path, documents = (p.directory / kind / split for kind in ("chunks", "documents"))
        leakage = leakage_report.directory_of(p, p.directory) if split == "train" else None
        manifest = prepare_chunks(
            path,
            documents,
            p.directory / "tokenizer",
            leakage_directory=leakage,
            runner=p.runner,
        )
        counts[split] = manifest.fact("chunks")
        expected = Manifest.read(documents).fact("documents")
        if leakage is not None:
            withdrawn = Manifest.read(leakage).fact("withdrawn")
            expected -= withdrawn
        _check_count(path, manifest.fact("documents"), expected, "documents")
        total += expected
    summary = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    line = f"{summary}; of {total + withdrawn:,} documents {withdrawn:,} are withdrawn"
    return line, sum(counts.values()), "chunks"


def _keys(p: Preparation) -> tuple[str, int, str]:
    """Embeds every split: the training split is the retrieval database, the others ask it."""
    if p.config.keys.is_given:
        return _given_keys(p)
    tokenizer, prefixes = p.directory / "tokenizer", p.config.keys.open().prefixes
    places = {split: ("keys/" + split, split, "query") for split in SPLITS}
    places["train"] = ("keys/train", "train", "passage")
    if prefixes.differ:  # as queries, training chunks have other keys
        places["queries"] = (revisions.QUERY_KEYS, "train", "query")
    manifests = {
        name: prepare_keys(
            *(p.directory / place, p.directory / "chunks" / chunks, tokenizer, p.config.keys),
            role=role,
            runner=p.runner,
        )
        for name, (place, chunks, role) in places.items()
    }
    for name, (place, split, _) in places.items():
        expected = Manifest.read(p.directory / "chunks" / split).fact("chunks")
        _check_count(p.directory / place, manifests[name].fact("chunks"), expected, "chunks")
    summary = ", ".join(f"{m.fact('keys'):,} {split}" for split, m in manifests.items())
    chunks, keys = (
        sum(manifest.fact(name) for manifest in manifests.values()) for name in ("chunks", "keys")
    )
    dimension = manifests["train"].fact("dimension")
    line = f"{summary}; {dimension} dimensions; {chunks - keys:,} chunks have no text, so no key"
    if prefixes.settings:
        line += f"; {prefixes.query!r} before queries, {prefixes.passage!r} before passages"
    return line, chunks, "chunks"


def _given_keys(p: Preparation) -> tuple[str, int, str]:
    """Finds the keys that the caller wrote."""
    counts = {}
    for split in SPLITS:
        path = p.directory / "keys" / split
        found = open_keys(p.directory, split) if (path / MANIFEST_FILE).is_file() else None
        made_by = found.model if found else "missing"
        if found is None or made_by != p.config.keys.model:
            raise UserError(
                f"{path} is {made_by}: expected the keys of {p.config.keys.model!r}, as"
                " write_given_keys writes them"
            )
        counts[split] = found.manifest.fact("keys")
    summary = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return f"{summary}; {p.config.keys.model}", sum(counts.values()), "chunks"


def _index(p: Preparation) -> tuple[str, int, str]:
    """Builds the index over the keys."""
    keys = open_keys(p.directory, "train")
    manifest = prepare_index(p.directory / "index", keys, p.config.index, runner=p.runner)
    count, plan = manifest.fact("keys"), manifest.fact("plan")
    _check_count(p.directory / "index", count, keys.manifest.fact("keys"), "keys")
    return f"{count:,} keys, {plan['kind'].replace('_', ' ')}", count, "keys"


def _bm25(p: Preparation) -> tuple[str, int, str]:
    """Computes the scores of terms in the database's chunks."""
    database = revisions.open_database(p.directory, 0)
    manifest = prepare_bm25(p.directory / "bm25", database, p.config.bm25, runner=p.runner)
    count, postings = manifest.fact("indexed"), manifest.fact("postings")
    _check_count(p.directory / "bm25", manifest.fact("chunks"), len(database), "chunks")
    return f"{count:,} chunks, {postings:,} terms in them", count, "chunks"


def _neighbours(p: Preparation) -> tuple[str, int, str]:
    """Finds the neighbours of every split's chunks."""
    retriever = Retriever.open(p.directory, revision=0, ranking=p.config.neighbours.ranking)
    lines, total = [], 0
    for split in SPLITS:
        manifest = prepare_table(p, split, retriever)
        total += manifest.fact("chunks")
        expected = Manifest.read(p.directory / "chunks" / split).fact("chunks")
        path = p.directory / "neighbours" / split
        _check_count(path, manifest.fact("chunks"), expected, "chunks")
        lines.append(f"{split} {describe(manifest)}")
        warn_of_few(f"{path}", share_filled(manifest))
    return "; ".join(lines), total, "chunks"


def _checks_leakage(p: Preparation) -> bool:
    """Whether training documents are compared with held-out ones."""
    return p.config.leakage.threshold is not None


def _splits(folder: str) -> tuple[str, ...]:
    """A folder's directory for each split."""
    return tuple(f"{folder}/{split}" for split in SPLITS)


ALL_STAGES = {
    "documents": StageOf(_splits("documents"), _documents),
    "leakage": StageOf(("leakage",), _leakage, _checks_leakage),
    "tokenizer": StageOf(("tokenizer",), _tokenizer),
    "chunks": StageOf(_splits("chunks"), _chunks),
    "duplicates": StageOf(("duplicates",), _duplicates, _checks_leakage),
    "keys": StageOf(_splits("keys"), _keys, lambda p: p.config.neighbours.ranking.by_keys),
    "index": StageOf(("index",), _index, lambda p: p.config.neighbours.ranking.by_keys),
    "bm25": StageOf(("bm25",), _bm25, lambda p: p.config.neighbours.ranking.by_terms),
    "neighbours": StageOf(_splits("neighbours"), _neighbours),
}
