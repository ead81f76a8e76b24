"""The tables of an evaluation: for the terminal, its Markdown file and the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retro_jax.evaluate.conditions import (
    SHOWN_OVERLAP,
    SWEPT_NAMES,
    condition_name,
    condition_order,
    swept,
)
from retro_jax.evaluate.size_law import describe
from retro_jax.report.cost_view import cost_table
from retro_jax.report.published import beside_paper
from retro_jax.report.revision_view import revision_tables
from retro_jax.report.tables import as_markdown, as_text, interval, section
from retro_jax.report.views import OverlapPoint, PublishedFigures, Table

ABOUT = "95%, percentiles of 1,000 bootstrap resamples of the documents"
FIGURES = {"word_perplexity": ("Perplexity by word", 2), "bits_per_byte": ("Bits per byte", 4)}


def table_scores(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Results as the report and its tables take them: condition -> corpus ("" for all) -> figures."""
    return {name: {**result["corpora"], "": result["all"]} for name, result in results.items()}


def score_table(
    scores: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    figure: str,
    digits: int,
    label: str = "corpus",
) -> Table:
    """A table of one figure: a row per corpus, the last is all; "none" of no bytes or words.

    Args:
      scores: condition -> corpus ("" for all) -> figures. figure, digits: which one, and how exact.
      label: of the first column.
    """
    conditions = sorted(scores, key=condition_order)
    corpora = sorted({corpus for by_corpus in scores.values() for corpus in by_corpus if corpus})
    header = [label, *map(condition_name, conditions)]
    pair = "on" in scores and "off" in scores
    header += ["ON vs OFF"] if pair else []
    rows, best = [], []
    for corpus in [*corpora, ""]:
        values = [scores[name][corpus][figure] for name in conditions]
        row = [corpus or "all", *("none" if v is None else f"{v:.{digits}f}" for v in values)]
        if pair:
            on, off = scores["on"][corpus][figure], scores["off"][corpus][figure]
            row.append(f"{100 * (on / off - 1):+.2f}%" if off and on is not None else "")
        rows.append(row)
        known = [value for value in values if value is not None]
        best.append(1 + values.index(min(known)) if known and len(values) > 1 else None)
    return Table(header, rows, best=best, total=True)


def format_table(results: Mapping[str, Any]) -> str:
    """Bits per byte as text, one row per corpus; variations of RETRO[ON] in separate tables."""
    main = {name: results[name] for name in swept(results)}
    tables = [_aligned(main)]
    for kind in SWEPT_NAMES:
        names = swept(results, kind)
        tables += [_aligned({name: results[name] for name in names})] if names else []
    steps = {condition_name(name): result["model"]["step"] for name, result in main.items()}
    checkpoints = ", ".join(f"{name} at step {step:,}" for name, step in steps.items())
    count = next(iter(main.values()))["all"]
    size = f"{count['documents']:,} documents, {count['tokens']:,} tokens, {count['bytes']:,} bytes"
    split = next(iter(main.values()))["settings"]["split"]
    note = tuning_note(results)
    return "\n".join([*tables, f"({split}: {size}; {checkpoints})", *([note] if note else [])])


def tuning_note(results: Mapping[str, Any]) -> str:
    """A sentence where mixtures were tuned on the scored text, as on validation; "" elsewhere."""
    on_validation = next(iter(results.values()))["settings"]["split"] == "validation"
    if not on_validation or not any("tokens" in name or "knn" in name for name in results):
        return ""
    return "Mixtures were tuned on this very text: their figures are too good."


def _aligned(results: Mapping[str, Any]) -> str:
    """One table of bits per byte."""
    return as_text(score_table(table_scores(results), "bits_per_byte", 4, "bits per byte"))


def comparisons(found: Sequence[Mapping[str, Any]]) -> Table:
    """Comparisons as a table, a row each."""
    header = ["", "bits per byte", "the other's", "difference", "p", "better on"]
    rows = []
    for each in found:
        one, other = map(condition_name, each["conditions"])
        figures = [f"{value:.4f}" for value in each["bits_per_byte"]]
        rows.append(
            [
                f"{one} against {each['other']}, {other}",
                *figures,
                interval(each["difference"], "+"),
                f"{each['p_value']:.4f}",
                f"{each['better_documents']:,} of {each['documents']:,} documents",
            ]
        )
    caption = (
        "In brackets: 95% of 10,000 bootstrap resamples of the documents. p: paired test by random signs of "
        "the documents' differences."
    )
    return Table(header, rows, "Compared with another model", caption)


def interval_tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Every figure with its interval: all corpora together, then bits per byte of each."""
    caption = f"In brackets: {ABOUT}. {tuning_note(results)}".rstrip()
    names = sorted(results, key=condition_order)
    rows = []
    for name in names:
        each = results[name]["all"]["intervals"]
        figures = [(each["bits_per_byte"], 4), (each["word_perplexity"], 2)]
        rows.append([condition_name(name), *(interval(f, "", digits) for f, digits in figures)])
    rows += [[label, cell, ""] for label, cell in _differences(results, names, "")]
    header = ["", "bits per byte", "perplexity by word"]
    yield Table(header, rows, "How sure these figures are", caption)
    corpora = sorted({corpus for result in results.values() for corpus in result["corpora"]})
    if len(corpora) < 2:
        return
    columns = [
        [
            *(
                [condition_name(n), interval(_of(results[n], c)["intervals"]["bits_per_byte"])]
                for n in names
            ),
            *_differences(results, names, c),
        ]
        for c in corpora
    ]
    rows = [[row[0][0], *(cell for _, cell in row)] for row in zip(*columns, strict=True)]
    yield Table(["", *corpora], rows, "By corpus: bits per byte", caption)


def _differences(results: Mapping[str, Any], names: Sequence[str], corpus: str) -> list[list[str]]:
    """Labels and cells of the differences, in bits per byte."""
    return [
        [f"{condition_name(name)} - {condition_name(other)}", interval(difference, "+")]
        for name in names
        for other, difference in _of(results[name], corpus).get("differences", {}).items()
    ]


def _of(result: Mapping[str, Any], corpus: str) -> Mapping[str, Any]:
    """The figures of a corpus; "" for all together."""
    return result["corpora"][corpus] if corpus else result["all"]


def markdown(
    results: Mapping[str, Any],
    overlap: Mapping[str, Any] | None,
    several: Mapping[str, Any] | None = None,
    published: PublishedFigures | None = None,
    by_revision: Mapping[str, Any] | None = None,
    law: Mapping[str, Any] | None = None,
) -> str:
    """The whole file.

    Args:
      results: by condition, of launch.evaluate. overlap: the result of write_overlap, if any.
      several: the result of `compared`, where windows of several overlaps were scored.
      published: the paper's figures of the text.
      by_revision: of revision_view.revision_tables, where several revisions were scored.
      law: of size_law.size_law, where shares of the database were scored.
    """
    split = next(iter(results.values()))["settings"]["split"]
    parts = [f"# Evaluation: {split}", *_figures(results)]
    for table in window_tables(several) if several else ():
        parts += [f"{table.title}:", as_markdown(table)]
    parts += [f"## By size of the database\n\n{describe(law)}."] if law else []
    parts += map(section, revision_tables(by_revision) if by_revision else ())
    beside = beside_paper(results, published)
    parts += [section(beside)] if beside else []
    costs = cost_table(results)
    parts += [section(costs)] if costs else []
    parts += map(section, interval_tables(results))
    if overlap:
        parts += [*_intervals(overlap)]
    parts += ["## How this was made", *_settings(results)]
    return "\n\n".join(parts) + "\n"


def _figures(results: Mapping[str, Any]) -> Iterator[str]:
    """Bits per byte and perplexity by word, and the tables of variations of RETRO[ON]."""
    main = table_scores({name: results[name] for name in swept(results)})
    for figure, title, digits in (
        ("bits_per_byte", "Bits per byte", 4),
        ("word_perplexity", "Perplexity by word", 2),
    ):
        yield f"## {title}"
        yield as_markdown(score_table(main, figure, digits))
    for kind in SWEPT_NAMES:
        names = swept(results, kind)
        if names:
            scores = table_scores({name: results[name] for name in names})
            yield as_markdown(score_table(scores, "bits_per_byte", 4))
    hits = {n: r["last_word_accuracy"] for n, r in results.items() if "last_word_accuracy" in r}
    if hits:
        yield "## Accuracy of the last word"
        row = [interval(value) for value in hits.values()]
        yield as_markdown(Table([*map(condition_name, hits)], [row]))


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
    cells = [
        [
            row["corpus"] or "all",
            f"<= {row['at_most']:.0%}",
            f"{row['chunks']:,}",
            *(interval(row["bits_per_byte"][name]) for name in names),
            *(interval(row["differences"][pair], "+") for pair in pairs),
        ]
        for row in rows
    ]
    yield as_markdown(Table(header, cells))


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
    header = ["condition", "model", "neighbours", "window / stride, chunks", "data"]
    yield as_markdown(Table(header, rows))


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[OverlapPoint]]:
    """The rows as the report takes them, by corpus; thresholds without any text are left out."""
    by_corpus: dict[str, list[OverlapPoint]] = {}
    for row in rows:
        if row["bytes"]:
            figures = {name: figure["value"] for name, figure in row["bits_per_byte"].items()}
            point = OverlapPoint(row["at_most"], row["chunks"], figures)
            by_corpus.setdefault(row["corpus"], []).append(point)
    return by_corpus


def format_overlap(found: Mapping[str, Any]) -> str:
    """The figures at r(C) <= 50% beside all, and the differences with their intervals, as text."""
    rows = found["rows"]
    by_place = {(row["corpus"], row["at_most"]): row for row in rows}
    lines = []
    corpora = sorted({row["corpus"] for row in rows} - {""})
    for corpus in [*corpora, ""] if len(corpora) > 1 else corpora:
        everything, subset = by_place[corpus, 1.0], by_place[corpus, SHOWN_OVERLAP]
        for row, label in ((everything, "all chunks"), (subset, f"r(C) <= {SHOWN_OVERLAP:.0%}")):
            share = row["chunks"] / max(1, everything["chunks"])
            head = f"{corpus or 'all'}, {label}: {row['chunks']:,} chunks ({share:.0%})"
            found_here = row["bits_per_byte"]
            figures = [f"{_label(n)} {_number(found_here[n])}" for n in swept(found_here)]
            lines.append(f"{head}: {', '.join(figures)}")
            lines += [f"    {_label(n)}: {interval(i, '+')}" for n, i in row["differences"].items()]
    about = (
        f"r(C): longest run of tokens shared with one of the {found['neighbours']} nearest "
        f"training neighbours, over {found['chunk_length']}. In brackets: 95% intervals over documents."
    )
    return "\n".join(["bits per byte by overlap with the training data", *lines, f"({about})"])


def _label(name: str) -> str:
    """A condition, or a difference of two, as it is shown."""
    return " - ".join(map(condition_name, name.split("-")))


def _number(interval: Mapping[str, float | None]) -> str:
    """A figure without its interval."""
    return "none" if interval["value"] is None else f"{interval['value']:.4f}"


def compared(by_overlap: Mapping[float, Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of the file of several overlaps.

    Args:
      by_overlap: results by condition, by overlap.
    """
    last = by_overlap[max(by_overlap)]
    names = ("tokens", "nats", *FIGURES)
    rows = [
        {
            "overlap": overlap,
            "figures": {
                name: {figure: result["all"][figure] for figure in names}
                for name, result in sorted(by_overlap[overlap].items())
            },
        }
        for overlap in sorted(by_overlap)
    ]
    models = {name: result["model"] for name, result in last.items()}
    facts = {"chunks": last_window(last), "models": models, "nll": losses_of(last)}
    return {**facts, "rows": rows}


def losses_of(results: Mapping[str, Any]) -> dict[str, str]:
    """The file of each condition's losses: its name has a digest of all that they depend on."""
    return {name: result["nll"] for name, result in results.items()}


def last_window(results: Mapping[str, Any]) -> int:
    """Chunks of a window."""
    return next(iter(results.values()))["settings"]["window_chunks"]


def window_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """A table of each figure by overlap of windows, from the result of `compared`."""
    conditions = sorted(found["rows"][0]["figures"], key=condition_order)
    for figure, (title, digits) in FIGURES.items():
        rows = [
            [f"{row['overlap']:.4g}", *_cells(row["figures"], conditions, figure, digits)]
            for row in found["rows"]
        ]
        heading = f"{title}, by overlap of windows of {found['chunks']} chunks"
        yield Table(["overlap", *map(condition_name, conditions)], rows, heading)


def _cells(
    figures: Mapping[str, Any], conditions: Sequence[str], figure: str, digits: int
) -> list[str]:
    """A figure of every condition."""
    values = [figures[name][figure] for name in conditions]
    return ["" if value is None else f"{value:.{digits}f}" for value in values]
