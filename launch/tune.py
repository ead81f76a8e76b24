"""Measures ScaNN's settings on a workdir's keys, and says which to put into the gin file.

    python -m launch.tune --workdir=W
    python -m launch.tune --workdir=W --gin_bindings='TuneConfig.target_recall = 0.98'

Builds trees over the keys of W (or over a sample of them), searches with more and more leaves, and writes
every setting with its recall and its queries a second to W/tune.json. Prints the settings that no other
beats, and the fastest of them that reaches the target recall as gin bindings. Changes no index.
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
from retro_jax.storage import files

FILE = "tune.json"
_HEADING = (
    f"{'leaves':>8} {'searched':>8} {'block':>6} {'reorder':>8} {'recall':>8} {'queries/s':>10}"
)


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
    print(_HEADING, flush=True)
    points = measure(keys, config, report=lambda point: print(_line(point), flush=True))
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
    print(f"\nnot beaten in both recall and speed:\n{_HEADING}")
    print("\n".join(map(_line, best)))
    print(f"\nwritten to {path}; for recall@{config.k} of {config.target_recall}:")
    print("\n".join(bindings(choose(points, config.target_recall).plan)))


def _plain(result: dict[str, object]) -> dict[str, object]:
    """Dataclasses within lists as mappings too."""
    return {
        name: [dataclasses.asdict(point) for point in value] if isinstance(value, list) else value
        for name, value in result.items()
    }


def _line(point: Point) -> str:
    """A row of the table."""
    plan = point.plan
    return (
        f"{plan.num_leaves:8,} {plan.leaves_to_search:8,} {plan.dimensions_per_block:6}"
        f" {plan.reorder:8,} {point.recall:8.4f} {point.queries_per_second:10,.0f}"
    )


if __name__ == "__main__":
    app.run(main)
