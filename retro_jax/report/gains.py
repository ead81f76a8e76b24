"""What retrieval gained, in a few lines: the end of the quickstart."""

from collections.abc import Mapping
from typing import Any

from retro_jax.evaluate.conditions import SHOWN_OVERLAP, condition_name
from retro_jax.report.tables import as_text, excludes_zero, interval
from retro_jax.report.views import Table

_PAIR = ("baseline", "on")
_MORE = ("baseline+tokens", "tokens")


def gain_table(overlap: Mapping[str, Any]) -> Table:
    """RETRO[ON] against the baseline by corpus, for all chunks and those that share little.

    Args:
      overlap: figures by overlap, as launch.evaluate writes them.
    """
    by_place = {(row["corpus"], row["at_most"]): row for row in overlap["rows"]}
    named = sorted({corpus for corpus, _ in by_place} - {""})
    rows: list[list[str]] = []
    more = [name for name in _MORE if name in overlap["rows"][0]["bits_per_byte"]]
    for corpus in named or [""]:
        for limit, label in ((1.0, ""), (SHOWN_OVERLAP, ", no long copy")):
            row = by_place[corpus, limit]
            if limit < 1 and row["chunks"] == by_place[corpus, 1.0]["chunks"]:
                continue  # the same figures again
            figures, difference = row["bits_per_byte"], row["differences"]["on-baseline"]
            before, after = (figures[name]["value"] for name in _PAIR)
            if None in (before, after, *difference.values()):
                continue  # no chunk is under the limit
            rows.append(
                [
                    f"{corpus or 'all'}{label}",
                    f"{before:.4f}",
                    f"{after:.4f}",
                    f"{after / before - 1:+.1%}",
                    interval(difference, "+"),
                    "sure" if excludes_zero(difference) else "may be chance",
                    *(f"{figures[name]['value']:.4f}" for name in more),
                ]
            )
    header = ["", *map(condition_name, _PAIR), "change", "difference, 95% interval", ""]
    caption = (
        f"No long copy: chunks of which a neighbour has at most {SHOWN_OVERLAP:.0%} in one piece."
    )
    return Table([*header, *map(condition_name, more)], rows, "What retrieval gained", caption)


def format_gains(overlap: Mapping[str, Any]) -> str:
    """The table as text, with what its figures are."""
    table = gain_table(overlap)
    about = "Bits per byte of texts that no model was trained on: fewer are better."
    return f"{table.title}\n{as_text(table)}\n{about}\n{table.caption}"
