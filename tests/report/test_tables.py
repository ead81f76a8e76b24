"""One table in its three forms, and one form of a figure with its interval."""

import pytest

from retro_jax.report.tables import as_html, as_markdown, as_text, interval, section, text_row
from retro_jax.report.views import Table

TABLE = Table(
    ["corpus", "on", "<off>"],
    [["a & b", "0.5", "1"], ["all", "10.25", ""]],
    "A title",
    "A caption.",
    best=[1, None],
    total=True,
)


def test_text_is_aligned_without_spaces_at_its_ends():
    assert as_text(TABLE).split("\n") == [
        "corpus     on  <off>",
        "a & b     0.5      1",
        "all     10.25",
    ]
    assert as_text(TABLE, left=(1,)).split("\n")[1] == " a & b  0.5        1"
    assert text_row(["a", "b"], [3, 4]) == "a       b"


def test_markdown_and_its_section():
    lines = ["| corpus | on | <off> |", "| --- | --- | --- |", "| a & b | 0.5 | 1 |"]
    assert as_markdown(TABLE).split("\n") == [*lines, "| all | 10.25 |  |"]
    assert section(TABLE) == f"## A title\n\nA caption.\n\n{as_markdown(TABLE)}"


def test_html_is_escaped_and_marks_the_best_and_the_total():
    page = as_html(TABLE)
    assert "<th>&lt;off&gt;</th>" in page
    assert "<tr><td>a &amp; b</td><td class=best>0.5</td><td>1</td></tr>" in page
    assert "<tr class=total><td>all</td><td>10.25</td><td></td></tr>" in page
    plain = as_html(Table(TABLE.header, TABLE.rows))
    assert "class=best" not in plain and "class=total" not in plain


@pytest.mark.parametrize(
    ("figure", "more", "text"),
    [
        ((0.82224, 0.8, 0.9), (), "0.8222 [0.8000, 0.9000]"),
        ((-0.25, -0.5, 0.125), ("+", 2), "-0.25 [-0.50, +0.12]"),
        ((21.5, None, None), ("", 2), "none"),
    ],
)
def test_a_figure_has_its_interval_in_brackets(figure, more, text):
    assert interval(dict(zip(("value", "low", "high"), figure, strict=True)), *more) == text
