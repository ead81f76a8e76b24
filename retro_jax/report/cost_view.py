"""What each condition costs beside what it gains: a table, and one chart of cost against bits."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from retro_jax.evaluate.conditions import (
    CONDITION_NAMES,
    SWEPT_NAMES,
    condition_name,
    condition_order,
    swept,
)
from retro_jax.report.line_chart import STYLES, short_number, ticks
from retro_jax.report.views import ChartView, Table

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 860, 340, 14, 46
_PANELS = ((66, 300), (346, 580))  # from and to, in pixels
_LEGEND = 606
_X = ("operations", "bytes_read")
_LABELS = ("operations a token", "bytes of memory read a token")
CAPTION = (
    "Counted, not timed. Operations: a forward pass of the model at the window's length, and beside it"
    " the look-ups: the retriever's BERT and search, and kNN-LM's distances. Read: bytes of the database"
    " or memory for a token of the text, at most. Kept: bytes for a token of the database."
)


def cost_table(results: Mapping[str, Any]) -> Table | None:
    """A row for each condition with a cost; None where no result has any."""
    names = [name for name in sorted(results, key=condition_order) if results[name].get("cost")]
    if not names:
        return None
    header = ["condition", "bits per byte", "model operations", "look-up operations"]
    header += ["bytes read", "bytes kept", "memory, bytes"]
    rows = []
    for name in names:
        cost, bits = results[name]["cost"], results[name]["all"]["bits_per_byte"]
        figures = ("operations", "lookup_operations", "bytes_read", "bytes_kept", "memory_bytes")
        cells = [_cell(cost[figure]) for figure in figures]
        rows.append([condition_name(name), "none" if bits is None else f"{bits:.4f}", *cells])
    return Table(header, rows, "What a token costs", CAPTION)


def cost_chart(results: Mapping[str, Any]) -> ChartView | None:
    """Bits per byte by operations, and by bytes read, of all conditions; None without any cost.

    A value of 0 is drawn at the left end of its logarithmic axis.
    """
    names = [name for name in sorted(results, key=condition_order) if _is_known(results[name])]
    if not names:
        return None
    bits = {name: results[name]["all"]["bits_per_byte"] for name in names}
    y_ticks = ticks(min(bits.values()), max(bits.values()))
    parts = []
    for panel, figure, label in zip(_PANELS, _X, _LABELS, strict=True):
        x = {name: _total(results[name]["cost"], figure) for name in names}
        parts.append(_panel(panel, x, bits, y_ticks, label))
    parts.append(_legend(sorted(swept(names), key=lambda name: bits[name]), bits, names))
    svg = (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="bits per byte over cost">{"".join(parts)}</svg>'
    )
    return ChartView("Cost against bits", f"Logarithmic; the left end is 0. {CAPTION}", svg)


def condition_style(name: str) -> str:
    """The colour of a condition in charts, a class of the style sheet; swept ones share one a kind."""
    others = [name for name in CONDITION_NAMES if name not in (*_FIRST, *_LAST)]
    kinds = [*_FIRST, *others, *SWEPT_NAMES, *_LAST]
    kind = name if name in CONDITION_NAMES else name.partition("_")[0]
    return STYLES[kinds.index(kind) % len(STYLES)]


_FIRST = ("on", "off", "baseline", "knn", "random", "oracle")  # keep their colours
_LAST = ("context+tokens", "context+random")  # came last, so that sweeps keep theirs


def _is_known(result: Mapping[str, Any]) -> bool:
    """Whether a result has bits, and a cost with its look-ups."""
    cost, bits = result.get("cost") or {}, result["all"]["bits_per_byte"]
    return cost.get("lookup_operations") is not None and bits is not None


def _total(cost: Mapping[str, float], figure: str) -> float:
    """A figure of a cost; operations with those of look-ups."""
    return cost[figure] + (cost["lookup_operations"] if figure == "operations" else 0.0)


def _cell(value: float | None) -> str:
    """A figure in three digits; nothing where it is not known."""
    if value is None:
        return ""
    return short_number(float(f"{value:.3g}"))


def _panel(
    panel: tuple[int, int],
    x: Mapping[str, float],
    bits: Mapping[str, float],
    y_ticks: Sequence[float],
    label: str,
) -> str:
    """One of the two pictures: a grid, a dot for each condition, a line for each sweep."""
    left, right = panel
    powers = _powers([value for value in x.values() if value > 0])
    has_zero = any(value <= 0 for value in x.values())
    low = powers[0] - has_zero
    inner, bottom = right - left - 16, _HEIGHT - _BOTTOM

    def across(value: float) -> float:
        place = math.log10(value) if value > 0 else float(low)
        return left + 8 + inner * (place - low) / max(1, powers[-1] - low)

    def up(value: float) -> float:
        height = bottom - _TOP
        return bottom - height * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = []
    for value in y_ticks:
        y = up(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        if left == _PANELS[0][0]:
            parts.append(_text(left - 8, y + 4, short_number(value), "tick", "end"))
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    stride = 1 + len(powers) // 7
    marks = [(across(10.0**p), short_number(10.0**p)) for p in powers[::stride]]
    for at, text in [*marks, *([(across(0.0), "0")] if has_zero else [])]:
        parts.append(_text(at, bottom + 18, text, "tick", "middle"))
    parts.append(_text((left + right) / 2, _HEIGHT - 6, label, "label", "middle"))
    for kind in SWEPT_NAMES:
        points = [(across(x[name]), up(bits[name])) for name in swept(x, kind)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line {condition_style(kind)}" points="{path}"/>')
    for name in x:
        title = f"{condition_name(name)}: {bits[name]:.4f} at {short_number(x[name])}"
        parts.append(
            f'<circle class="dot {condition_style(name)}" cx="{across(x[name]):.1f}"'
            f' cy="{up(bits[name]):.1f}" r="{4 if name in CONDITION_NAMES else 2.5}">'
            f"<title>{html.escape(title)}</title></circle>"
        )
    return "".join(parts)


def _powers(values: Sequence[float]) -> list[int]:
    """The powers of ten from below the least value to above the largest."""
    if not values:
        return [0, 1]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return list(range(low, max(high, low + 1) + 1))


def _legend(shown: Sequence[str], bits: Mapping[str, float], names: Sequence[str]) -> str:
    """The conditions from the best on, and the sweeps, each with its colour."""
    entries = [(name, f"{condition_name(name)} {bits[name]:.3f}") for name in shown]
    labels = {"k": "k neighbours", "database": "shares of the database", "ngrams": "13-grams left"}
    entries += [(kind, label) for kind, label in labels.items() if swept(names, kind)]
    parts = []
    for number, (name, label) in enumerate(entries):
        y = _TOP + 10 + 20 * number
        parts.append(f'<circle class="dot {condition_style(name)}" cx="{_LEGEND}" cy="{y}" r="4"/>')
        parts.append(_text(_LEGEND + 10, y + 4, label, f"name {condition_style(name)}", "start"))
    return "".join(parts)


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    """A text element."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{html.escape(text)}</text>'
