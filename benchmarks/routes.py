"""How many of the true neighbours are in the few index shards that a query visits.

    python -m benchmarks.routes --routes_workdir=W [--divisions=32] [--copies=1,2,3]

Divides the keys of W's training split among --divisions shards as IndexConfig.visit_shards would, and
compares held-out queries with every key. Printed for each number of copies and of visited shards: recall@10
against brute force, as if every shard found all that it has, and the share of all keys that is compared.
Before that, what it costs to find the shards.
"""

import pathlib
import time

import numpy as np
from absl import app, flags

from data_pipelines.retriever.exact import ExactSearcher
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.routes import Routes
from data_pipelines.workdir.preparation import open_keys

_WORKDIR = flags.DEFINE_string("routes_workdir", None, "W with keys.")
_DIVISIONS = flags.DEFINE_integer("divisions", 32, "Index shards.", lower_bound=2)
_COPIES = flags.DEFINE_list("copies", ["1", "2", "3"], "Shards that have a key.")
_QUERIES = flags.DEFINE_integer("held_out_queries", 1000, "Of the held-out splits.", lower_bound=1)
_VISITS = (1, 2, 4, 6, 8, 12, 16)
_K = 10


def with_text(keys: Keys, most: int) -> np.ndarray:
    """Keys of some chunks, in equal distances."""
    rows = keys.rows(np.unique(np.linspace(0, len(keys) - 1, most).astype(np.int64)))
    return rows[~np.isnan(rows[:, 0])]


def main(_: list[str]) -> None:
    """Prints a table."""
    if _WORKDIR.value is None:
        raise app.UsageError("--routes_workdir is missing: expected a workdir with keys")
    folder = pathlib.Path(_WORKDIR.value)
    keys = open_keys(folder, "train")
    held_out = [open_keys(folder, split) for split in ("validation", "test")]
    queries = np.concatenate([with_text(k, _QUERIES.value // 2) for k in held_out])
    every = with_text(keys, len(keys))
    truth, _ = ExactSearcher(every, on_devices=False).search(queries, _K)
    routes = Routes.train(keys, _DIVISIONS.value)
    print(f"{len(every):,} keys in {routes.count} shards, {len(queries):,} queries, recall@{_K}")
    start = time.process_time()
    order = routes.visits(queries, max(_VISITS))
    took = (time.process_time() - start) / len(queries) / len(routes.cells)
    print(f"{1e9 * took:.0f} ns of a core for each query and each of {len(routes.cells):,} cells")
    for copies in map(int, _COPIES.value):
        owners = routes.visits(every, copies)
        sizes = np.bincount(owners.ravel(), minlength=routes.count)
        print(f"copies {copies}: largest shard {sizes.max() / sizes.mean():.2f} of the mean")
        for visits in _VISITS:
            visited = order[:, None, :visits, None]
            found = (owners[truth][:, :, None] == visited).any((2, 3))
            compared = sizes[order[:, :visits]].sum(1).mean() / len(every)
            print(f"  {visits:3} of {routes.count}: {found.mean():.4f}, compares {compared:.1%}")


if __name__ == "__main__":
    app.run(main)
