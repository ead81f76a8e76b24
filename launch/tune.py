"""Measures ScaNN's settings on a workdir's keys, and says which to put into the gin file.

    python -m launch.tune --workdir=W
    python -m launch.tune --workdir=W --gin_bindings='TuneConfig.target_recall = 0.98'

Builds trees over the keys of W (or over a sample of them) and searches with more and more leaves.
Writes every setting with its recall and its queries per second to W/tune.json. Prints the settings
that no other beats, and the fastest of them that reaches the target recall, as gin bindings. Changes
no index.
"""

import dataclasses
import os
import pathlib

from data_pipelines.retriever import revisions
from data_pipelines.retriever.index_tuning import (
    Point,
    TuneConfig,
    bindings,
    choose,
    frontier,
    measure,
)
from launch.common import app, configurables
from retro_jax.report.tables import as_text, text_row
from retro_jax.report.views import Table
from retro_jax.storage import files

FILE = "tune.json"
_HEADER = ("leaves", "searched", "block", "reorder", "recall", "queries/s")
_WIDTHS = (8, 8, 6, 8, 8, 10)  # of the columns, as rows are printed before all are known


def main() -> None:
    """Measures, writes and prints."""
    directory = pathlib.Path(app.required(app.WORKDIR, "the directory of a prepared database"))
    configurables.load_from_flags()
    config = configurables.make(TuneConfig)
    if configurables.PRINT_CONFIG.value:
        print(configurables.operative_config(), end="")
        return
    database = revisions.open_database(directory)
    keys = revisions.open_keys(database, directory)
    print(text_row(_HEADER, _WIDTHS), flush=True)

    def show(point: Point) -> None:
        print(text_row(_row(point), _WIDTHS), flush=True)

    points = measure(keys, config, report=show)
    best = frontier(points)
    result = {
        "config": config,
        "keys": keys.manifest.hash,
        "cores": os.cpu_count(),
        "points": points,
        "frontier": best,
    }
    path = directory / FILE
    files.write_atomically(path, files.to_json(files.plain(_plain(result))))
    print("\nnot beaten in both recall and speed:")
    print(as_text(Table(_HEADER, [_row(point) for point in best])))
    print(f"\nwritten to {path}; for recall@{config.k} of {config.target_recall}:")
    print("\n".join(bindings(choose(points, config.target_recall).plan)))


def _plain(result: dict[str, object]) -> dict[str, object]:
    """Dataclasses within lists as mappings too."""
    return {
        name: [dataclasses.asdict(point) for point in value] if isinstance(value, list) else value
        for name, value in result.items()
    }


def _row(point: Point) -> list[str]:
    """A row of the table."""
    plan = point.plan
    return [
        f"{plan.num_leaves:,}",
        f"{plan.leaves_to_search:,}",
        f"{plan.dimensions_per_block}",
        f"{plan.reorder:,}",
        f"{point.recall:.4f}",
        f"{point.queries_per_second:,.0f}",
    ]


if __name__ == "__main__":
    app.run(main)
