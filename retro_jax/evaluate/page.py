"""The shell of the report: one HTML page that loads nothing, in the reader's light or dark theme."""

import html

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --text: #1d2129; --dim: #667085; --rule: #e3e5e8;
  --code: #f5f6f7; --accent: #1f5fd0; --second: #c2570c; --third: #6b7280;
  --fourth: #0f8a6b; --fifth: #8b3fc9; --sixth: #b8860b;
  --more: 16, 150, 72; --less: 214, 50, 50; --shared: #fff1b8; --prompt: #eaf1ff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14161a; --card: #1b1e24; --text: #e4e7ec; --dim: #98a2b3; --rule: #2f343d;
    --code: #22262e; --accent: #7fb0ff; --second: #f6a15b; --third: #a3acba;
  --fourth: #4fc9a5; --fifth: #c08bf0; --sixth: #e0b64a;
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
.chart .grid { stroke: var(--rule); } .chart .axis { stroke: var(--dim); }
.chart .tick, .chart .label { fill: var(--dim); font-size: 12px; }
.chart .name { font-size: 13px; font-weight: 600; }
.chart .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .line.raw { stroke-width: 1; opacity: 0.22; }
.chart .first { stroke: var(--accent); } .chart .second { stroke: var(--second); }
.chart .third { stroke: var(--third); } .chart .fourth { stroke: var(--fourth); }
.chart .fifth { stroke: var(--fifth); } .chart .sixth { stroke: var(--sixth); }
.chart .dot.third, .chart .name.third { fill: var(--third); stroke: none; }
.chart .dot.fourth, .chart .name.fourth { fill: var(--fourth); stroke: none; }
.chart .dot.fifth, .chart .name.fifth { fill: var(--fifth); stroke: none; }
.chart .dot.sixth, .chart .name.sixth { fill: var(--sixth); stroke: none; }
.chart .dot.first, .chart .name.first { fill: var(--accent); stroke: none; }
.chart .dot.second, .chart .name.second { fill: var(--second); stroke: none; }
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
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 10px 0; font-size: 13.5px; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; `title` is plain text, `body` HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def table(
    header: list[str], rows: list[list[str]], *, best: list[int | None], total: bool = True
) -> str:
    """A table of plain texts.

    Args:
      header, rows: its cells. best: the column to emphasise in each row.
      total: whether the last row is one.
    """
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = []
    for number, (row, strong) in enumerate(zip(rows, best, strict=True)):
        cells = "".join(
            f"<td{' class=best' if column == strong else ''}>{html.escape(cell)}</td>"
            for column, cell in enumerate(row)
        )
        last = total and number == len(rows) - 1
        lines.append(f"<tr{' class=total' if last else ''}>{cells}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
