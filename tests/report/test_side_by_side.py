"""Samples on a terminal: two columns that stay columns whatever the text holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.report.side_by_side import cells, side_by_side, wrap
from retro_jax.report.views import NeighbourView, SampleChunk, Span


def _chunk(text: str, found: str = "near") -> SampleChunk:
    view = NeighbourView("a/b.py", "code", 0.25, [Span(found)], [Span("then"), Span(" more")])
    return SampleChunk("", text, [view])


@given(st.text(max_size=80), st.text(max_size=80), st.integers(30, 90))
def test_every_line_fits_and_the_columns_stay_where_they_are(text: str, found: str, width: int):
    lines = side_by_side([_chunk(text, found), _chunk(found, text)], width).split("\n")
    left = (width - 3) // 2
    for line in lines:
        assert cells(line) <= width
        before = line
        while cells(before) > left:
            before = before[:-1]
        assert line[len(before) :].lstrip(" ")[:1] in ("│", "─", "")


def test_chunks_stand_beside_their_neighbours():
    shown = side_by_side([_chunk("def f():\n\treturn 1"), SampleChunk("x", "y", [])], 83)
    rows = [[cell.rstrip() for cell in line.split(" │ ")] for line in shown.split("\n")]
    assert rows[0] == ["def f():", "● a/b.py (code), distance 0.250"]
    assert rows[1] == ["    return 1", "  near"]
    assert rows[2] == ["", "→ then more"]
    assert set(rows[3][0]) == {"─", "┼"}
    assert rows[4] == [f"{'xy':<40} │"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", [""]),
        ("abcdef", ["abcd", "ef"]),
        ("a\n\nb", ["a", "", "b"]),
        ("a\x1b[31m", ["a\ufffd[3", "1m"]),
        ("漢字漢", ["漢字", "漢"]),
    ],
)
def test_wrapping_keeps_the_text_and_hides_control_characters(text: str, lines: list[str]):
    assert wrap(text, 4) == lines


def test_long_neighbours_are_cut_with_an_ellipsis():
    shown = side_by_side([_chunk("", "\n".join("abcdefgh"))], 90)
    assert [line.split("│ ")[1] for line in shown.split("\n")][1:4] == ["  a", "  b", "  c…"]
