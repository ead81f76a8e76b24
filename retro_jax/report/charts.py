"""Where retrieval helps: charts by k, by size of the database, by place in a chunk, by frequency."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from retro_jax.evaluate.conditions import condition_name, swept
from retro_jax.report.line_chart import Line, line_chart
from retro_jax.report.views import ChartView

_FEW = 30  # tokens below which a mean is not shown
_Y = "bits per byte"
_X = {"k": "neighbours a chunk", "database": "share of the retrieval database's documents, %"}
_TITLES = {"k": "By number of neighbours", "database": "By size of the retrieval database"}


def sweep_charts(results: Mapping[str, Any]) -> Iterator[ChartView]:
    """Bits per byte by k and by share of the database, where these were scored."""
    for kind, title in _TITLES.items():
        names = swept(results, kind)
        if len(names) < 2:
            continue
        x = [float(name.partition("_")[2]) * (100 if kind == "database" else 1) for name in names]
        y = [results[name]["all"]["bits_per_byte"] for name in names]
        if kind == "database" and "on" in results and x[-1] < 100:
            x, y = [*x, 100.0], [*y, results["on"]["all"]["bits_per_byte"]]
        lines = [Line("RETRO[ON]", x, y, "first")]
        for name, style in (("off", "second"), ("baseline", "third")):
            if name in results:
                level = results[name]["all"]["bits_per_byte"]
                lines.append(Line(condition_name(name), [x[0], x[-1]], [level, level], style))
        svg = line_chart(lines, x_label=_X[kind], y_label=_Y)
        yield ChartView(title, "All corpora together.", svg)


def window_charts(several: Mapping[str, Any] | None) -> Iterator[ChartView]:
    """Bits per byte by the overlap of windows, where several were scored."""
    if not several:
        return
    rows = several["rows"]
    x = [100 * row["overlap"] for row in rows]
    lines = [
        Line(
            condition_name(name), x, [row["figures"][name]["bits_per_byte"] for row in rows], style
        )
        for name, style in (("on", "first"), ("off", "second"), ("baseline", "third"))
        if name in rows[0]["figures"]
    ]
    svg = line_chart(lines, x_label="share of a window that is context only, %", y_label=_Y)
    caption = f"Windows of {several['chunks']} chunks; every token is scored once."
    yield ChartView("By overlap of windows", caption, svg)


def place_chart(gains: np.ndarray, counted: np.ndarray) -> ChartView:
    """Bits that retrieval saves on a token, by its place in its chunk.

    Args:
      gains: [n, M] bits. counted: [n, M] bool, the tokens with a gain.
    """
    count = counted.sum(axis=0)
    mean = np.where(counted, gains, 0).sum(axis=0) / np.maximum(count, 1)
    shown = np.flatnonzero(count >= _FEW)
    line = Line("ON vs OFF", shown.tolist(), mean[shown].tolist(), "first")
    caption = (
        "Above zero: retrieval makes tokens likelier. Neighbours are retrieved with the chunk before "
        "and read from its last token on, so the first token of a chunk has them too."
    )
    svg = line_chart([line], x_label="place in the chunk", y_label="bits saved a token")
    return ChartView("By place in the chunk", caption, svg)


def frequency_chart(
    gains: np.ndarray, counted: np.ndarray, tokens: np.ndarray, times: np.ndarray
) -> ChartView:
    """Bits that retrieval saves on a token, by how often the training split has it.

    Args:
      gains, counted: as above. tokens: [n, M]. times: [V] how often each token is in the training
        split.
    """
    group = np.floor(np.log2(np.maximum(times, 1))).astype(np.int64)[tokens[counted]]
    count = np.bincount(group)
    mean = np.bincount(group, gains[counted]) / np.maximum(count, 1)
    shown = np.flatnonzero(count >= _FEW)
    line = Line("ON vs OFF", shown.tolist(), mean[shown].tolist(), "first")
    svg = line_chart(
        [line], x_label="times in the training text, as a power of 2", y_label="bits saved a token"
    )
    return ChartView("By frequency of the token", f"Of groups with at least {_FEW} tokens.", svg)
