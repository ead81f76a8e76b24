"""Samples for a terminal: the text on the left, the neighbours of each chunk on the right."""

import unicodedata
from collections.abc import Sequence

from retro_jax.report.views import NeighbourView, SampleChunk, Span

_GAP = " │ "
_LINES = 3  # of each neighbour's chunk, and of its continuation
_TAB = 4


def side_by_side(chunks: Sequence[SampleChunk], width: int) -> str:
    """Lines of two columns, `width` cells in all; a rule separates chunks."""
    left = (width - len(_GAP)) // 2
    right = width - len(_GAP) - left
    blocks = []
    for chunk in chunks:
        text = wrap(chunk.prompt + chunk.generated, left)
        notes = [line for view in chunk.neighbours for line in _neighbour(view, right)]
        height = max(len(text), len(notes))
        text += [""] * (height - len(text))
        notes += [""] * (height - len(notes))
        rows = (f"{_pad(a, left)}{_GAP}{b}".rstrip() for a, b in zip(text, notes, strict=True))
        blocks.append("\n".join(rows))
    rule = "─" * left + "─┼─" + "─" * right
    return f"\n{rule}\n".join(blocks)


def wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` cells; white space is kept, unprintable characters become U+FFFD."""
    lines = []
    for line in text.split("\n"):
        shown = "".join(c if c.isprintable() else "\ufffd" for c in line.expandtabs(_TAB))
        row, row_width = "", 0
        for character in shown:
            if row_width + cells(character) > width:
                lines.append(row)
                row, row_width = "", 0
            row, row_width = row + character, row_width + cells(character)
        lines.append(row)
    return lines


def cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    narrow = sum(not unicodedata.combining(c) for c in text)
    return narrow + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def _neighbour(view: NeighbourView, width: int) -> list[str]:
    """A neighbour: its origin, the beginning of its chunk, and that of its continuation."""
    lines = wrap(f"● {view.document} ({view.corpus}), {view.score} {view.distance:.3f}", width)
    for mark, spans in (("  ", view.chunk), ("→ ", view.continuation)):
        text = _beginning(spans, width - 2)
        lines += [f"{mark if i == 0 else '  '}{line}" for i, line in enumerate(text)]
    return lines


def _beginning(spans: Sequence[Span], width: int) -> list[str]:
    """The first lines that are not empty, with an ellipsis where there are more."""
    lines = [line for line in wrap("".join(span.text for span in spans), width) if line.strip()]
    if len(lines) > _LINES:
        lines = [*lines[: _LINES - 1], f"{lines[_LINES - 1][: width - 1]}…"]
    return lines


def _pad(text: str, width: int) -> str:
    """The text filled up with spaces to `width` cells."""
    return text + " " * (width - cells(text))
