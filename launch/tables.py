"""Results of launch.evaluate as tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from retro_jax.evaluate.report import SWEPT_NAMES, condition_name, score_rows, swept


def table_scores(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Results as the report and its tables take them: condition -> corpus ("" for all) -> figures."""
    return {name: {**result["corpora"], "": result["all"]} for name, result in results.items()}


def format_table(results: Mapping[str, Any]) -> str:
    """Bits per byte as text, one row a corpus; what varies RETRO[ON] in tables of its own."""
    main = {name: results[name] for name in swept(results)}
    tables = [_aligned(main)]
    for kind in SWEPT_NAMES:
        names = swept(results, kind)
        tables += [_aligned({name: results[name] for name in names})] if names else []
    steps = {condition_name(name): result["model"]["step"] for name, result in main.items()}
    told = ", ".join(f"{name} at step {step:,}" for name, step in steps.items())
    count = next(iter(main.values()))["all"]
    size = f"{count['documents']:,} documents, {count['tokens']:,} tokens, {count['bytes']:,} bytes"
    split = next(iter(main.values()))["settings"]["split"]
    return "\n".join([*tables, f"({split}: {size}; {told})"])


def _aligned(results: Mapping[str, Any]) -> str:
    """One table of bits per byte."""
    header, rows, _ = score_rows(table_scores(results), "bits_per_byte", 4)
    return aligned(["bits per byte", *header[1:]], rows)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        cells = [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join([f"{line[0]:<{widths[0]}}", *cells])

    return "\n".join(map(show, lines))
