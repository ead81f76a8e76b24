"""Scores texts: bits per byte of the baseline, RETRO[OFF], RETRO[ON] and more, by corpus.

    python -m launch.evaluate --workdir=W
    python -m launch.evaluate --workdir=W --retrieval=on,off,random,oracle --sweep=1,2,5,10 --knn
    python -m launch.evaluate --workdir=W --slices=wikitext103 --slice_paths=wikitext103=wiki.test.tokens

Reads the newest checkpoint of W/retro, and of W/baseline where one was trained. Every token is scored
once, in windows of the trained length that advance by half of it. docs/evaluation.md says what each
condition and figure is. Writes, in W/evaluation:

    SPLIT.json, SPLIT.md           what was printed last, with every sum and figure
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
from data_pipelines.evaluation.texts import SliceConfig
from launch.common import app, configurables
from launch.common.flags import (
    AVERAGED,
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
    Condition,
    check_split,
    passes,
    swept_conditions,
)
from launch.evaluation.figures import Scored, with_intervals, write_overlap
from launch.evaluation.knn import KNN
from launch.evaluation.results import Work, evaluate
from launch.runs import trained_run
from launch.slices import wanted_slices
from launch.windows import overlaps, windows_of
from retro_jax.distributed import processes
from retro_jax.errors import UserError
from retro_jax.evaluate.scorer import Scorer
from retro_jax.host_memory import keep_freed_memory
from retro_jax.report import tables
from retro_jax.report.tables import aligned, format_overlap, format_table, markdown
from retro_jax.storage import files

MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", None, "Score only the first so many documents of each corpus.", lower_bound=1
)
HELP_ALSO = (
    "launch.evaluation.conditions",
    "launch.evaluation.knn",
    "launch.slices",
    "launch.windows",
)

FOLDER = "evaluation"
_BASELINE = "baseline"


def main() -> None:
    """Scores what is not scored yet, and prints the table."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    data = data_directory(DATA.value or workdir)
    trained_run.refuse_gin_file()
    join_processes(
        COORDINATOR_ADDRESS.value,
        NUM_PROCESSES.value,
        PROCESS_ID.value,
        peer_timeout=PEER_TIMEOUT.value,
    )
    conditions = processes.together(lambda: _checked_conditions(workdir, data))
    scorer = Scorer()
    with processes.noticing_loss():
        names = [_prepared(data, config) for config in wanted_slices(MAX_DOCUMENTS.value)]
        for number, name in enumerate(names or [SPLIT.value]):
            opening = functools.partial(_open, workdir, data, name, conditions)
            work = processes.together(opening)
            if number:
                _say("")
            _evaluate_all(dataclasses.replace(work, scorer=scorer), conditions)


def _checked_conditions(workdir: pathlib.Path, data: pathlib.Path) -> list[Condition]:
    """What the flags ask for, of runs that belong to the data."""
    conditions = _conditions(workdir, _wanted(RETRIEVAL.value))
    for condition in conditions:
        trained_run.check_data(condition.run, data)
        for overlap in overlaps():
            windows_of(condition.run, overlap)  # is refused now, not after hours
    return conditions


def _prepared(data: pathlib.Path, config: SliceConfig) -> str:
    """The name of a slice, which the first process has prepared at need."""
    return processes.from_first(lambda: prepare_slice(data, config))


def _open(
    workdir: pathlib.Path, data: pathlib.Path, name: str, conditions: Sequence[Condition]
) -> Work:
    """A split or slice with what the conditions read of it."""
    most = max(condition.neighbours for condition in conditions)
    if places_of(data, name).neighbours.is_dir():
        most = max(most, 1)  # the table is wanted for r(C) also where no condition reads it
    split = open_split(data, name, neighbours=most, max_documents=MAX_DOCUMENTS.value)
    check_split(split, conditions)
    lengths = Tokenizer.open(data / "tokenizer").byte_lengths
    text = split.text_mask(lengths)
    return Work(workdir / FOLDER, data, split, text, lengths, max_documents=MAX_DOCUMENTS.value)


def _say(text: str) -> None:
    """Prints a line, in the first process only."""
    if processes.is_first():
        print(text)


def _evaluate_all(work: Work, conditions: Sequence[Condition]) -> None:
    """Scores a split under all conditions; the first process writes and prints every form of it."""
    by_overlap: dict[float | None, dict[str, Any]] = {}
    for overlap in overlaps():
        results: dict[str, Any] = {}
        for together in passes(conditions):
            results |= evaluate(dataclasses.replace(work, overlap=overlap), together)
        by_overlap[overlap] = results
    processes.together(lambda: _publish(work, by_overlap) if processes.is_first() else None)


def _publish(work: Work, by_overlap: Mapping[Any, Mapping[str, Any]]) -> None:
    """Writes every form of the results, then prints them: those of the largest overlap, then all."""
    name, results = work.split.name, list(by_overlap.values())[-1]
    scored = Scored(work.folder, work.split, work.text, work.lengths, results)
    results = with_intervals(scored)
    files.write_atomically(work.folder / f"{name}.json", files.to_json(results))
    told, overlap, several = [format_table(results)], None, None
    if work.split.table is None:
        told.append(f"no figures by overlap: {work.data} has no neighbours of the {name} split")
    else:
        overlap = write_overlap(scored)
        told.append(f"\n{format_overlap(overlap)}")
    if len(by_overlap) > 1:
        several = tables.compared(by_overlap)
        path = tables.windows_file(work.folder, name)
        files.write_atomically(path, files.to_json(several))
        for title, header, rows in tables.tables(several):
            told.append(f"\n{title}\n{aligned(header, rows)}")
    text = markdown(results, overlap, several)
    files.write_atomically(work.folder / f"{name}.md", text.encode())
    print("\n".join(told))


def _wanted(names: Sequence[str] | None) -> list[str]:
    """The checked values of --retrieval, in their order of computation; on and off by default."""
    if names is None:
        return ["on", "off"]
    if not names or set(names) - set(KINDS):
        raise flags.Error(f"--retrieval={','.join(names)}: expected some of {', '.join(KINDS)}")
    return [name for name in KINDS if name in names]


def _conditions(workdir: pathlib.Path, wanted: Sequence[str]) -> list[Condition]:
    """The columns, each with the run that it is of."""
    bindings = configurables.GIN_BINDINGS.value
    retro = trained_run.open_run(workdir / "retro", bindings, averaged=AVERAGED.value)
    k = NUM_NEIGHBOURS.value or retro.batches.neighbours
    swept = swept_conditions(retro, k)
    needing = [name for name in [*wanted, *(c.name for c in swept)] if name != "off"]
    if needing and not (k and retro.model.has_retrieval):
        name = needing[0] if needing[0] in KINDS else "on"
        raise UserError(f"--retrieval={name}: {retro.directory} was trained without, expected off")
    conditions = [Condition(name, retro, k if name != "off" else 0, name) for name in wanted]
    if trained_run.is_trained(workdir / _BASELINE):
        baseline = trained_run.open_run(workdir / _BASELINE, bindings, averaged=AVERAGED.value)
        conditions.append(Condition(_BASELINE, baseline, 0, _BASELINE))
    if KNN.value:
        model = conditions[-1].run if conditions[-1].name == _BASELINE else retro
        conditions.append(Condition("knn", model, 0, "knn"))
    return conditions + swept


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
