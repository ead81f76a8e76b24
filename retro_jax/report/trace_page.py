"""Texts with what retrieval changed in them, as one self-contained HTML page.

    trace_page([value])                            a file; value is trace_value.trace_value's
    trace_page(endpoint="/trace")                  the page of a server: with a box to type into
    answer = {"html": trace_body(value)}           what the server answers to that page

A served page posts {"prompt": text, "max_tokens": number, "temperature": number, "retrieval": bool}
as JSON to its endpoint, with a bearer key where one was typed in. Errors are answered as
{"error": {"message": text}} with their status; with 401 the page asks for a key.

Every text goes through escapes.escape. A content security policy allows no script and no style but the
page's own, by their hashes, and no connection but to the server that served it.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from retro_jax.report.escapes import escape, visible
from retro_jax.report.html import page
from retro_jax.report.trace_script import SCRIPT, STYLE
from retro_jax.report.trace_value import LEAST_COPY, LEAST_MATCH

STEPS = 8  # of a colour
_FULL_RANGE = (0.2, 4.0)  # nats of a change that gets the full colour
_HEADING = 80  # characters


def trace_page(
    traces: Sequence[Mapping[str, Any]] = (),
    *,
    title: str = "What retrieval changed",
    summary: str = "",
    endpoint: str | None = None,
    max_tokens: int = 128,
) -> str:
    """A page with traced texts, a box to type into, or both.

    Args:
      traces: values of trace_value.
      title, summary: above the texts.
      endpoint: where prompts are sent; None for a page without a box.
      max_tokens: in the box at first.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if summary:
        parts.append(f"<p class=dim>{escape(summary)}</p>")
    if endpoint is not None:
        parts.append(_form(endpoint, max_tokens))
    parts.append(f'<div id="answers">{"".join(map(trace_body, traces))}</div>')
    parts.append(
        '<aside id="details" class="details" aria-live="polite" aria-label="Figures" hidden></aside>'
    )
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_hash(SCRIPT)}'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; "
        f"connect-src {'none' if endpoint is None else 'self'!r}"
    )
    return page(
        title,
        "\n".join(parts) + f"<script>{SCRIPT}</script>",
        head=f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style>',
    )


def trace_body(value: Mapping[str, Any]) -> str:
    """One traced text as HTML, with the values that the page's script reads; `value` is trace_value's."""
    full = _full_colour(value)
    chunks = "".join(_chunk(value, number, full) for number in range(len(value["chunks"])))
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in value["facts"]
    )
    return (
        f'<article class="trace"><header><h2>{escape(_cut(value["heading"]))}</h2>'
        f"<p>{escape(_sum(value))}</p>{f'<dl>{facts}</dl>' if facts else ''}{_legend(value, full)}</header>"
        f'{chunks}<script type="application/json" class="values">{_embedded(_values(value))}</script>'
        "</article>"
    )


def _cut(heading: str) -> str:
    """The beginning of a heading, which may be a whole prompt, as one line."""
    line = " ".join(heading.split())
    return line if len(line) <= _HEADING else f"{line[: _HEADING - 1]}…"


def _hash(text: str) -> str:
    """A script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _embedded(value: Any) -> str:
    """JSON that no parser of HTML can take for markup."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _form(endpoint: str, max_tokens: int) -> str:
    """The box to type into."""
    return (
        f'<form id="ask" class="ask card" data-endpoint="{escape(endpoint)}">'
        '<label for="prompt"><b>Prompt</b></label>'
        '<textarea id="prompt" name="prompt" required spellcheck="false"></textarea><div class="row">'
        f'<label>Tokens <input type="number" name="max_tokens" min="1" value="{max_tokens}" required>'
        '</label><label>Temperature <input type="number" name="temperature" min="0" step="0.1" value="0.8"'
        ' required></label><label><input type="checkbox" name="retrieval" checked> Retrieval</label>'
        '<label class="key" hidden>Key <input type="password" name="key" autocomplete="off"></label>'
        '<button type="submit">Continue the text</button></div>'
        '<p class="status" role="status"></p></form>'
    )


def _reads(value: Mapping[str, Any], chunk: Mapping[str, Any]) -> bool:
    """Whether a chunk's tokens read any neighbour."""
    return any(neighbour is not None for neighbour in chunk["neighbours"])


def _sum(value: Mapping[str, Any]) -> str:
    """What retrieval changed in all."""
    count = _tokens(value["units"])
    if not value["retrieval"]:
        return f"{count:,} tokens, without retrieval."
    readers = [
        unit
        for chunk in value["chunks"]
        if _reads(value, chunk)
        for unit in value["units"][chunk["start"] : chunk["stop"]]
    ]
    change = sum(unit["with"] - unit["without"] for unit in readers)
    word = "saved" if change >= 0 else "cost"
    reading = _tokens(readers)
    share = f", {abs(change) / reading:.3f} a token" if reading else ""
    return (
        f"{count:,} tokens, {reading:,} of them after neighbours were read: "
        f"retrieval {word} {abs(change):.1f} nats{share}."
    )


def _tokens(units: Sequence[Mapping[str, Any]]) -> int:
    """The tokens of units."""
    return sum(unit.get("tokens", 1) for unit in units)


def _full_colour(value: Mapping[str, Any]) -> float:
    """The nats that get the full colour: few of the text's tokens change by more."""
    low, high = _FULL_RANGE
    sizes = sorted(abs(unit["with"] - unit["without"]) for unit in value["units"])
    return min(high, max(low, sizes[int(0.98 * (len(sizes) - 1))])) if sizes else high


def _legend(value: Mapping[str, Any], full: float) -> str:
    """What colours and lines mean."""
    if not value["retrieval"]:
        return ""
    return (
        '<div class="legend"><span>less likely <span class="ramp"></span> '
        f"more likely with retrieval; full colour from {full:.2g} nats</span>"
        '<span><span class="sample fallen">dotted</span> clearly less likely</span>'
        f'<span><span class="sample shared">thin line</span> {LEAST_MATCH} tokens or more in a row that a '
        f'neighbour has too, <span class="sample copied">thick</span> {LEAST_COPY} or more</span>'
        '<span><span class="sample prompt-end"></span>the prompt ends</span>'
        '<span><span class="sample continues"></span>a neighbour\'s continuation begins</span>'
        "<span>Point at a token, tap it, or move with the arrow keys: its figures are below, and in the "
        "neighbours violet shows where CCA attends from it.</span></div>"
    )


def _chunk(value: Mapping[str, Any], number: int, full: float) -> str:
    """One chunk of the text, and beside it the neighbours that its tokens read."""
    chunk = value["chunks"][number]
    marks = _marks(chunk["spans"])
    inside = range(chunk["start"], chunk["stop"])
    text = "".join(_unit(value, i, marks, full) for i in inside)
    neighbours = "".join(
        _neighbour(neighbour, slot, chunk["spans"], value["chunk_length"])
        for slot, neighbour in enumerate(chunk["neighbours"])
        if neighbour is not None
    )
    alone = "" if neighbours else " alone"
    if not neighbours:
        why = "nothing was retrieved before it" if value["retrieval"] else "retrieval is off"
        neighbours = f'<p class="caption">No neighbours: {why}.</p>'
    change = sum(value["units"][i]["with"] - value["units"][i]["without"] for i in inside)
    figure = ""
    if _reads(value, chunk):
        style, word = ("gain", "saved") if change >= 0 else ("loss", "cost")
        figure = f'<span class="small {style}">{abs(change):.1f} nats {word}</span>'
    return (
        f'<section class="card chunk{alone}" data-c="{number}"><header><h3>Chunk {number + 1}</h3>{figure}</header>'
        f'<div class="pair"><div><div class="text">{text}</div></div><div>{neighbours}</div></div></section>'
    )


def _marks(spans: Sequence[Mapping[str, Any]], slot: int | None = None) -> dict[int, str]:
    """Which tokens are in a matching span, of the text, or of one neighbour: class by place."""
    marks: dict[int, str] = {}
    for span in sorted(spans, key=lambda span: span["length"]):
        if slot is not None and span["neighbour"] != slot:
            continue
        first = span["start"] if slot is None else span["place"]
        name = "copied" if span["length"] >= LEAST_COPY else "shared"
        marks |= dict.fromkeys(range(first, first + span["length"]), name)
    return marks


def _unit(value: Mapping[str, Any], number: int, marks: Mapping[int, str], full: float) -> str:
    """One token of the text, coloured by its change."""
    unit = value["units"][number]
    change = unit["with"] - unit["without"]
    classes = ["u"]
    step = min(STEPS, round(STEPS * abs(change) / full))
    if step:
        classes.append(f"{'r' if change > 0 else 'f'}{step}")
    if change < -0.25 * full:
        classes.append("fallen")
    if unit["token"] in marks:
        classes.append(marks[unit["token"]])
    title = f"{unit['with']:.2f} nats, without retrieval {unit['without']:.2f}"
    made = (
        f'<span class="{" ".join(classes)}" data-u="{number}" title="{title}">{_shown(unit)}</span>'
    )
    if unit["token"] + 1 == value["prompt_length"]:
        made += '<span class="prompt-end" title="the prompt ends"></span>'
    return made


def _shown(unit: Mapping[str, Any]) -> str:
    """The text of a unit; a special token is a label, a line end is also a mark."""
    text = escape(unit["text"])
    if unit.get("special"):
        return f'<span class="label">{text}</span>'
    return text.replace("\n", '<span class="end"></span>\n')


def _neighbour(
    neighbour: Mapping[str, Any], slot: int, spans: Sequence[Mapping[str, Any]], length: int
) -> str:
    """One neighbour: its source, its chunk of `length` tokens, and its continuation."""
    marks = _marks(spans, slot)
    parts = ["", ""]
    for unit in neighbour["units"]:
        name = f' class="{marks[unit["token"]]}"' if unit["token"] in marks else ""
        span = f'<span data-t="{unit["token"]}"{name}>{_shown(unit)}</span>'
        parts[unit["token"] >= length] += span
    rest = f'<span class="continuation">{parts[1]}</span>' if parts[1] else ""
    revision = f" · revision {neighbour['revision']}" if neighbour["revision"] else ""
    place = f"chunk {neighbour['chunk']} of {neighbour['chunks']}"
    score = f"{escape(neighbour['kind'])} {neighbour['score']:.3f}"
    return (
        f'<div class="neighbour" data-n="{slot}"><div class="caption"><span class="number">{slot + 1}</span>'
        f"<span><b>{escape(neighbour['document'])}</b> · {escape(neighbour['corpus'])} · {place} · {score}"
        f'{revision}</span></div><div class="text">{parts[0]}{rest}</div></div>'
    )


def _values(value: Mapping[str, Any]) -> dict[str, Any]:
    """What the script reads; texts that it shows have no hidden characters."""
    units = []
    for chunk in value["chunks"]:
        reads = _reads(value, chunk)
        for unit in value["units"][chunk["start"] : chunk["stop"]]:
            shown = {key: unit[key] for key in _FIGURES if key in unit} | {"reads": reads}
            if "memory" in unit:
                shown["memory"] = _memory(unit["memory"])
            units.append(shown)
    spans = [
        {"spans": [{**span, "document": visible(span["document"])} for span in chunk["spans"]]}
        for chunk in value["chunks"]
    ]
    return {"units": units, "chunks": spans, "attention": value["attention"]}


_FIGURES = ("token", "tokens", "with", "without", "effects", "responsible")


def _memory(memory: Mapping[str, Any]) -> dict[str, Any]:
    """A memory's votes with visible texts."""
    following = [{**one, "text": visible(one["text"])} for one in memory["next"]]
    named = {"document": visible(memory["document"])} if "document" in memory else {}
    return {**memory, "next": following, **named}
