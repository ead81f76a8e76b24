"""Scores texts: bits per byte of the baseline, RETRO[OFF], RETRO[ON] and more, by corpus.

    python -m launch.evaluate --workdir=W
    python -m launch.evaluate --workdir=W --retrieval=on,off,random,oracle --sweep=1,2,5,10 --knn
    python -m launch.evaluate --workdir=W --slices=wikitext103 --slice_paths=wikitext103=wiki.test.tokens

Reads the newest checkpoint of W/retro, and of W/baseline where one was trained. Every token is scored
once, in windows of the trained length that advance by half of it. docs/evaluation.md explains each
condition and figure. Writes, in W/evaluation:

    SPLIT.json, SPLIT.md           the last printed results, with every sum and figure
    SPLIT-documents.npz            sums by document, for intervals and comparisons
    SPLIT-windows.json             figures of each --overlap, where there are several
    SPLIT-overlap.json .csv .svg   the same figures by overlap with the training data, r(C) <= alpha
    SPLIT-CONDITION-STEP-ID.json   one condition of one checkpoint; found again, it is reused
    SPLIT-CONDITION-STEP-ID.npy    [chunks, 64] float32, the loss in nats of each token

On many hosts the same command is started on each of them, as for launch.train:

    python -m launch.evaluate ... --coordinator_address=HOST:PORT --num_processes=2 --process_id=0

Each makes the rows of its own devices; process 0 prepares slices, writes and prints.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.prepare_text import prepare_slice
from data_pipelines.evaluation.splits import open_split, places_of
from data_pipelines.evaluation.texts import TEXTS, SliceConfig, evaluation_text
from launch.common import app, configurables
from launch.common.flags import (
    AVERAGED,
    BERT_FOLDER,
    COORDINATOR_ADDRESS,
    DATA,
    NUM_NEIGHBOURS,
    NUM_PROCESSES,
    PEER_TIMEOUT,
    PROCESS_ID,
    RETRIEVAL,
    SPLIT,
    data_directory,
    join_processes,
)
from launch.evaluation.conditions import (
    KINDS,
    TOKENS,
    Condition,
    check_split,
    passes,
    swept_conditions,
)
from launch.evaluation.results import Work, evaluate
from launch.evaluation.scores import keep_scores
from launch.evaluation.settings import EvaluationSettings, KnnSettings
from launch.evaluation.slices import wanted_slices
from launch.runs import trained_run
from retro_jax.distributed import processes
from retro_jax.errors import UserError
from retro_jax.evaluate.scorer import Scorer
from retro_jax.evaluate.uncertainty import with_intervals
from retro_jax.host_memory import keep_freed_memory
from retro_jax.report.evaluation_tables import (
    compared,
    format_overlap,
    format_table,
    markdown,
    window_tables,
)
from retro_jax.report.result_files import EVALUATION, windows_file, write_overlap
from retro_jax.report.tables import as_text
from retro_jax.storage import files

STRIDE = flags.DEFINE_integer(
    "stride_chunks",
    None,
    "Chunks that windows advance by (half the trained length).",
    lower_bound=1,
)
OVERLAP = flags.DEFINE_list(
    "overlap",
    [],
    "Shares of a window that are context only, as in 0,0.5,0.75,0.875; what is shown is of the largest, "
    "and several are also shown beside each other.",
)
WINDOW = flags.DEFINE_integer(
    "window_chunks", None, "Chunks of a window. Default: the trained length.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Windows at once, rounded up to a multiple of the devices.", lower_bound=1
)
MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", None, "Score only the first so many documents of each corpus.", lower_bound=1
)
SLICES = flags.DEFINE_list(
    "slices",
    [],
    f"Score these texts instead of a split: {', '.join(TEXTS)}, a subset as in pile:github, or any name "
    "for JSON lines with a text field each.",
)
PATHS = flags.DEFINE_list(
    "slice_paths", [], "Where slices are read, as in pile=/data/val.jsonl.zst; needed once."
)

SWEEP = flags.DEFINE_list("sweep", [], "Also score with so many neighbours each, as in 1,2,5,10.")
DATABASES = flags.DEFINE_list(
    "database_shares", [], "Also retrieve from these shares of the database, as in 0.01,0.1."
)
NGRAMS = flags.DEFINE_list(
    "ngram_limits", [], "Also drop neighbours that hold more than this share of the 13-grams."
)
KNN = flags.DEFINE_bool("knn", False, "Also score kNN-LM: the baseline, where there is one.")
KNN_TOKENS = flags.DEFINE_integer(
    "knn_tokens", 2_000_000, "Tokens of the training split in its datastore.", lower_bound=64
)
KNN_NEIGHBOURS = flags.DEFINE_integer("knn_neighbours", 64, "Tokens it looks up.", lower_bound=1)
KNN_EXACT = flags.DEFINE_bool("knn_exact", False, "Compares every token of a large datastore too.")

__all__ = [  # flags of other modules too, which --help lists
    "COORDINATOR_ADDRESS",
    "NUM_PROCESSES",
    "PEER_TIMEOUT",
    "PROCESS_ID",
    "main",
]

_BASELINE = "baseline"


def main() -> None:
    """Computes missing scores, and prints the table."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    data = data_directory(DATA.value or workdir)
    trained_run.refuse_gin_file()
    join_processes(
        COORDINATOR_ADDRESS.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        peer_timeout=PEER_TIMEOUT.value,
    )
    settings = _settings()
    conditions = processes.together(lambda: _checked_conditions(workdir, data, settings))
    scorer = Scorer()
    with processes.noticing_loss():
        configs = wanted_slices(SLICES.value, PATHS.value, MAX_DOCUMENTS.value)
        names = [_prepared(data, config) for config in configs]
        for number, name in enumerate(names or [SPLIT.value]):
            opening = functools.partial(_open, workdir, data, name, conditions, scorer)
            if number:
                _say("")
            _evaluate_all(processes.together(opening), settings, conditions)


def _settings() -> list[EvaluationSettings]:
    """The settings that the flags ask for, by ascending overlap of windows.

    Raises:
      flags.Error: a value that is no share.
    """
    overlaps: set[float] = set()
    if STRIDE.value is not None and OVERLAP.value:
        raise flags.Error("--overlap and --stride_chunks: expected one of them")
    for value in OVERLAP.value:
        share = _number(value)
        if not 0 <= share <= 1:
            raise flags.Error(f"--overlap={value}: expected shares from 0 to 1")
        overlaps.add(share)
    settings = EvaluationSettings(
        window_chunks=WINDOW.value,
        stride_chunks=STRIDE.value,
        batch_size=BATCH_SIZE.value,
        max_documents=MAX_DOCUMENTS.value,
        knn=KnnSettings(KNN_TOKENS.value, KNN_NEIGHBOURS.value, KNN_EXACT.value),
    )
    return [dataclasses.replace(settings, overlap=x) for x in sorted(overlaps)] or [settings]


def _checked_conditions(
    workdir: pathlib.Path, data: pathlib.Path, settings: Sequence[EvaluationSettings]
) -> list[Condition]:
    """The conditions that the flags ask for, of runs that belong to the data."""
    conditions = _conditions(workdir, _wanted(RETRIEVAL.value))
    for condition in conditions:
        trained_run.check_data(condition.run, data)
        for each in settings:
            each.windows(condition.run.chunks)  # refused now, not after hours
    return conditions


def _prepared(data: pathlib.Path, config: SliceConfig) -> str:
    """The name of a slice, which the first process has prepared at need."""
    report = functools.partial(print, flush=True)
    return processes.from_first(
        lambda: prepare_slice(data, config, bert_folder=BERT_FOLDER.value, report=report)
    )


def _open(
    workdir: pathlib.Path,
    data: pathlib.Path,
    name: str,
    conditions: Sequence[Condition],
    scorer: Scorer,
) -> Work:
    """A split or slice with the tables that the conditions read."""
    most = max(condition.neighbours for condition in conditions)
    if places_of(data, name).neighbours.is_dir():
        most = max(most, 1)  # r(C) needs the table even where no condition does
    split = open_split(data, name, neighbours=most, max_documents=MAX_DOCUMENTS.value)
    check_split(split, conditions)
    lengths = Tokenizer.open(data / "tokenizer").byte_lengths
    return Work(workdir / EVALUATION, data, split, split.text_mask(lengths), lengths, scorer)


def _say(text: str) -> None:
    """Prints a line, in the first process only."""
    if processes.is_first():
        print(text)


def _evaluate_all(
    work: Work, settings: Sequence[EvaluationSettings], conditions: Sequence[Condition]
) -> None:
    """Scores a split under all conditions; the first process writes and prints every form of it."""
    by_overlap: dict[float | None, dict[str, Any]] = {}
    for each in settings:
        results: dict[str, Any] = {}
        for together in passes(conditions):
            results |= evaluate(work, each, together)
        by_overlap[each.overlap] = results
    processes.together(lambda: _publish(work, by_overlap) if processes.is_first() else None)


def _publish(work: Work, by_overlap: Mapping[Any, Mapping[str, Any]]) -> None:
    """Writes every form of the results, then prints them: those of the largest overlap, then all."""
    name, results = work.split.name, list(by_overlap.values())[-1]
    scored = keep_scores(
        work.folder, results, split=work.split, text=work.text, lengths=work.lengths
    )
    results = with_intervals(results, scored)
    files.write_atomically(work.folder / f"{name}.json", files.to_json(results))
    lines, overlap, several = [format_table(results)], None, None
    if work.split.table is None:
        lines.append(f"no figures by overlap: {work.data} has no neighbours of the {name} split")
    else:
        models = {condition: result["model"] for condition, result in results.items()}
        overlap = write_overlap(work.folder, scored, models)
        lines.append(f"\n{format_overlap(overlap)}")
    if len(by_overlap) > 1:
        several = compared(by_overlap)
        files.write_atomically(windows_file(work.folder, name), files.to_json(several))
        for table in window_tables(several):
            lines.append(f"\n{table.title}\n{as_text(table)}")
    text = markdown(results, overlap, several, evaluation_text(name).published)
    files.write_atomically(work.folder / f"{name}.md", text.encode())
    print("\n".join(lines))


def _wanted(names: Sequence[str] | None) -> list[str]:
    """The checked values of --retrieval, in their order of computation; on and off by default."""
    if names is None:
        return ["on", "off"]
    if not names or set(names) - set(KINDS):
        raise flags.Error(f"--retrieval={','.join(names)}: expected some of {', '.join(KINDS)}")
    return [name for name in KINDS if name in names]


def _conditions(workdir: pathlib.Path, names: Sequence[str]) -> list[Condition]:
    """The columns, each with its run."""
    bindings = configurables.GIN_BINDINGS.value
    retro = trained_run.open_run(workdir / "retro", bindings, averaged=AVERAGED.value)
    k = NUM_NEIGHBOURS.value or retro.batches.neighbours
    swept = swept_conditions(
        retro,
        k,
        counts=_numbers(SWEEP, 1, 1000, whole=True),
        shares=_numbers(DATABASES, 0, 1),
        limits=_numbers(NGRAMS, 0, 1),
    )
    needing = [name for name in [*names, *(c.name for c in swept)] if name != "off"]
    if needing and not (k and retro.model.has_retrieval):
        name = needing[0] if needing[0] in KINDS else "on"
        raise UserError(f"--retrieval={name}: {retro.directory} was trained without, expected off")
    conditions = [Condition(name, retro, k if name != "off" else 0, name) for name in names]
    if trained_run.is_trained(workdir / _BASELINE):
        baseline = trained_run.open_run(workdir / _BASELINE, bindings, averaged=AVERAGED.value)
        conditions.append(Condition(_BASELINE, baseline, 0, _BASELINE))
        if TOKENS in names:
            conditions.append(Condition(f"{_BASELINE}+{TOKENS}", baseline, 0, TOKENS))
    if KNN.value:
        model = conditions[-1].run if conditions[-1].name == _BASELINE else retro
        conditions.append(Condition("knn", model, 0, "knn"))
    return conditions + swept


def _numbers(
    flag: flags.FlagHolder, low: float, high: float, *, whole: bool = False
) -> list[float]:
    """The values of a list of numbers, ascending.

    Raises:
      flags.Error: one of them is out of its range.
    """
    numbers = set()
    for value in flag.value:
        number = _number(value)
        if not low <= number <= high or (whole and number != int(number)):
            kind = "whole numbers" if whole else "numbers"
            raise flags.Error(f"--{flag.name}={value}: expected {kind} from {low:g} to {high:g}")
        numbers.add(number)
    return sorted(numbers)


def _number(value: str) -> float:
    """A number of a list; -1, which no list takes, for other text."""
    try:
        return float(value)
    except ValueError:
        return -1.0


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
