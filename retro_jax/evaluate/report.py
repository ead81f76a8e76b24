"""The report of a run: one self-contained HTML page from plain values.

Every text of a document, prompt or sample goes through html.escape; whitespace is kept, for code.
"""

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence

from retro_jax.evaluate.line_chart import STYLES, Line, line_chart, smooth
from retro_jax.evaluate.page import page, table
from retro_jax.evaluate.spans import Span

CONDITION_NAMES = {
    "baseline": "baseline",
    "knn": "kNN-LM",
    "off": "RETRO[OFF]",
    "on": "RETRO[ON]",
    "random": "random neighbours",
    "oracle": "oracle",
}
# Conditions that vary RETRO[ON], by the first part of their names: what the second part is.
SWEPT_NAMES = {
    "k": "k = {:g}",
    "database": "{:.4g} of the database",
    "ngrams": "13-grams at most {:.0%}",
}
SHOWN_OVERLAP = 0.5  # the share of shared tokens whose figures stand beside those of all chunks
_STYLES = dict(zip(("on", "off", "baseline", "knn", "random", "oracle"), STYLES, strict=True))
_FULL_COLOUR_RANGE = (0.25, 4.0)  # bits a token


@dataclasses.dataclass(frozen=True)
class NeighbourView:
    """A retrieved neighbour: its document, its corpus, its distance to the query, and its text.

    Attributes:
      score: what the distance is, where it is a score: "BM25".
    """

    document: str
    corpus: str
    distance: float
    chunk: Sequence[Span]
    continuation: Sequence[Span]
    score: str = "distance"


@dataclasses.dataclass(frozen=True)
class ChunkView:
    """A test chunk: what retrieval did to each of its tokens, and from which neighbours.

    Attributes:
      heading: why it is shown. source: its document and place.
      gain: bits that retrieval saved on it, out of `bits` without retrieval.
      query: the chunk before it, with which the neighbours were retrieved.
      spans: the chunk's text, with the gain of each token.
    """

    heading: str
    source: str
    gain: float
    bits: float
    query: Sequence[Span]
    spans: Sequence[Span]
    neighbours: Sequence[NeighbourView]


@dataclasses.dataclass(frozen=True)
class SampleChunk:
    """A chunk of a sample: its prompt part, its generated part, and the neighbours it retrieved."""

    prompt: str
    generated: str
    neighbours: Sequence[NeighbourView]


@dataclasses.dataclass(frozen=True)
class SampleView:
    """A sample: a heading, how it was made, and its chunks."""

    heading: str
    settings: str
    chunks: Sequence[SampleChunk]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's training loss in nats a token, by tokens seen."""

    name: str
    tokens: Sequence[float]
    loss: Sequence[float]


@dataclasses.dataclass(frozen=True)
class OverlapPoint:
    """Figures among the chunks that share at most a share `at_most` with the training data."""

    at_most: float
    chunks: int
    bits_per_byte: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ChartView:
    """A chart: its heading, what is to be said of it, and the SVG of line_chart."""

    title: str
    caption: str
    svg: str


@dataclasses.dataclass(frozen=True)
class TableView:
    """A further table: its heading, what is to be said of it, and plain cells."""

    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything the page shows; a section without content is left out.

    Attributes:
      facts: (name, value) pairs about the run.
      scores: condition -> corpus -> Score.to_dict(), where the corpus "" is all of them.
      curves: training losses.
      chunks, samples: what retrieval did, and generated text.
      charts: further ones, of what retrieval depends on. tables: further ones, behind the scores.
      overlap: corpus ("" for all) -> the figures by overlap with the training data.
    """

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
    curves: Sequence[Curve]
    chunks: Sequence[ChunkView]
    samples: Sequence[SampleView]
    charts: Sequence[ChartView] = ()
    tables: Sequence[TableView] = ()
    overlap: Mapping[str, Sequence[OverlapPoint]] = dataclasses.field(default_factory=dict)


def render(report: Report) -> str:
    """The page as HTML."""
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in report.facts
    )
    parts = [
        f"<h1>{html.escape(report.title)}</h1><p class=dim>{html.escape(report.summary)}</p>",
        _scores_section(report.scores),
        *map(_table_section, report.tables),
        _overlap_section(report.overlap),
        *map(_chart_section, report.charts),
        _curves_section(report.curves),
        _chunks_section(report.chunks),
        _samples_section(report.samples),
        f"<h2>How this was made</h2><dl>{facts}</dl>" if facts else "",
    ]
    return page(report.title, "\n".join(part for part in parts if part))


def condition_name(name: str) -> str:
    """A condition as it is shown: "off" is RETRO[OFF], "k_4" is 4 neighbours."""
    kind, _, value = name.partition("_")
    return SWEPT_NAMES[kind].format(float(value)) if value else CONDITION_NAMES[name]


def condition_order(name: str) -> tuple[int, float]:
    """Sorts conditions: as in CONDITION_NAMES, then the swept ones by kind and value."""
    kind, _, value = name.partition("_")
    order = [*CONDITION_NAMES, *SWEPT_NAMES]
    return order.index(kind), float(value or 0)


def swept(names: Iterable[str], kind: str = "") -> list[str]:
    """Those of the names that vary RETRO[ON] in one way, by value; with "" those that do not at all."""
    found = [
        name
        for name in names
        if ("_" in name and name.partition("_")[0] == kind) or (not kind and "_" not in name)
    ]
    return sorted(found, key=condition_order)


def score_rows(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]], figure: str, digits: int
) -> tuple[list[str], list[list[str]], list[int | None]]:
    """A table of one figure: header, a row per corpus (the last is all), and each row's best column."""
    conditions = sorted(scores, key=condition_order)
    corpora = sorted({corpus for by_corpus in scores.values() for corpus in by_corpus if corpus})
    header = ["corpus", *map(condition_name, conditions)]
    pair = "on" in scores and "off" in scores
    header += ["ON vs OFF"] if pair else []
    rows, best = [], []
    for corpus in [*corpora, ""]:
        values = [scores[name][corpus][figure] for name in conditions]
        row = [corpus or "all", *(f"{value:.{digits}f}" for value in values)]
        if pair:
            on, off = scores["on"][corpus][figure], scores["off"][corpus][figure]
            row.append(f"{100 * (on / off - 1):+.2f}%" if off else "")
        rows.append(row)
        best.append(1 + values.index(min(values)) if len(values) > 1 else None)
    return header, rows, best


def _scores_section(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The tables of figures."""
    if not scores:
        return ""
    header, rows, best = score_rows(scores, "bits_per_byte", 4)
    parts = ["<h2>Bits per byte</h2>", table(header, rows, best=best)]
    parts.append(
        "<p class='dim small'>Loss of the text over its UTF-8 bytes; lower is better. The end of a "
        "document is not counted. RETRO[OFF] is the same model without neighbours.</p>"
    )
    header, rows, best = score_rows(scores, "word_perplexity", 1)
    tokens, token_rows, token_best = score_rows(scores, "bits_per_token", 3)
    parts.append(
        "<details><summary>Perplexity by word, and bits per token</summary>"
        f"<p class='dim small'>By whitespace word, line ends counted as words.</p>"
        f"{table(header, rows, best=best)}"
        f"<p class='dim small'>Bits per token.</p>{table(tokens, token_rows, best=token_best)}"
        "</details>"
    )
    return "".join(parts)


def overlap_chart(curve: Sequence[OverlapPoint]) -> str:
    """Bits per byte of each condition by the overlap allowed, as SVG; "" without a point."""
    shares = [100 * point.at_most for point in curve]
    names = [name for name in CONDITION_NAMES if curve and name in curve[0].bits_per_byte]
    lines = [
        Line(CONDITION_NAMES[n], shares, [p.bits_per_byte[n] for p in curve], _STYLES[n])
        for n in names
    ]
    return line_chart(lines, x_label="r(C) at most, %", y_label="bits per byte")


def _overlap_section(overlap: Mapping[str, Sequence[OverlapPoint]]) -> str:
    """The curve over all corpora, and a table among chunks of little overlap."""
    chart = overlap_chart(overlap.get("", []))
    if not chart:
        return ""
    few = {c: p for c, curve in overlap.items() for p in curve if p.at_most == SHOWN_OVERLAP}
    parts = [
        "<h2>Without what stands in the training data</h2>",
        "<p>r(C) of a chunk is the longest run of tokens that it shares with one of its nearest "
        "training neighbours, over the chunk length. The curve is of the chunks with at most this "
        "much.</p>",
        f'<figure><div class="card">{chart}</div></figure>',
    ]
    if "" in few:
        conditions = swept(few[""].bits_per_byte)
        figures = {
            name: {c: {"bits_per_byte": point.bits_per_byte[name]} for c, point in few.items()}
            for name in conditions
        }
        header, rows, best = score_rows(figures, "bits_per_byte", 4)
        count = f"{few[''].chunks:,} chunks with r(C) at most {SHOWN_OVERLAP:.0%}"
        parts.append(f"<p class='dim small'>{count}:</p>{table(header, rows, best=best)}")
    return "".join(parts)


def _table_section(view: TableView) -> str:
    """A further table."""
    caption = f"<p class='dim small'>{html.escape(view.caption)}</p>" if view.caption else ""
    rows = [list(row) for row in view.rows]
    return (
        f"<h2>{html.escape(view.title)}</h2>"
        f"{table(list(view.header), rows, best=[None] * len(rows), total=False)}{caption}"
    )


def _chart_section(chart: ChartView) -> str:
    """A further chart; nothing where it has no point."""
    if not chart.svg:
        return ""
    return (
        f'<h2>{html.escape(chart.title)}</h2><figure><div class="card">{chart.svg}</div>'
        f"<figcaption class=small>{html.escape(chart.caption)}</figcaption></figure>"
    )


def _curves_section(curves: Sequence[Curve]) -> str:
    """The training losses: each value thin, their running mean bold."""
    lines = []
    for curve, style in zip(curves, ("first", "second"), strict=False):
        window = max(1, len(curve.loss) // 25)
        lines.append(Line("", curve.tokens, curve.loss, f"raw {style}"))
        lines.append(Line(curve.name, curve.tokens, smooth(curve.loss, window), style))
    chart = line_chart(lines, x_label="tokens seen", y_label="training loss, nats a token")
    if not chart:
        return ""
    return (
        f'<h2>Training</h2><figure><div class="card">{chart}</div><figcaption class=small>'
        "Thin: each value logged. Bold: their mean over a 25th of the run.</figcaption></figure>"
    )


def _chunks_section(chunks: Sequence[ChunkView]) -> str:
    """Test chunks coloured by what retrieval did to each token."""
    if not chunks:
        return ""
    full = full_colour([span.gain or 0.0 for chunk in chunks for span in chunk.spans])
    legend = (
        '<div class="legend"><span>less likely</span><span class="ramp"></span>'
        "<span>more likely with retrieval</span></div><p class='dim small'>Full colour from "
        f"{full:.2g} bits a token; point at a token for its number. Dotted underline: clearly less "
        "likely.</p>"
    )
    intro = (
        "<p>Test chunks of 64 tokens. Neighbours were retrieved with the chunk <em>before</em>, and "
        "are read while this chunk is predicted. <mark>Marked</mark> in a neighbour: runs of four or "
        "more tokens that the chunk has too.</p>"
    )
    cards = "".join(_chunk_card(chunk, full) for chunk in chunks)
    return f"<h2>What retrieval changed</h2>{intro}{legend}{cards}"


def full_colour(gains: Sequence[float]) -> float:
    """The bits a token that get the full colour: few of the tokens shown have more."""
    low, high = _FULL_COLOUR_RANGE
    sizes = sorted(map(abs, gains))
    return min(high, max(low, sizes[int(0.98 * (len(sizes) - 1))])) if sizes else high


def _chunk_card(chunk: ChunkView, full: float) -> str:
    """One test chunk and its neighbours, side by side."""
    style, word = ("gain", "saved") if chunk.gain >= 0 else ("loss", "cost")
    figure = f"<span class={style}>{abs(chunk.gain):.1f} bits {word}</span>"
    left = ""
    if chunk.query:
        left = f'<div class="caption">the chunk before: the query</div>{_text(chunk.query)}'
    left += f'<div class="caption">the chunk</div>{_text(chunk.spans, full)}'
    return (
        f'<section class="card"><header><h3>{html.escape(chunk.heading)}</h3>'
        f'<span class="caption">{html.escape(chunk.source)}</span>'
        f'<span class="small">{figure} <span class=dim>of {chunk.bits:.1f}</span></span></header>'
        f'<div class="pair"><div>{left}</div><div>{_neighbours(chunk.neighbours)}</div></div></section>'
    )


def _samples_section(samples: Sequence[SampleView]) -> str:
    """Generated texts, chunk by chunk with what was retrieved."""
    if not samples:
        return ""
    cards = []
    for sample in samples:
        pairs = "".join(
            f'<div class="pair"><div>{_sample_text(chunk)}</div>'
            f"<div>{_neighbours(chunk.neighbours)}</div></div>"
            for chunk in sample.chunks
        )
        cards.append(
            f'<section class="card"><header><h3>{html.escape(sample.heading)}</h3>'
            f'<span class="caption">{html.escape(sample.settings)}</span></header>{pairs}</section>'
        )
    intro = (
        "<p>The prompt has a coloured ground. Beside each chunk stand the neighbours retrieved with "
        "it: the model reads them while it writes the chunk that follows.</p>"
    )
    return f"<h2>Samples</h2>{intro}{''.join(cards)}"


def _sample_text(chunk: SampleChunk) -> str:
    """A chunk of a sample, its prompt part marked."""
    prompt = f"<span class=prompt>{html.escape(chunk.prompt)}</span>" if chunk.prompt else ""
    return f'<div class="text">{prompt}{html.escape(chunk.generated)}</div>'


def _neighbours(neighbours: Sequence[NeighbourView]) -> str:
    """The neighbours of one chunk, nearest first."""
    if not neighbours:
        return '<p class="caption">nothing retrieved</p>'
    parts = []
    for neighbour in neighbours:
        parts.append(
            f'<div class="caption"><b>{html.escape(neighbour.document)}</b> · '
            f"{html.escape(neighbour.corpus)} · {neighbour.score} {neighbour.distance:.3f}</div>"
            f'<div class="text">{_spans(neighbour.chunk)}'
            f"<span class=continuation>{_spans(neighbour.continuation)}</span></div>"
        )
    return "".join(parts)


def _text(spans: Sequence[Span], full: float = 1.0) -> str:
    """A block of text."""
    return f'<div class="text">{_spans(spans, full)}</div>'


def _spans(spans: Sequence[Span], full: float = 1.0) -> str:
    """Spans as HTML; a gain of `full` bits has the full colour."""
    return "".join(_span(span, full) for span in spans)


def _span(span: Span, full: float) -> str:
    """One span: coloured by its gain, marked where it is shared, else plain."""
    text = html.escape(span.text)
    if span.gain is None:
        return f"<mark>{text}</mark>" if span.shared else text
    text = text.replace("\n", "<span class=end></span>\n")
    strength = min(1.0, abs(span.gain) / full)
    if strength < 0.04:
        return f'<span title="{span.gain:+.2f} bits">{text}</span>'
    name = "more" if span.gain > 0 else "less"
    ground = f"background: rgba(var(--{name}), {0.75 * strength:.2f})"
    underline = " class=less" if span.gain < -0.25 * full else ""
    return f'<span{underline} style="{ground}" title="{span.gain:+.2f} bits">{text}</span>'
