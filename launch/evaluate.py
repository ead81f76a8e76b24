"""Scores texts: bits per byte of the baseline, RETRO[OFF], RETRO[ON] and more, by corpus.

    python -m launch.evaluate --workdir=W
    python -m launch.evaluate --workdir=W --retrieval=on,off,random,oracle --sweep=1,2,5,10 --knn
    python -m launch.evaluate --workdir=W --slices=wikitext103 --slice_paths=wikitext103=wiki.test.tokens
    python -m launch.evaluate --workdir=W --revisions=0,1,2 --retrieval=on,off,tokens

Reads the newest checkpoint of W/retro, and of W/baseline where one was trained. Every token is scored
once, in windows of the trained length that advance by half of it. docs/evaluation.md explains each
condition and figure. Writes, in W/evaluation:

    SPLIT.json, SPLIT.md           the last printed results, with every sum and figure
    SPLIT-documents.npz            sums by document, for intervals and comparisons
    SPLIT-size.json                bits by the size of the database, of three --database_shares or more
    SPLIT-credit.csv .json SPLIT-remove.txt  what each document of the database saved (--credit)
    SPLIT-windows.json             figures of each --overlap, where there are several
    SPLIT-revisions.json           figures of each of --revisions, where there are any
    SPLIT-cost.svg                 bits per byte by operations and by bytes read of all conditions
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
from data_pipelines.evaluation.credit import credited_pairs, write_credit
from data_pipelines.evaluation.other_texts import check_other_texts
from data_pipelines.evaluation.prepare_text import prepare_tables
from data_pipelines.evaluation.sample import sampled
from data_pipelines.evaluation.splits import open_split, places_of
from data_pipelines.evaluation.stored_votes import memory_of, stored_votes
from data_pipelines.evaluation.texts import TEXTS, evaluation_text
from data_pipelines.retriever.filled_slots import warn_of_few
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.text_votes import TextVotes
from launch.common import app, configurables, workdirs
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
    SKIP_BAD,
    SPLIT,
    join_processes,
)
from launch.evaluation.conditions import (
    IN_CONTEXT,
    KINDS,
    TOKENS,
    Condition,
    asked_condition,
    passes,
    swept_conditions,
)
from launch.evaluation.costs import with_costs
from launch.evaluation.results import Work, evaluate
from launch.evaluation.revisions import write_revisions
from launch.evaluation.scores import keep_scores
from launch.evaluation.settings import EvaluationSettings, KnnSettings
from launch.evaluation.slices import wanted_slices
from launch.runs import trained_run
from retro_jax.distributed import processes
from retro_jax.errors import UserError
from retro_jax.evaluate import size_law
from retro_jax.evaluate.in_context import check_context
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
from retro_jax.report.result_files import (
    EVALUATION,
    windows_file,
    write_costs,
    write_overlap,
    write_size_law,
)
from retro_jax.report.revision_view import revision_tables
from retro_jax.report.tables import as_text
from retro_jax.retrofit import context_length
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
SAMPLE = flags.DEFINE_integer(
    "sample_chunks", None, "Score only so many random chunks, in runs of four.", lower_bound=1
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

REVISIONS = flags.DEFINE_list(
    "revisions",
    [],
    "Score with the database at each of these revisions, as in 0,1,2: one model, no training. What is "
    "shown is of the last, and all are also shown beside each other.",
)

CREDIT = flags.DEFINE_float(
    "credit",
    None,
    "Also write the bits that each document of the database saved, and a --remove list of this share of "
    "them, of least credit.",
    lower_bound=0,
    upper_bound=1,
)

SWEEP = flags.DEFINE_list("sweep", [], "Also score with so many neighbours each, as in 1,2,5,10.")
IN_CONTEXTS = flags.DEFINE_list(
    "in_context",
    [],
    "Also score RETRO[OFF] with so many neighbours before the text, as in 1,2,4,8.",
)
DATABASES = flags.DEFINE_list(
    "database_shares", [], "Also retrieve from these shares of the database, as in 0.01,0.1."
)
NGRAMS = flags.DEFINE_list(
    "ngram_limits", [], "Also drop neighbours that hold more than this share of the 13-grams."
)
KNN = flags.DEFINE_bool(
    "knn", False, "Also score kNN-LM on the baseline, where there is one, and on RETRO[ON]."
)
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
    trained_run.refuse_gin_file()
    join_processes(
        COORDINATOR_ADDRESS.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        peer_timeout=PEER_TIMEOUT.value,
    )
    settings = _settings()
    workdir, data = workdirs.open_to_read(DATA)
    conditions = processes.together(lambda: _checked_conditions(workdir, data, settings))
    scorer = Scorer()
    with processes.noticing_loss():
        configs = wanted_slices(SLICES.value, PATHS.value, MAX_DOCUMENTS.value, SKIP_BAD.value)
        revisions = [*map(int, _numbers(REVISIONS, 0, 99_999, whole=True))]
        bert, most = BERT_FOLDER.value, max(condition.neighbours for condition in conditions)
        prepare_tables(data, SPLIT.value, configs, revisions, bert_folder=bert, neighbours=most)
        for number, name in enumerate([config.key for config in configs] or [SPLIT.value]):
            opening = functools.partial(_open, workdir, data, name, conditions, scorer)
            if number:
                _say("")
            if revisions:
                calls = {r: functools.partial(opening, r) for r in revisions}
                opened = {r: processes.together(call) for r, call in calls.items()}
                _evaluate_revisions(opened, settings[-1], conditions)
            else:
                _evaluate_all(processes.together(opening), settings, conditions)


def _settings() -> list[EvaluationSettings]:
    """The settings that the flags ask for, by ascending overlap of windows.

    Raises:
      flags.Error: a value that is no share, or flags that exclude each other.
    """
    _refuse_idle_flags()
    overlaps = _numbers(OVERLAP, 0, 1)
    if STRIDE.value is not None and OVERLAP.value:
        raise flags.Error("--overlap and --stride_chunks: expected one of them")
    if REVISIONS.value and len(OVERLAP.value) > 1:
        raise flags.Error("--overlap with --revisions: expected one share")
    if REVISIONS.value and SPLIT.value == "train" and not SLICES.value:
        raise flags.Error(
            "--revisions of --split=train, another text at each: expected another split"
        )
    settings = EvaluationSettings(
        window_chunks=WINDOW.value,
        stride_chunks=STRIDE.value,
        batch_size=BATCH_SIZE.value,
        max_documents=MAX_DOCUMENTS.value,
        knn=KnnSettings(KNN_TOKENS.value, KNN_NEIGHBOURS.value, KNN_EXACT.value),
        sample_chunks=SAMPLE.value,
    )
    return [dataclasses.replace(settings, overlap=x) for x in overlaps] or [settings]


def _refuse_idle_flags() -> None:
    """Raises flags.Error for a flag that would do nothing beside the others, or without one."""
    if SPLIT.present and SLICES.value:
        raise flags.Error(f"--split={SPLIT.value} with --slices: expected one of them")
    for flag in (KNN_TOKENS, KNN_NEIGHBOURS, KNN_EXACT):
        if flag.present and not KNN.value:
            raise flags.Error(f"--{flag.name} without --knn: expected both")
    if SKIP_BAD.value and not SLICES.value:
        raise flags.Error("--skip_bad_documents without --slices: expected the slices to prepare")


def _checked_conditions(
    workdir: pathlib.Path, data: pathlib.Path, settings: Sequence[EvaluationSettings]
) -> list[Condition]:
    """The conditions that the flags ask for, of runs that belong to the data."""
    conditions = _conditions(workdir, _wanted(RETRIEVAL.value))
    if CREDIT.value is not None:
        credited_pairs([condition.name for condition in conditions])
    for condition in conditions:
        trained_run.check_data(condition.run, data)
        for each in settings:
            cut = each.windows(condition.run.chunks)  # refused now, not after hours
            if condition.kind == "context":
                run, name = condition.run, condition.run.base or str(condition.run.directory)
                limit = context_length(run.base) if run.base else run.batches.sequence_length
                check_context(run.model, condition.neighbours, cut, limit=limit, model=name)
    return conditions


def _open(
    workdir: pathlib.Path,
    data: pathlib.Path,
    name: str,
    conditions: Sequence[Condition],
    scorer: Scorer,
    revision: int | None = None,
) -> Work:
    """A split or slice with the tables that the conditions read."""
    most = max(condition.neighbours for condition in conditions)
    if places_of(data, name).neighbours.is_dir():
        most = max(most, 1)  # r(C) needs the table even where no condition does
    limit = MAX_DOCUMENTS.value
    split = open_split(data, name, neighbours=most, max_documents=limit, revision=revision)
    check_other_texts(data, split, {c.name: c.neighbours for c in conditions}, revision)
    tokenizer = Tokenizer.open(data / "tokenizer")
    lengths = tokenizer.byte_lengths
    if SAMPLE.value is not None:
        split = sampled(split, SAMPLE.value, tokenizer)
    text = split.text_mask(lengths)
    return Work(workdir / EVALUATION, data, split, text, lengths, scorer, revision)


def _say(text: str) -> None:
    """Prints a line, in the first process only."""
    if processes.is_first():
        print(text)


def _evaluate_all(
    work: Work, settings: Sequence[EvaluationSettings], conditions: Sequence[Condition]
) -> None:
    """Scores a split under all conditions; the first process writes and prints every form of it."""
    by_overlap = {each.overlap: _evaluate(work, each, conditions) for each in settings}
    votes = _votes_to_credit(work, conditions)

    def publish() -> None:
        _publish(work, by_overlap, votes)

    processes.together(lambda: publish() if processes.is_first() else None)


def _evaluate(
    work: Work, settings: EvaluationSettings, conditions: Sequence[Condition]
) -> dict[str, Any]:
    """The results of all conditions by name, with their costs; empty but in the first process."""
    results: dict[str, Any] = {}
    for together in passes(conditions):
        results |= evaluate(work, settings, together)
    return with_costs(work, settings, conditions, results) if processes.is_first() else results


def _evaluate_revisions(
    works: Mapping[int, Work], settings: EvaluationSettings, conditions: Sequence[Condition]
) -> None:
    """Scores a split against revisions of the database; publishes the last, with a table of all."""
    found = {r: _evaluate(work, settings, conditions) for r, work in works.items()}
    last = max(works)
    votes = _votes_to_credit(works[last], conditions)

    def publish() -> None:
        by_revision = write_revisions(works, found)
        _publish(works[last], {settings.overlap: found[last]}, votes, by_revision)

    processes.together(lambda: publish() if processes.is_first() else None)


def _votes_to_credit(work: Work, conditions: Sequence[Condition]) -> TextVotes | None:
    """The token memory's votes where --credit needs them; all processes read them together."""
    if CREDIT.value is None or TOKENS not in {condition.name for condition in conditions}:
        return None
    memory = memory_of(open_database(work.data, work.revision))
    return stored_votes(memory, work.split, work.text, work.folder)


def _publish(
    work: Work,
    by_overlap: Mapping[Any, Mapping[str, Any]],
    votes: TextVotes | None,
    by_revision: Mapping[str, Any] | None = None,
) -> None:
    """Writes every form of the results, then prints them: those of the largest overlap, then all."""
    name, results = work.split.name, list(by_overlap.values())[-1]
    scored = keep_scores(
        work.folder, results, split=work.split, text=work.text, lengths=work.lengths
    )
    results = with_intervals(results, scored)
    files.write_atomically(work.folder / f"{name}.json", files.to_json(results))
    lines, overlap, several = [format_table(results)], None, None
    neighbours = max(result["settings"]["neighbours"] for result in results.values())
    filled = work.split.slots_filled(neighbours)
    if filled is not None:
        lines.append(f"{neighbours} neighbours a chunk, {filled:.1%} of slots filled")
        warn_of_few(f"the {name} split", filled)
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
    law = write_size_law(work.folder, name, scored)
    lines += [f"\n{size_law.describe(law)}"] if law else []
    if CREDIT.value is not None:
        database = open_database(work.data, work.revision)
        told = write_credit(
            work.folder, database, work.split, work.text, results, votes, share=CREDIT.value
        )
        lines.append(f"\n{told}")
    costs = write_costs(work.folder, name, results)
    lines += [f"\n{costs.title}\n{as_text(costs)}"] if costs else []
    for table in revision_tables(by_revision) if by_revision else ():
        lines.append(f"\n{table.title}\n{as_text(table)}")
    published = evaluation_text(name).published
    text = markdown(results, overlap, several, published, by_revision, law)
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
        in_context=_numbers(IN_CONTEXTS, 1, 1000, whole=True),
    )
    needing = [name for name in [*names, *(c.name for c in swept)] if name != "off"]
    if needing and not (k and retro.model.has_retrieval):
        name = needing[0] if needing[0] in KINDS else "on"
        raise UserError(f"--retrieval={name}: {retro.directory} was trained without, expected off")
    conditions = [asked_condition(name, retro, k) for name in names]
    if TOKENS in names and IN_CONTEXT in names:
        conditions.append(Condition(f"context+{TOKENS}", retro, k, TOKENS))
    baseline = retro
    if trained_run.is_trained(workdir / _BASELINE):
        baseline = trained_run.open_run(workdir / _BASELINE, bindings, averaged=AVERAGED.value)
        conditions.append(Condition(_BASELINE, baseline, 0, _BASELINE))
        if TOKENS in names:
            conditions.append(Condition(f"{_BASELINE}+{TOKENS}", baseline, 0, TOKENS))
    by_token = [("knn", baseline, 0)] + ([("on+knn", retro, k)] if "on" in names else [])
    for name, run, neighbours in by_token if KNN.value else []:
        conditions.append(Condition(name, run, neighbours, "knn"))
        if TOKENS in names:
            conditions.append(Condition(f"{name}+{TOKENS}", run, neighbours, TOKENS))
    return conditions + swept


def _numbers(
    flag: flags.FlagHolder, low: float, high: float, *, whole: bool = False
) -> list[float]:
    """The values of a list of numbers, ascending.

    Raises:
      flags.Error: one of them is out of its range, or two are shown alike.
    """
    numbers: dict[str, float] = {}
    for value in flag.value:
        number = _number(value)
        if not low <= number <= high or (whole and number != int(number)):
            kind = "whole numbers" if whole else "numbers"
            raise flags.Error(f"--{flag.name}={value}: expected {kind} from {low:g} to {high:g}")
        if numbers.setdefault(f"{number:g}", number) != number:
            raise flags.Error(f"--{flag.name}={value}: expected other digits than {number:g}")
    return sorted(numbers.values())


def _number(value: str) -> float:
    """A number of a list; -1, which no list takes, for other text."""
    try:
        return float(value)
    except ValueError:
        return -1.0


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
