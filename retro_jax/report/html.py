"""The report of a run: one self-contained HTML page from plain values.

Every text of a document, prompt or sample goes through escapes.escape; whitespace is kept, for code.
"""

from collections.abc import Mapping, Sequence

from retro_jax.evaluate.conditions import CONDITION_NAMES, SHOWN_OVERLAP, swept
from retro_jax.report.cost_view import condition_style
from retro_jax.report.escapes import escape
from retro_jax.report.evaluation_tables import score_table
from retro_jax.report.line_chart import STYLE_SHEET, Line, line_chart, smooth
from retro_jax.report.tables import as_html
from retro_jax.report.views import (
    ChartView,
    ChunkView,
    Curve,
    NeighbourView,
    OverlapPoint,
    Report,
    SampleChunk,
    SampleView,
    Span,
    Table,
)

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1d2129; --dim: #667085; --rule: #e3e5e8;
  --code: #f5f6f7; --accent: #1f5fd0;
  --more: 16, 150, 72; --less: 214, 50, 50; --shared: #fff1b8; --prompt: #eaf1ff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1b1e24; --text: #e4e7ec; --dim: #98a2b3; --rule: #2f343d;
    --code: #22262e; --accent: #7fb0ff;
    --more: 42, 190, 108; --less: 245, 88, 88; --shared: #57480f; --prompt: #1f2d47;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 72px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 44px 0 6px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 6px 0 12px; max-width: 76ch; }
.dim, figcaption { color: var(--dim); }
.small { font-size: 13px; }
code, .text { font: 12.5px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 12px 0; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 14px; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--dim); font-weight: 600; font-size: 13px; }
tr.total td { border-bottom: none; font-weight: 600; }
td.best { color: var(--accent); font-weight: 700; }
figure { margin: 12px 0; }
svg.chart { width: 100%; height: auto; display: block; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 18px; margin: 14px 0; }
.card > header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: baseline; margin-bottom: 10px; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 6px 22px; }
.pair + .pair { border-top: 1px solid var(--rule); margin-top: 12px; padding-top: 12px; }
@media (max-width: 760px) { .pair { grid-template-columns: minmax(0, 1fr); } }
.text { white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; background: var(--code);
  border-radius: 6px; padding: 9px 11px; margin: 4px 0 10px; }
.text .end::before { content: "↵"; color: var(--dim); opacity: 0.55; }
.text .less { text-decoration: underline dotted; text-underline-offset: 3px; }
.text .prompt { background: var(--prompt); border-radius: 3px; }
.text .continuation { color: var(--dim); }
mark { background: var(--shared); color: inherit; border-radius: 2px; }
.caption { font-size: 12.5px; color: var(--dim); }
.caption b { color: var(--text); font-weight: 600; overflow-wrap: anywhere; }
.gain { color: rgb(var(--more)); font-weight: 600; } .loss { color: rgb(var(--less)); font-weight: 600; }
.legend { display: flex; align-items: center; gap: 8px; font-size: 12.5px; color: var(--dim); flex-wrap: wrap; }
.legend .ramp { width: 200px; height: 12px; border-radius: 3px; background: linear-gradient(90deg,
  rgba(var(--less), 0.75), rgba(var(--less), 0) 50%, rgba(var(--more), 0) 50%, rgba(var(--more), 0.75)); }
details > summary { cursor: pointer; color: var(--dim); font-size: 13px; }
dl { display: grid; grid-template-columns: fit-content(40%) minmax(0, 1fr); gap: 2px 18px; margin: 10px 0; font-size: 13.5px; }
dt { color: var(--dim); } dt, dd { overflow-wrap: anywhere; } dd { margin: 0; }
"""

_FULL_COLOUR_RANGE = (0.25, 4.0)  # bits per token


def render(report: Report) -> str:
    """The page as HTML."""
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts
    )
    parts = [
        f"<h1>{escape(report.title)}</h1><p class=dim>{escape(report.summary)}</p>",
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


def _scores_section(scores: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """The tables of figures."""
    if not scores:
        return ""
    parts = ["<h2>Bits per byte</h2>", as_html(score_table(scores, "bits_per_byte", 4))]
    parts.append(
        "<p class='dim small'>Loss of the text over its UTF-8 bytes; lower is better. The end of a "
        "document is not counted. RETRO[OFF] is the same model without neighbours.</p>"
    )
    parts.append(
        "<details><summary>Perplexity by word, and bits per token</summary>"
        f"<p class='dim small'>By whitespace word, line ends counted as words.</p>"
        f"{as_html(score_table(scores, 'word_perplexity', 1))}<p class='dim small'>Bits per token.</p>"
        f"{as_html(score_table(scores, 'bits_per_token', 3))}"
        "</details>"
    )
    return "".join(parts)


def overlap_chart(curve: Sequence[OverlapPoint]) -> str:
    """Bits per byte of each condition by the overlap allowed, as SVG; "" without a point."""
    shares = [100 * point.at_most for point in curve]
    names = [name for name in CONDITION_NAMES if curve and name in curve[0].bits_per_byte]
    lines = [
        Line(CONDITION_NAMES[n], shares, [p.bits_per_byte[n] for p in curve], condition_style(n))
        for n in names
    ]
    return line_chart(lines, x_label="r(C) at most, %", y_label="bits per byte")


def _overlap_section(overlap: Mapping[str, Sequence[OverlapPoint]]) -> str:
    """The curve over all corpora, and a table among chunks of little overlap."""
    chart = overlap_chart(overlap.get("", []))
    if not chart:
        return ""
    subset = {c: p for c, curve in overlap.items() for p in curve if p.at_most == SHOWN_OVERLAP}
    parts = [
        "<h2>Without what stands in the training data</h2>",
        "<p>r(C) of a chunk is the longest run of tokens that it shares with one of its nearest "
        "training neighbours, over the chunk length. The curve is of the chunks with at most this "
        "much.</p>",
        f'<figure><div class="card">{chart}</div></figure>',
    ]
    if "" in subset:
        conditions = swept(subset[""].bits_per_byte)
        figures = {
            name: {c: {"bits_per_byte": point.bits_per_byte[name]} for c, point in subset.items()}
            for name in conditions
        }
        table = as_html(score_table(figures, "bits_per_byte", 4))
        count = f"{subset[''].chunks:,} chunks with r(C) at most {SHOWN_OVERLAP:.0%}"
        parts.append(f"<p class='dim small'>{count}:</p>{table}")
    return "".join(parts)


def _table_section(view: Table) -> str:
    """A further table."""
    caption = f"<p class='dim small'>{escape(view.caption)}</p>" if view.caption else ""
    return f"<h2>{escape(view.title)}</h2>{as_html(view)}{caption}"


def _chart_section(chart: ChartView) -> str:
    """A further chart; nothing where it has no point."""
    if not chart.svg:
        return ""
    return (
        f'<h2>{escape(chart.title)}</h2><figure><div class="card">{chart.svg}</div>'
        f"<figcaption class=small>{escape(chart.caption)}</figcaption></figure>"
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
    """Test chunks coloured by the gain from retrieval on each token."""
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
    """The bits per token that get the full colour: few of the tokens shown have more."""
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
        f'<section class="card"><header><h3>{escape(chunk.heading)}</h3>'
        f'<span class="caption">{escape(chunk.source)}</span>'
        f'<span class="small">{figure} <span class=dim>of {chunk.bits:.1f}</span></span></header>'
        f'<div class="pair"><div>{left}</div><div>{_neighbours(chunk.neighbours)}</div></div></section>'
    )


def _samples_section(samples: Sequence[SampleView]) -> str:
    """Generated texts, chunk by chunk with the neighbours retrieved."""
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
            f'<section class="card"><header><h3>{escape(sample.heading)}</h3>'
            f'<span class="caption">{escape(sample.settings)}</span></header>{pairs}</section>'
        )
    intro = (
        "<p>The prompt has a coloured ground. Beside each chunk stand the neighbours retrieved with "
        "it: the model reads them while it writes the chunk that follows.</p>"
    )
    return f"<h2>Samples</h2>{intro}{''.join(cards)}"


def _sample_text(chunk: SampleChunk) -> str:
    """A chunk of a sample, its prompt part marked."""
    prompt = f"<span class=prompt>{escape(chunk.prompt)}</span>" if chunk.prompt else ""
    return f'<div class="text">{prompt}{escape(chunk.generated)}</div>'


def _neighbours(neighbours: Sequence[NeighbourView]) -> str:
    """The neighbours of one chunk, nearest first."""
    if not neighbours:
        return '<p class="caption">nothing retrieved</p>'
    parts = []
    for neighbour in neighbours:
        parts.append(
            f'<div class="caption"><b>{escape(neighbour.document)}</b> · '
            f"{escape(neighbour.corpus)} · {escape(neighbour.score)} {neighbour.distance:.3f}</div>"
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
    text = escape(span.text)
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


def page(title: str, body: str, *, head: str = "") -> str:
    """A whole HTML document; `title` is plain text, `body` HTML, `head` more of its head."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{STYLE_SHEET}</style>{head}</head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
