"""The report's page: escaped, self-contained, faithful to the text it shows."""

import html.parser
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retro_jax.report.evaluation_tables import score_table
from retro_jax.report.html import full_colour, render
from retro_jax.report.line_chart import Line, line_chart, smooth, ticks
from retro_jax.report.views import (
    ChunkView,
    Curve,
    NeighbourView,
    Report,
    SampleChunk,
    SampleView,
    Span,
    merged,
    shared_runs,
    spans,
)

CODE = 'def f(x):\n\tif x < 1 & "y" > \'z\':\n        return """<script>alert(1)</script>"""\n'


class _Page(html.parser.HTMLParser):
    """Collects the blocks of text, the tags, and whether every tag is closed in order."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.blocks: list[str] = []
        self._block: int | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in self.VOID or tag in ("line", "polyline", "circle"):
            return
        self.open.append(tag)
        if dict(attrs).get("class") == "text" and tag == "div":
            self._block = len(self.open)
            self.blocks.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1:] == [tag]
        if self._block == len(self.open):
            self._block = None
        self.open.pop()

    def handle_data(self, data):
        if self._block is not None:
            self.blocks[-1] += data


def _report(text: str = CODE) -> Report:
    parts = re.split(r"(?<= )", text)
    gains = [Span(part, -3.0 if i % 2 else 2.0) for i, part in enumerate(parts)]
    neighbour = NeighbourView("a<b>.py", "code&", 0.25, [Span(text, shared=True)], [Span("next")])
    figures = {"bits_per_byte": 1.5, "word_perplexity": 20.0, "bits_per_token": 4.0}
    better = {name: value / 2 for name, value in figures.items()}
    return Report(
        title="A <title>",
        summary="of & about",
        facts=[("step", "<12>")],
        scores={
            "off": {"code": figures, "": figures},
            "on": {"code": better, "": better},
        },
        curves=[Curve("RETRO", [0, 1000, 2000], [3.0, math.nan, 2.0])],
        chunks=[ChunkView("Largest <gain>", "x<y", 2.5, 9.0, [Span(text)], gains, [neighbour])],
        samples=[SampleView("One", "t<1", [SampleChunk(text, "<i>made</i>", [neighbour])])],
    )


def test_texts_are_escaped_and_their_whitespace_is_kept():
    page = _Page(render(_report()))
    assert not page.open
    assert page.blocks == [CODE, CODE, CODE + "next", CODE + "<i>made</i>", CODE + "next"]
    assert not {"script", "i", "b<", "gain"} & {tag for tag, _ in page.tags}
    assert "white-space: pre-wrap" in render(_report())


def test_the_page_loads_nothing():
    text = render(_report())
    for tag, attributes in _Page(text).tags:
        assert tag not in ("link", "script", "img", "iframe", "object")
        assert not {"src", "href", "data", "onclick"} & set(attributes)
    assert "@import" not in text
    assert "url(" not in text
    assert "http" not in text


def test_gains_are_green_and_losses_red_and_underlined():
    text = render(_report())
    assert re.search(
        r'<span style="background: rgba\(var\(--more\), 0\.50\)" title="\+2\.00 bits">', text
    )
    assert re.search(
        r'<span class=less style="background: rgba\(var\(--less\), 0\.75\)" title="-3\.00 bits">',
        text,
    )
    assert "<mark>" in text
    assert "2.5 bits saved" in text


def test_the_full_colour_follows_what_is_shown_within_bounds():
    assert full_colour([0.01] * 99) == 0.25
    assert full_colour([-9.0] * 99) == 4
    assert full_colour([1.0] * 98 + [0.5, 50.0]) == 1
    assert full_colour([]) == 4


def test_sections_without_content_are_left_out():
    bare = render(Report("T", "", [], {}, [], [], []))
    assert "<h2>" not in bare
    assert "<h1>T</h1>" in bare


def test_score_rows_name_the_best_and_the_difference():
    table = score_table(_report().scores, "bits_per_byte", 3)
    assert table.header == ["corpus", "RETRO[OFF]", "RETRO[ON]", "ON vs OFF"]
    assert table.rows == [
        ["code", "1.500", "0.750", "-50.00%"],
        ["all", "1.500", "0.750", "-50.00%"],
    ]
    assert table.best == [2, 2]


def test_a_figure_that_is_not_there_is_none():
    scores = {"off": {"": {"bits": 1.5}}, "on": {"": {"bits": None}}}
    table = score_table(scores, "bits", 3)
    assert table.rows == [["all", "1.500", "none", ""]] and table.best == [1]
    assert score_table({"on": scores["on"]} | {"k_1": scores["on"]}, "bits", 3).best == [None]
    assert not line_chart([Line("on", [1.0, 2.0], [None, math.nan], "a")], x_label="", y_label="")


@given(st.text(max_size=30), st.data())
def test_spans_give_the_text_back_however_its_bytes_are_cut(text: str, data: st.DataObject):
    raw = text.encode("utf-8", "replace")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    pieces = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    result = spans(pieces, gains=[1.0] * len(pieces))
    assert "".join(span.text for span in result) == raw.decode()
    assert sum(span.gain or 0 for span in result) == (len(pieces) if raw else 0)


def test_a_character_cut_by_the_ends_is_replaced():
    euro = "€".encode()
    assert [span.text for span in spans([euro[1:], b"a", euro[:2]])] == ["��", "a", "�"]


def test_merged_spans_are_the_same_text():
    parts = [
        Span("a", 1.0),
        Span("b"),
        Span("c", shared=True),
        Span("d", 2.0, shared=True),
        Span("e"),
    ]
    assert merged(parts) == [Span("ab"), Span("cd", shared=True), Span("e")]


def test_shared_runs_are_four_tokens_or_more():
    other = np.array([5, 1, 2, 3, 4, 9, 7, 8, 9])
    mask = shared_runs(np.array([1, 2, 3, 4, 6, 7, 8, 9, 1]), other)
    assert mask.tolist() == [True] * 4 + [False] * 5
    assert not shared_runs(np.array([1, 2]), other).any()


def test_a_chart_leaves_out_what_is_not_finite_and_labels_its_lines():
    nan = math.nan
    svg = line_chart([Line("a<b", [0, 1, 2], [1, nan, 3], "first")], x_label="x", y_label="y")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    assert len(points.split()) == 2
    assert "a&lt;b" in svg
    assert "nan" not in svg
    assert line_chart([Line("", [1], [nan], "first")], x_label="x", y_label="y") == ""
    dot = line_chart([Line("", [1], [2], "first")], x_label="x", y_label="y")
    assert "circle" in dot


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_cover_the_range_with_few_numbers(low: float, span: float):
    values = ticks(low, low + span)
    step = values[1] - values[0]
    assert values[0] <= low + step / 1e6
    assert values[-1] >= low + span - step / 1e6
    assert 2 <= len(values) <= 9


def test_smoothing_is_the_mean_around_each_place():
    assert smooth([0, 3, 6, 9, 0], 3) == pytest.approx([0, 3, 6, 5, 0])
    assert smooth([1, 5], 1) == [1, 5]
