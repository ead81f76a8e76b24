"""The result of an evaluation as Markdown: tables, the paper's beside them, settings and hashes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch import windows
from launch.beside import beside_paper
from launch.intervals import interval_tables, shown
from launch.tables import table_scores
from retro_jax.evaluate.report import (
    SHOWN_OVERLAP,
    SWEPT_NAMES,
    condition_name,
    condition_order,
    score_rows,
    swept,
)


def markdown(
    results: Mapping[str, Any],
    overlap: Mapping[str, Any] | None,
    several: Mapping[str, Any] | None = None,
) -> str:
    """The whole file.

    Args:
      results: by condition, of launch.evaluate. overlap: what write_overlap found, if anything.
      several: what windows.compared found, where windows of several overlaps were scored.
    """
    split = next(iter(results.values()))["settings"]["split"]
    parts = [f"# Evaluation: {split}", *_figures(results)]
    for title, header, rows in windows.tables(several) if several else ():
        parts += [f"{title}:", markdown_table(header, rows)]
    beside = beside_paper(results)
    if beside:
        parts += [f"## {beside.title}", beside.caption, markdown_table(beside.header, beside.rows)]
    for view in interval_tables(results):
        parts += [f"## {view.title}", view.caption, markdown_table(view.header, view.rows)]
    if overlap:
        parts += [*_intervals(overlap)]
    parts += ["## How this was made", *_settings(results)]
    return "\n\n".join(parts) + "\n"


def _figures(results: Mapping[str, Any]) -> Iterator[str]:
    """Bits per byte and perplexity by word, and the tables of what varies RETRO[ON]."""
    main = table_scores({name: results[name] for name in swept(results)})
    for figure, title, digits in (
        ("bits_per_byte", "Bits per byte", 4),
        ("word_perplexity", "Perplexity by word", 2),
    ):
        yield f"## {title}"
        yield markdown_table(*score_rows(main, figure, digits)[:2])
    for kind in SWEPT_NAMES:
        names = swept(results, kind)
        if names:
            scores = table_scores({name: results[name] for name in names})
            yield markdown_table(*score_rows(scores, "bits_per_byte", 4)[:2])
    hits = {n: r["last_word_accuracy"] for n, r in results.items() if "last_word_accuracy" in r}
    if hits:
        yield "## Accuracy of the last word"
        yield markdown_table(
            [*map(condition_name, hits)], [[shown(value, "") for value in hits.values()]]
        )


def _intervals(overlap: Mapping[str, Any]) -> Iterator[str]:
    """Every figure with its interval: among all chunks and among those of little overlap."""
    yield "## By overlap with the training data"
    yield (
        f"r(C): the longest run of tokens shared with one of the {overlap['neighbours']} nearest "
        f"training neighbours, over {overlap['chunk_length']}. In brackets: {overlap['interval']}."
    )
    names = sorted(overlap["rows"][0]["bits_per_byte"], key=condition_order)
    rows = [row for row in overlap["rows"] if row["at_most"] in (SHOWN_OVERLAP, 1.0)]
    pairs = list(rows[0]["differences"])
    header = ["corpus", "r(C)", "chunks", *map(condition_name, names)]
    header += [" - ".join(map(condition_name, pair.split("-"))) for pair in pairs]
    yield markdown_table(
        header,
        [
            [
                row["corpus"] or "all",
                f"<= {row['at_most']:.0%}",
                f"{row['chunks']:,}",
                *(shown(row["bits_per_byte"][name], "") for name in names),
                *(shown(row["differences"][pair], "+") for pair in pairs),
            ]
            for row in rows
        ],
    )


def _settings(results: Mapping[str, Any]) -> Iterator[str]:
    """Model, settings and hashes of each condition."""
    rows = []
    for name in sorted(results, key=condition_order):
        result = results[name]
        settings, model = result["settings"], result["model"]
        rows.append(
            [
                condition_name(name),
                f"{model['run']} step {model['step']:,} ({model['checkpoint'][:12]})",
                str(settings["neighbours"]),
                f"{settings['window_chunks']} / {settings['stride_chunks']}",
                ", ".join(f"{kind} {hash[:12]}" for kind, hash in result["manifests"].items()),
            ]
        )
    yield markdown_table(
        ["condition", "model", "neighbours", "window / stride, chunks", "data"], rows
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
