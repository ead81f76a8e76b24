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
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from data_pipelines import files
from data_pipelines.slices import SliceConfig
from data_pipelines.tokenizer import Tokenizer
from launch import app, configurables, runs, windows
from launch.arrays import write_array
from launch.conditions import (
    KINDS,
    Condition,
    check_split,
    condition_settings,
    neighbour_tokens,
    passes,
    swept_conditions,
)
from launch.intervals import share_with_interval, with_intervals
from launch.knn import KNN, knn_scoring, knn_settings
from launch.markdown import markdown
from launch.overlap import Scored, format_overlap, write_overlap
from launch.processes import join
from launch.scoring import Pass, Scorer, forget
from launch.shared_flags import AVERAGED, DATA, NUM_NEIGHBOURS, RETRIEVAL, SPLIT, data_directory
from launch.slices import prepare_slice, wanted_slices
from launch.splits import Split, open_split, places_of
from launch.tables import aligned, format_table
from launch.windows import overlaps, windows_of
from retro_jax.errors import UserError
from retro_jax.evaluate import metrics, score
from retro_jax.evaluate.report import condition_name
from retro_jax.evaluate.sweep import sweep_losses
from retro_jax.host_memory import keep_freed_memory
from retro_jax.model import Retro
from retro_jax.train import processes

MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", None, "Score only the first so many documents of each corpus.", lower_bound=1
)
HELP_ALSO = (
    "launch.conditions",
    "launch.knn",
    "launch.slices",
    "launch.windows",
    "launch.processes",
)

FOLDER = "evaluation"
_BASELINE = "baseline"
_ID_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class Work:
    """What is evaluated.

    Attributes:
      folder: W/evaluation. data: the directory of the prepared data. split: of it, or a slice.
      text: [n, 64] bool, the tokens of the split that count. lengths: [V] bytes of each token.
      scorer: what scores them. overlap: of its windows; None for the default.
    """

    folder: pathlib.Path
    data: pathlib.Path
    split: Split
    text: np.ndarray
    lengths: np.ndarray
    scorer: Scorer = dataclasses.field(default_factory=Scorer)
    overlap: float | None = None


def main() -> None:
    """Scores what is not scored yet, and prints the table."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    data = data_directory(DATA.value or workdir)
    runs.refuse_gin_file()
    join()
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
        runs.check_data(condition.run, data)
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
    return Work(workdir / FOLDER, data, split, split.text_mask(lengths), lengths)


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
        several = windows.compared(by_overlap)
        path = windows.windows_file(work.folder, name)
        files.write_atomically(path, files.to_json(several))
        for title, header, rows in windows.tables(several):
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
    retro = runs.open_run(workdir / "retro", bindings, averaged=AVERAGED.value)
    k = NUM_NEIGHBOURS.value or retro.batches.neighbours
    swept = swept_conditions(retro, k)
    needing = [name for name in [*wanted, *(c.name for c in swept)] if name != "off"]
    if needing and not (k and retro.model.has_retrieval):
        name = needing[0] if needing[0] in KINDS else "on"
        raise UserError(f"--retrieval={name}: {retro.directory} was trained without, expected off")
    conditions = [Condition(name, retro, k if name != "off" else 0, name) for name in wanted]
    if runs.is_trained(workdir / _BASELINE):
        baseline = runs.open_run(workdir / _BASELINE, bindings, averaged=AVERAGED.value)
        conditions.append(Condition(_BASELINE, baseline, 0, _BASELINE))
    if KNN.value:
        model = conditions[-1].run if conditions[-1].name == _BASELINE else retro
        conditions.append(Condition("knn", model, 0, "knn"))
    return conditions + swept


def evaluate(work: Work, conditions: Sequence[Condition]) -> dict[str, dict[str, Any]]:
    """The results of one pass by name: read where they are there already, else computed and written.

    Several processes compute together; the first one alone writes, and has what is returned.
    """
    folder, split = work.folder, work.split
    heads = {c.name: _head(work, c) for c in conditions}
    names = {
        c.name: f"{split.name}-{c.name}-{c.run.step:08d}-{_digest(heads[c.name])}"
        for c in conditions
    }
    there = processes.as_first([_is_there(folder, names[c.name]) for c in conditions])
    missing = [c for c, is_there in zip(conditions, there, strict=True) if not is_there]
    if missing:
        found, more = _score(work, missing)
        for condition, nll in zip(missing, found, strict=True):
            name = names[condition.name]
            result = heads[condition.name] | {"nll": f"{name}.npy", **figures(work, nll), **more}
            if split.name.startswith("lambada") and condition.kind not in ("knn", "k"):
                right = documents_right(work, condition)
                result["last_word_accuracy"] = share_with_interval(right)
            if processes.is_first():
                write_array(folder / f"{name}.npy", nll)
                files.write_atomically(folder / f"{name}.json", files.to_json(result))
    if not processes.is_first():
        return {}
    return {c.name: files.read_json(folder / f"{names[c.name]}.json") for c in conditions}


def _is_there(folder: pathlib.Path, name: str) -> bool:
    """Whether a condition has been scored."""
    return (folder / f"{name}.json").is_file() and (folder / f"{name}.npy").is_file()


def _head(work: Work, condition: Condition) -> dict[str, Any]:
    """What a result depends on."""
    split = work.split
    cut = windows_of(condition.run, work.overlap)
    return {
        "condition": condition.name,
        "settings": {
            "split": split.name,
            "window_chunks": cut.chunks,
            "stride_chunks": cut.stride,
            "neighbours": condition.neighbours,
            "max_documents": MAX_DOCUMENTS.value,
            "execution": dataclasses.asdict(condition.run.execution),
            **(knn_settings() if condition.kind == "knn" else condition_settings(condition)),
        },
        "model": condition.run.identity(),
        "manifests": split.hashes(bool(condition.neighbours)),
    }


def _digest(head: Mapping[str, Any]) -> str:
    """A few digits that differ where any of it does."""
    return hashlib.sha256(files.to_json(head)).hexdigest()[:_ID_DIGITS]


def documents_right(work: Work, condition: Condition) -> np.ndarray:
    """[D] bool: of which documents every scored token is the model's most likely one."""
    tokens = neighbour_tokens(work.split, condition, work.folder, work.data)
    text = dataclasses.replace(work.split.text(0), neighbours=tokens)
    digest = _digest({"hits": _head(work, condition)})
    cut = windows_of(condition.run, work.overlap)
    what = f"{condition_name(condition.name)}, last words"
    one = Pass(condition.run, score.token_hits, cut, what, work.folder / f".partial-{digest}")
    hits = work.scorer.nll(one, text)
    forget(one)
    return metrics.documents_hit(hits == 1, work.text, text.documents)


def _score(
    work: Work, conditions: Sequence[Condition]
) -> tuple[np.ndarray, dict[str, dict[str, Any]]]:
    """[len(conditions), n, 64] float32 nats, and what else is to be said of them."""
    folder, split = work.folder, work.split
    last = max(conditions, key=lambda c: c.neighbours)
    cut = windows_of(last.run, work.overlap)
    if last.kind == "knn":
        scoring = knn_scoring(last.run, cut, work.scorer, data=work.data, folder=folder)
        nll, facts = scoring.score(split, work.text)
        return nll[None], {"knn": facts}
    sweep = last.kind == "k"
    losses = sweep_losses([c.neighbours for c in conditions]) if sweep else Retro.token_losses
    tokens = neighbour_tokens(split, last, folder, work.data)
    text = dataclasses.replace(split.text(0), neighbours=tokens)
    partial = folder / f".partial-{_digest({c.name: _head(work, c) for c in conditions})}"
    what = "k sweep" if sweep else condition_name(last.name)
    one = Pass(last.run, losses, cut, what, partial)
    nll = work.scorer.nll(one, text)
    forget(one)
    return (nll if sweep else nll[None]), {}


def figures(work: Work, nll: np.ndarray) -> dict[str, Any]:
    """Sums and figures of scored chunks: by corpus, and of all."""
    database, ids = work.split.database, work.split.ids
    scores = metrics.measure(
        nll,
        database.chunks(ids),
        database.documents(ids),
        records=work.split.records(),
        eos_id=database.eos_id,
        pad_id=database.pad_id,
        text=work.text,
    )
    by_corpus = {name: _plain(result) for name, result in scores.items()}
    return {"corpora": by_corpus, "all": _plain(metrics.total(scores.values()))}


def _plain(result: metrics.Score) -> dict[str, float | None]:
    """A Score for JSON, which has no NaN."""
    return {name: v if math.isfinite(v) else None for name, v in result.to_dict().items()}


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
