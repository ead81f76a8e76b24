"""A line chart as inline SVG, coloured by the page's style sheet.

Written here rather than drawn by a plotting library: the page must follow the reader's light or
dark theme and load nothing, and the colours of a picture from elsewhere are fixed.
"""

import dataclasses
import math
from collections.abc import Sequence

from retro_jax.report.escapes import escape

_WIDTH, _HEIGHT = 860, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 160, 14, 44


# Classes of the style sheet that are colours: on a light and on a dark ground.
_COLOURS = {
    "first": ("#1f5fd0", "#7fb0ff"),
    "second": ("#c2570c", "#f6a15b"),
    "third": ("#6b7280", "#a3acba"),
    "fourth": ("#0f8a6b", "#4fc9a5"),
    "fifth": ("#8b3fc9", "#c08bf0"),
    "sixth": ("#b8860b", "#e0b64a"),
    "seventh": ("#b3246b", "#ef7fb5"),
    "eighth": ("#2b8a9e", "#6fc7d8"),
    "ninth": ("#5b7d1f", "#a8cf63"),
    "tenth": ("#7a4a2b", "#d1a183"),
    "eleventh": ("#3f3fb5", "#9b9bf5"),
    "twelfth": ("#a33a3a", "#f08d8d"),
}
STYLES = tuple(_COLOURS)


def _rules(dark: bool) -> str:
    """The colours of every class, as rules."""
    return "\n".join(
        f".line.{style} {{ stroke: {pair[dark]}; }} .dot.{style}, .name.{style} {{ fill: {pair[dark]}; }}"
        for style, pair in _COLOURS.items()
    )


# Of any page or file with charts; a page may set the variables itself.
STYLE_SHEET = f"""
.chart {{ --chart-rule: #e3e5e8; --chart-dim: #667085; font-family: system-ui, sans-serif; }}
.chart .grid {{ stroke: var(--chart-rule); }} .chart .axis {{ stroke: var(--chart-dim); }}
.chart .tick, .chart .label {{ fill: var(--chart-dim); font-size: 12px; }}
.chart .name {{ font-size: 13px; font-weight: 600; }}
.chart .line {{ fill: none; stroke-width: 2; stroke-linejoin: round; }}
.chart .line.raw {{ stroke-width: 1; opacity: 0.22; }}
{_rules(False)}
@media (prefers-color-scheme: dark) {{
.chart {{ --chart-rule: #2f343d; --chart-dim: #98a2b3; }}
{_rules(True)}
}}
"""
_FILE_GROUND = """
svg { background: #fff; }
@media (prefers-color-scheme: dark) { svg { background: #1b1e24; } }
"""


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart: its label, its points, and a class of the style sheet for its colour."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Maps data coordinates to the picture."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Horizontal position in pixels."""
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Vertical position in pixels; larger values are higher up."""
        low, high = self.y_range
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """Draws the lines with axes, a grid and a label at each line's end.

    Points that are not finite are left out. Returns an SVG element, or "" without any point.
    """
    lines = [_finite(line) for line in lines]
    lines = [line for line in lines if line.x]
    if not lines:
        return ""
    x_ticks = ticks(min(min(line.x) for line in lines), max(max(line.x) for line in lines))
    y_ticks = ticks(min(min(line.y) for line in lines), max(max(line.y) for line in lines))
    axes = _Axes(
        (min(min(line.x) for line in lines), max(max(line.x) for line in lines)),
        (y_ticks[0], y_ticks[-1]),
    )
    if axes.x_range[0] == axes.x_range[1]:
        axes = dataclasses.replace(axes, x_range=(x_ticks[0], x_ticks[-1]))
    inner = [t for t in x_ticks if axes.x_range[0] <= t <= axes.x_range[1]]
    parts = [_grid(axes, inner, y_ticks), _labels(x_label, y_label)]
    parts += [_path(axes, line) for line in lines]
    parts += _end_labels(axes, lines)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} over {escape(x_label)}">{"".join(parts)}</svg>'
    )


def as_file(chart: str) -> str:
    """A chart as an SVG file of its own, light or dark as its reader; an empty one without a point."""
    chart = chart or f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}"></svg>'
    start, end, rest = chart.partition(">")
    head = start.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    return f"{head}{end}<style>{STYLE_SHEET}{_FILE_GROUND}</style>{rest}\n"


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from at most `low` to at least `high`."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    power = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power * about >= high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of up to `window` values around each place, as many before it as after it."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(window // 2, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def _finite(line: Line) -> Line:
    """The line without points that are None or not finite."""
    pairs = [
        pair
        for pair in zip(line.x, line.y, strict=True)
        if None not in pair and all(map(math.isfinite, pair))
    ]
    return dataclasses.replace(line, x=[x for x, _ in pairs], y=[y for _, y in pairs])


def _grid(axes: _Axes, x_ticks: list[float], y_ticks: list[float]) -> str:
    """Grid lines and the numbers beside them."""
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for value in y_ticks:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 8, y + 4, short_number(value), "tick", anchor="end"))
    for value in x_ticks:
        x = axes.x(value)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        )
        parts.append(_text(x, bottom + 18, short_number(value), "tick", anchor="middle"))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    return "".join(parts)


def _labels(x_label: str, y_label: str) -> str:
    """The names of the axes."""
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    turned = f'transform="rotate(-90 13 {(_HEIGHT - _BOTTOM) / 2:.0f})"'
    return _text(middle, _HEIGHT - 6, x_label, "label", anchor="middle") + _text(
        13, (_HEIGHT - _BOTTOM) / 2, y_label, "label", anchor="middle", extra=turned
    )


def _path(axes: _Axes, line: Line) -> str:
    """One line; a single point is drawn as a dot."""
    points = [(axes.x(x), axes.y(y)) for x, y in zip(line.x, line.y, strict=True)]
    if len(points) == 1:
        return f'<circle class="dot {line.style}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line {line.style}" points="{path}"/>'


def _end_labels(axes: _Axes, lines: Sequence[Line]) -> list[str]:
    """Each line's label at its last point, moved apart where they would overlap."""
    ends = sorted((axes.y(line.y[-1]), i) for i, line in enumerate(lines) if line.label)
    places: list[float] = []
    for y, _ in ends:
        places.append(max(y, places[-1] + 16) if places else y)
    too_low = max(0.0, places[-1] - (_HEIGHT - _BOTTOM)) if places else 0.0
    parts = []
    for (_, i), height in zip(ends, places, strict=True):
        x, style = axes.x(lines[i].x[-1]) + 8, f"name {lines[i].style}"
        parts.append(_text(x, height - too_low + 4, lines[i].label, style, anchor="start"))
    return parts


def _text(x: float, y: float, text: str, style: str, *, anchor: str, extra: str = "") -> str:
    """A text element."""
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>'
        f"{escape(text)}</text>"
    )


def short_number(value: float) -> str:
    """A number in few letters: 500k, 1.5M, 0.25."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{round(value / size, 6):g}{unit}"
    return f"{round(value, 6):g}"
