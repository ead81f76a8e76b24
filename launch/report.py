"""Writes W/report.html: figures, loss curves, the effect of retrieval, and samples, on one page.

    python -m launch.report --workdir=W
    python -m launch.report --workdir=W --split=validation --title="My first RETRO"

Shows the results of launch.evaluate and launch.sample in W; the page loads nothing from elsewhere.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.sample import sampled
from data_pipelines.evaluation.sampled_text import shown_settings
from data_pipelines.evaluation.splits import Split, open_split, token_counts
from data_pipelines.evaluation.text_view import Viewer, chunk_views, sample_chunk_from_json
from data_pipelines.evaluation.texts import evaluation_text
from data_pipelines.retriever.revisions import open_database
from launch.common import app, workdirs
from launch.common.flags import DATA, SPLIT
from launch.runs import trained_run
from retro_jax.errors import UserError
from retro_jax.evaluate.conditions import swept
from retro_jax.evaluate.scored_text import TokenGains, token_gains
from retro_jax.report import charts
from retro_jax.report.cost_view import cost_chart, cost_table
from retro_jax.report.evaluation_tables import (
    comparisons,
    curves,
    interval_tables,
    table_scores,
    window_tables,
)
from retro_jax.report.html import render
from retro_jax.report.published import beside_paper
from retro_jax.report.result_files import (
    EVALUATION,
    SAMPLE_FIELDS,
    SAMPLES,
    overlap_files,
    read_comparisons,
    read_figures,
    read_losses,
    read_results,
    revisions_file,
    windows_file,
)
from retro_jax.report.revision_view import revision_tables
from retro_jax.report.views import ChartView, ChunkView, Curve, Report, SampleView, Table
from retro_jax.storage import files
from retro_jax.train.curves import METRICS_FILE, read_curve

WITHOUT_SETTINGS = True
TITLE = flags.DEFINE_string("title", "RETRO: a report", "The page's heading.")

FILE = "report.html"
_RUNS = {"retro": "RETRO", "baseline": "baseline"}
_SHOWN_CORPORA, _SHOWN_SAMPLES = 4, 6


def main() -> None:
    """Writes the page."""
    workdir, data = workdirs.open_to_read(DATA)
    folder = workdir / EVALUATION
    results = read_results(folder, SPLIT.value)
    run = trained_run.open_run(workdir / "retro")
    trained_run.check_data(run, data)
    scored = _read_gains(folder, data, results)
    several = read_figures(windows_file(folder, SPLIT.value), results)
    overlap = read_figures(overlap_files(folder, SPLIT.value).json, results)
    report = Report(
        title=TITLE.value,
        summary=_summary(run, results),
        facts=list(_facts(data, run, results)),
        scores=table_scores({name: results[name] for name in swept(results)}),
        curves=list(_curves(workdir)),
        chunks=_chunks(data, results, *scored) if scored else [],
        samples=list(_samples(workdir / SAMPLES, run)),
        charts=[*charts.window_charts(several), *_charts(results, scored)],
        tables=list(_tables(folder, results, SPLIT.value, several)),
        overlap=curves(overlap["rows"]) if overlap else {},
    )
    files.write_atomically(workdir / FILE, render(report).encode())
    print(f"written to {workdir / FILE}")


def _summary(run: trained_run.Run, results: Mapping[str, Any]) -> str:
    """One sentence on the evaluated text."""
    result = results.get("on", next(iter(results.values())))
    scored, settings = result["all"], result["settings"]
    whole = settings["max_documents"] is None and "sample_chunks" not in settings
    part = "" if whole else "a part of "
    return (
        f"A RETRO of {run.model.num_parameters() / 1e6:.1f}M parameters after {result['model']['step']:,} steps, on "
        f"{part}the {settings['split']} split: {scored['documents']:,} documents, "
        f"{scored['tokens']:,} tokens, {scored['bytes']:,} bytes."
    )


def _facts(
    data: pathlib.Path, run: trained_run.Run, results: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The facts that one needs to judge the figures."""
    model, database = run.model, open_database(data)
    yield (
        "model",
        (
            f"{model.num_layers} layers of width {model.d_model}, CCA in {', '.join(map(str, model.cca_layers))}; "
            f"baseline {model.baseline().num_parameters() / 1e6:.1f}M parameters"
        ),
    )
    yield (
        "training",
        f"sequences of {run.batches.sequence_length} tokens, {run.batches.batch_size} a step",
    )
    chunks = sum(len(part) for ranges in database.corpora.values() for part in ranges)
    documents, revision = database.num_documents - len(database.removed), database.manifest.revision
    since = f", revision {revision}" if revision else ""
    yield "database", f"{chunks:,} chunks of {documents:,} training documents{since}"
    for name, result in results.items():
        settings = result["settings"]
        yield (
            name,
            (
                f"{result['model']['run']} at step {result['model']['step']:,}, {settings['neighbours']} "
                f"neighbours, windows of {settings['window_chunks']} chunks, stride {settings['stride_chunks']}"
            ),
        )


def _tables(
    folder: pathlib.Path, results: Mapping[str, Any], split: str, several: Mapping[str, Any] | None
) -> Iterator[Table]:
    """The paper's figures, how sure ours are, paired tests, several overlaps of windows, revisions."""
    beside = beside_paper(results, evaluation_text(split).published)
    if beside:
        yield beside
    costs = cost_table(results)
    yield from [costs] if costs else []
    if all("intervals" in result["all"] for result in results.values()):
        yield from interval_tables(results)
    compared = read_comparisons(folder, split, results)
    if compared:
        yield comparisons(compared)
    yield from window_tables(several) if several else ()
    by_revision = read_figures(revisions_file(folder, split), results)
    yield from revision_tables(by_revision) if by_revision else ()


def _curves(workdir: pathlib.Path) -> Iterator[Curve]:
    """The training loss of the runs that are there."""
    for folder, name in _RUNS.items():
        lines = [line for line in read_curve(workdir / folder / METRICS_FILE) if "loss" in line]
        if lines:
            seen = np.cumsum([line["tokens"] for line in lines])
            if "goodput" in lines[-1]:
                name = f"{name} (goodput {lines[-1]['goodput']:.0%})"
            yield Curve(name, seen.tolist(), [line["loss"] for line in lines])


def _charts(
    results: Mapping[str, Any], scored: tuple[Split, TokenGains] | None
) -> Iterator[ChartView]:
    """The gains of retrieval by the properties that they may depend on."""
    chart = cost_chart(results)
    yield from [chart] if chart else []
    yield from charts.sweep_charts(results)
    if scored:
        split, gains = scored
        yield charts.place_chart(gains.gains, gains.counted)
        if split.retrieval is not None:
            tokens, times = split.database.chunks(split.ids), token_counts(split.retrieval)
            yield charts.frequency_chart(gains.gains, gains.counted, tokens, times)


def _chunks(
    data: pathlib.Path, results: Mapping[str, Any], split: Split, gains: TokenGains
) -> list[ChunkView]:
    """Chunks of the largest corpora."""
    corpora = results["on"]["corpora"]
    largest = sorted(corpora, key=lambda name: -corpora[name]["tokens"])[:_SHOWN_CORPORA]
    assert split.retrieval is not None
    viewer = Viewer(Tokenizer.open(data / "tokenizer"), split.retrieval)
    k = results["on"]["settings"]["neighbours"]
    return chunk_views(
        split,
        viewer,
        sorted(largest),
        k=k,
        gains=gains.gains,
        counted=gains.counted,
        bits=gains.bits,
    )


def _read_gains(
    folder: pathlib.Path, data: pathlib.Path, results: Mapping[str, Any]
) -> tuple[Split, TokenGains] | None:
    """The gains of every token, from the arrays that launch.evaluate left of ON and OFF.

    None where either is missing, and, with a line about it, where the data does not have what was scored.
    """
    if not {"on", "off"} <= set(results):
        return None
    settings = results["on"]["settings"]
    name, k, most = (settings[field] for field in ("split", "neighbours", "max_documents"))
    tokenizer = Tokenizer.open(data / "tokenizer")
    try:
        split = open_split(data, name, neighbours=k, max_documents=most)
    except UserError as error:
        print(f"no parts by chunk: {error}")
        return None
    if split.hashes(True) != results["on"]["manifests"]:
        print(f"no parts by chunk: {folder} is of another revision or other chunks than {data}")
        return None
    if "sample_chunks" in settings:
        split = sampled(split, settings["sample_chunks"], tokenizer)
    on, off = (read_losses(folder, results[name]) for name in ("on", "off"))
    if on.shape != off.shape or len(on) != len(split.ids):
        raise UserError(
            f"{folder}: losses of {len(on)} and {len(off)} chunks, expected {len(split.ids)}"
        )
    counted = split.text_mask(tokenizer.byte_lengths)
    return split, token_gains(on, off, counted)


def _samples(folder: pathlib.Path, run: trained_run.Run) -> Iterator[SampleView]:
    """Samples of this checkpoint, in the order in which they were made."""
    paths = sorted(
        files.matching(folder, "*.json"), key=lambda path: (path.stat().st_mtime, path.name)
    )
    results = [files.read_json(path, *SAMPLE_FIELDS) for path in paths]
    matches = [result for result in results if result["model"] == run.identity()]
    pairs = [(result, sample) for result in matches for sample in result["samples"]]
    for number, (result, sample) in enumerate(pairs[-_SHOWN_SAMPLES:], 1):
        made = shown_settings(result["sampling"])
        retrieval = (
            f"{result['neighbours']} neighbours" if result["neighbours"] else "retrieval off"
        )
        yield SampleView(
            heading=f"Sample {number}",
            settings=f"{made}, {retrieval}",
            chunks=[sample_chunk_from_json(fields) for fields in sample["chunks"]],
        )


if __name__ == "__main__":
    app.run(main)
