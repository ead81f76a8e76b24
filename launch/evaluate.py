"""Scores a split: bits per byte of the baseline, RETRO[OFF] and RETRO[ON], by corpus.

    python -m launch.evaluate --workdir=W
    python -m launch.evaluate --workdir=W --split=validation --retrieval=on --max_documents=100

Reads the newest checkpoint of W/retro, and of W/baseline where one was trained. Every token is scored
once, in windows of the trained length that advance by half of it. Writes, in W/evaluation:

    SPLIT.json                     what was printed last, with every sum and figure
    SPLIT-overlap.json .csv .svg   the same figures by overlap with the training data, r(C) <= alpha
    SPLIT-CONDITION-STEP-ID.json   one condition of one checkpoint; found again, it is reused
    SPLIT-CONDITION-STEP-ID.npy    [chunks, 64] float32, the loss in nats of each token
"""

import dataclasses
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from data_pipelines import files
from launch import app, configurables, runs
from launch.overlap import format_overlap, write_array, write_overlap
from launch.progress import progress_bar
from launch.shared_flags import DATA, NUM_NEIGHBOURS, RETRIEVAL, SPLIT
from launch.splits import Split, open_split
from retro_jax.errors import UserError
from retro_jax.evaluate import metrics, score
from retro_jax.evaluate.report import CONDITION_NAMES, score_rows
from retro_jax.sharding import batch_sharding, make_mesh

MAX_DOCUMENTS = flags.DEFINE_integer(
    "max_documents", None, "Score only the first so many documents of each corpus.", lower_bound=1
)
STRIDE = flags.DEFINE_integer(
    "stride_chunks",
    None,
    "Chunks that windows advance by (half the trained length).",
    lower_bound=1,
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Windows at once, rounded up to a multiple of the devices.", lower_bound=1
)

FOLDER = "evaluation"
_CONDITIONS = ("on", "off")
_BASELINE = "baseline"
_ID_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class Condition:
    """A column of the table: its name (of CONDITION_NAMES), its run, and neighbours a chunk."""

    name: str
    run: runs.Run
    neighbours: int


def main() -> None:
    """Scores what is not scored yet, and prints the table."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    data = pathlib.Path(DATA.value or workdir)
    runs.refuse_gin_file()
    conditions = _conditions(workdir, _wanted(RETRIEVAL.value))
    for condition in conditions:
        runs.check_data(condition.run, data)
    most = max(condition.neighbours for condition in conditions)
    has_table = (data / "neighbours" / SPLIT.value).is_dir()
    most = max(most, int(has_table))
    split = open_split(data, SPLIT.value, neighbours=most, max_documents=MAX_DOCUMENTS.value)
    folder = workdir / FOLDER
    results = {c.name: evaluate(folder, split, c) for c in conditions}
    files.write_atomically(folder / f"{SPLIT.value}.json", files.to_json(results))
    print(format_table(results))
    if split.table is None:
        print(f"no figures by overlap: {data} has no neighbours of the {SPLIT.value} split")
        return
    overlap = write_overlap(folder, SPLIT.value, split, results, data)
    print(f"\n{format_overlap(overlap)}")


def _wanted(names: Sequence[str] | None) -> list[str]:
    """The checked values of --retrieval, in their order of computation; both by default."""
    if names is None:
        return list(_CONDITIONS)
    if not names or set(names) - set(_CONDITIONS):
        raise flags.Error(f"--retrieval={','.join(names)}: expected on, off or on,off")
    return [name for name in _CONDITIONS if name in names]


def _conditions(workdir: pathlib.Path, wanted: Sequence[str]) -> list[Condition]:
    """The columns, each with the run that it is of."""
    bindings = configurables.GIN_BINDINGS.value
    retro = runs.open_run(workdir / "retro", bindings)
    k = NUM_NEIGHBOURS.value or retro.batches.neighbours
    if "on" in wanted and not (k and retro.model.has_retrieval):
        raise UserError(f"--retrieval=on: {retro.directory} was trained without, expected off")
    conditions = [Condition(name, retro, k if name == "on" else 0) for name in wanted]
    if runs.is_trained(workdir / _BASELINE):
        conditions.append(Condition(_BASELINE, runs.open_run(workdir / _BASELINE, bindings), 0))
    return conditions


def evaluate(folder: pathlib.Path, split: Split, condition: Condition) -> dict[str, Any]:
    """The result of one condition: read where it is there already, else computed and written."""
    windows = _windows(condition.run)
    result: dict[str, Any] = {
        "condition": condition.name,
        "settings": {
            "split": SPLIT.value,
            "window_chunks": windows.chunks,
            "stride_chunks": windows.stride,
            "neighbours": condition.neighbours,
            "max_documents": MAX_DOCUMENTS.value,
            "execution": dataclasses.asdict(condition.run.execution),
        },
        "model": condition.run.identity(),
        "manifests": split.hashes(bool(condition.neighbours)),
    }
    digest = hashlib.sha256(files.to_json(result)).hexdigest()[:_ID_DIGITS]
    name = f"{SPLIT.value}-{condition.name}-{condition.run.step:08d}-{digest}"
    record, array = folder / f"{name}.json", folder / f"{name}.npy"
    if record.is_file() and array.is_file():
        return files.read_json(record)
    nll = _score(split, condition, windows)
    result |= {"nll": array.name, **figures(split, nll)}
    write_array(array, nll)
    files.write_atomically(record, files.to_json(result))
    return result


def _windows(run: runs.Run) -> score.WindowConfig:
    """Windows of the trained length."""
    stride = STRIDE.value or max(1, run.chunks // 2)
    if stride > run.chunks:
        raise flags.Error(
            f"--stride_chunks={stride}: expected at most {run.chunks}, the trained length"
        )
    return score.WindowConfig(chunks=run.chunks, stride=stride, batch_size=BATCH_SIZE.value)


def _score(split: Split, condition: Condition, windows: score.WindowConfig) -> np.ndarray:
    """[n, 64] float32: the model over all windows, batches spread over all devices."""
    mesh = make_mesh(condition.run.mesh)
    rows = batch_sharding(mesh)
    divisor = mesh.size // rows.shard_shape((mesh.size,))[0]
    size = -(-windows.batch_size // divisor) * divisor
    windows = dataclasses.replace(windows, batch_size=size)
    count = len(score.windows(len(split.ids), windows.chunks, windows.stride))
    bar = progress_bar(count, CONDITION_NAMES[condition.name], "window")
    with jax.set_mesh(mesh), bar:
        losses = score.compiled_token_losses(
            *runs.load_model(condition.run, mesh), place=lambda batch: jax.device_put(batch, rows)
        )
        text = split.text(condition.neighbours)
        nll = score.score_chunks(losses, text, windows, on_windows=bar.update)
    bad = int(np.count_nonzero(~np.isfinite(nll)))
    if bad:
        raise UserError(f"{condition.run.directory}: the loss of {bad} tokens is not finite")
    return nll


def figures(split: Split, nll: np.ndarray) -> dict[str, Any]:
    """Sums and figures of scored chunks: by corpus, and of all."""
    owners = split.database.documents(split.ids)
    scores = metrics.measure(
        nll,
        split.database.chunks(split.ids),
        owners,
        records={int(d): split.database.record(int(d)) for d in np.unique(owners)},
        eos_id=split.database.eos_id,
        pad_id=split.database.pad_id,
    )
    by_corpus = {name: _plain(result) for name, result in scores.items()}
    return {"corpora": by_corpus, "all": _plain(metrics.total(scores.values()))}


def _plain(result: metrics.Score) -> dict[str, float | None]:
    """A Score for JSON, which has no NaN."""
    return {name: v if math.isfinite(v) else None for name, v in result.to_dict().items()}


def table_scores(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Results as the report and its tables take them: condition -> corpus ("" for all) -> figures."""
    return {name: {**result["corpora"], "": result["all"]} for name, result in results.items()}


def format_table(results: Mapping[str, Any]) -> str:
    """Bits per byte as text, one row a corpus."""
    header, rows, _ = score_rows(table_scores(results), "bits_per_byte", 4)
    lines = [["bits per byte", *header[1:]], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([f"{line[0]:<{widths[0]}}", *cells])

    steps = {CONDITION_NAMES[name]: result["model"]["step"] for name, result in results.items()}
    told = ", ".join(f"{name} at step {step:,}" for name, step in steps.items())
    count = next(iter(results.values()))["all"]
    size = f"{count['documents']:,} documents, {count['tokens']:,} tokens, {count['bytes']:,} bytes"
    split = next(iter(results.values()))["settings"]["split"]
    return "\n".join([*map(show, lines), f"({split}: {size}; {told})"])


if __name__ == "__main__":
    app.run(main)
