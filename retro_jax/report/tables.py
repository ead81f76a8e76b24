"""A table as text, Markdown and HTML, and a figure with its interval: the one form of each."""

from collections.abc import Collection, Mapping, Sequence

from retro_jax.report.escapes import escape
from retro_jax.report.views import Table


def interval(figure: Mapping[str, float | None], sign: str = "", digits: int = 4) -> str:
    """A figure with its interval: "0.8222 [0.8100, 0.8340]"; "none" where there is no figure.

    Args:
      figure: its "value", "low" and "high". sign: "+" for differences. digits: after the point.
    """
    value, low, high = (figure[name] for name in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return "none"
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def excludes_zero(figure: Mapping[str, float]) -> bool:
    """Whether a difference is clear: its interval is all on one side. That of one document has no width."""
    return figure["low"] < figure["high"] and (figure["high"] < 0 or figure["low"] > 0)


def as_text(table: Table, left: Collection[int] = (0,)) -> str:
    """A table as aligned text; the columns `left` to the left, the others to the right."""
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    return "\n".join(text_row(line, widths, left) for line in lines)


def text_row(cells: Sequence[str], widths: Sequence[int], left: Collection[int] = (0,)) -> str:
    """One row of as_text, for a table whose rows are printed one by one."""
    aligned = [
        f"{cell:<{width}}" if column in left else f"{cell:>{width}}"
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(aligned).rstrip()


def as_markdown(table: Table) -> str:
    """A table in Markdown, without its title and caption."""
    lines = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(table: Table) -> str:
    """A table in Markdown under its title and caption."""
    return f"## {table.title}\n\n{table.caption}\n\n{as_markdown(table)}"


def as_html(table: Table) -> str:
    """A table in HTML, without its title and caption; texts are escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    best = table.best or [None] * len(table.rows)
    lines = []
    for number, (row, strong) in enumerate(zip(table.rows, best, strict=True)):
        cells = "".join(
            f"<td{' class=best' if column == strong else ''}>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        last = table.total and number == len(table.rows) - 1
        lines.append(f"<tr{' class=total' if last else ''}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
