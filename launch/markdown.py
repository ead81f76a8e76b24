"""The result of an evaluation as Markdown: tables, the paper's beside them, settings and hashes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.tables import table_scores
from retro_jax.evaluate import paper
from retro_jax.evaluate.report import (
    SHOWN_OVERLAP,
    SWEPT_NAMES,
    condition_name,
    condition_order,
    score_rows,
    swept,
)


def markdown(results: Mapping[str, Any], overlap: Mapping[str, Any] | None) -> str:
    """The whole file.

    Args:
      results: by condition, of launch.evaluate. overlap: what write_overlap found, if anything.
    """
    split = next(iter(results.values()))["settings"]["split"]
    parts = [f"# Evaluation: {split}", *_figures(results), *_beside(split, results)]
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
            [*map(condition_name, hits)], [[f"{value:.4f}" for value in hits.values()]]
        )


def _beside(split: str, results: Mapping[str, Any]) -> Iterator[str]:
    """The paper's figures of the same text, where it has some."""
    if split.startswith("wikitext103"):
        yield "The paper's, by word (validation, test):"
        rows = [[name, f"{valid:.2f}", f"{test:.2f}"] for name, valid, test in paper.WIKITEXT103]
        yield markdown_table(["", "validation", "test"], rows)
        count = next(iter(results.values()))["all"]
        words = count["words"] + count["lines"]
        whole = [name for name, size in paper.WIKITEXT103_WORDS.items() if size == words]
        yield f"Words, line ends counted: {words:,}" + (
            f", the whole {whole[0]} set" if whole else ""
        )
    held = {corpus for result in results.values() for corpus in result["corpora"]}
    if split.startswith("pile") and held & set(paper.PILE):
        yield "The paper's, of its largest models:"
        rows = [
            [corpus, *(f"{value:.3f}" for value in paper.PILE[corpus])]
            for corpus in sorted(held & set(paper.PILE))
        ]
        yield markdown_table(["", "baseline 7B", "RETRO 7.5B"], rows)
    if split.startswith("lambada"):
        yield "The paper's, by size:"
        rows = [[size, f"{base:.2f}", f"{on:.2f}"] for size, (base, on) in paper.LAMBADA.items()]
        yield markdown_table(["", "baseline", "RETRO"], rows)


def _intervals(overlap: Mapping[str, Any]) -> Iterator[str]:
    """Every figure with its interval: among all chunks and among those of little overlap."""
    yield "## By overlap with the training data"
    yield (
        f"r(C): the longest run of tokens shared with one of the {overlap['neighbours']} nearest "
        f"training neighbours, over {overlap['chunk_length']}. In brackets: {overlap['interval']}."
    )
    words = overlap["word_perplexity"]
    names = sorted(words, key=condition_order)
    yield "Perplexity by word, all chunks: " + ", ".join(
        f"{condition_name(name)} {_interval(words[name], '', 2)}" for name in names
    )
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
                *(_interval(row["bits_per_byte"][name], "") for name in names),
                *(_interval(row["differences"][pair], "+") for pair in pairs),
            ]
            for row in rows
        ],
    )


def _interval(figure: Mapping[str, float | None], sign: str, digits: int = 4) -> str:
    """A figure with its interval."""
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "none"
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


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
