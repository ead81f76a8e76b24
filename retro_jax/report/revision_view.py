"""Tables of one model on several revisions of its database."""

from collections.abc import Iterator, Mapping
from typing import Any

from retro_jax.evaluate.conditions import condition_name, condition_order
from retro_jax.report.tables import interval
from retro_jax.report.views import Table

_CAPTION = (
    "One model, nothing trained in between. In brackets: 95% of 1,000 bootstrap resamples of the"
    " documents, which all revisions share."
)


def revision_tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """Bits per byte by revision, then the change from the revision before.

    Args:
      found: "rows" of evaluate.revisions.revision_figures, and "databases": for each row its revision,
        documents and chunks.
    """
    rows, databases = found["rows"], found["databases"]
    names = sorted(rows[0]["bits_per_byte"], key=condition_order)
    sizes = [
        [str(each["revision"]), f"{each['documents']:,}", f"{each['chunks']:,}"]
        for each in databases
    ]
    header = ["revision", "documents", "chunks", *map(condition_name, names)]
    cells = [
        [*size, *(interval(row["bits_per_byte"][name]) for name in names)]
        for size, row in zip(sizes, rows, strict=True)
    ]
    yield Table(header, cells, "Bits per byte by revision of the database", _CAPTION)
    if len(rows) > 1:
        changes = [
            [size[0], *(interval(row["change"][name], "+") for name in names)]
            for size, row in zip(sizes[1:], rows[1:], strict=True)
        ]
        header = ["revision", *map(condition_name, names)]
        yield Table(header, changes, "Change since the revision before", _CAPTION)
