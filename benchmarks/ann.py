"""Recall@10 against queries a second: ScaNN with all it offers, beside FAISS, in one run.

    python benchmarks/ann.py --workdir=W [--keys=keys.npy] [--faiss_python=/elsewhere/bin/python]

Keys are a workdir's, or rows [n, d] float32 of a .npy file; queries are a sample of them, none its own
neighbour. FAISS runs in an environment of its own, on the same keys and queries:

    python -m venv /elsewhere && /elsewhere/bin/pip install faiss-cpu==1.15.1 numpy==2.4.6

Each index is built once and searched with more and more leaves. Every row has recall@10, queries a
second over all cores with all queries in one call, and microseconds of a single query, one core. The
last lines are the fastest setting of each index at the target recall.
"""

import dataclasses
import json
import math
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags

from data_pipelines import revisions
from data_pipelines.exact import ExactSearcher

_WORKDIR = flags.DEFINE_string("workdir", None, "A prepared workdir.")
_KEYS = flags.DEFINE_string("keys", None, "Or a .npy file of keys.")
_FAISS = flags.DEFINE_string("faiss_python", None, "An interpreter that has faiss-cpu.")
_QUERIES = flags.DEFINE_integer("queries", 2000, "How many keys ask.", lower_bound=1)
_TARGET = flags.DEFINE_float("target_recall", 0.95, "For the last lines.")
_MOST = flags.DEFINE_integer("most_keys", 0, "Take so many keys only; 0 for all.")
_K, _ROUNDS = 10, 3  # the best of so many rounds counts, on both sides
_SHARES = (0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2)  # of the leaves


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured setting."""

    index: str
    searched: int
    recall: float
    queries_per_second: float
    single_us: float

    def __str__(self) -> str:
        rates = f"{self.queries_per_second:10,.0f} {self.single_us:10,.0f}"
        return f"{self.index:54} {self.searched:8} {self.recall:8.4f} {rates}"


_FAISS_PROGRAM = """
import json, math, os, sys, time
import faiss, numpy as np

folder, shares = sys.argv[1], json.loads(sys.argv[2])
keys, queries = (np.load(f"{folder}/{name}.npy") for name in ("keys", "queries"))
faiss.omp_set_num_threads(os.cpu_count())
n, d = keys.shape
leaves = round(math.sqrt(n))
names = ["Flat", f"IVF{leaves},Flat", f"IVF{leaves},PQ{d // 4}x4fs,RFlat"]
names += [f"IVF{4 * leaves},PQ{d // 4}x4fs,RFlat"]
for name in names:
    index = faiss.index_factory(d, name)
    index.train(keys[np.random.default_rng(0).permutation(n)[:100_000]])
    index.add(keys)
    lists = int(name.split(",")[0][3:]) if name.startswith("IVF") else 0
    for searched in sorted({max(1, round(lists * share)) for share in shares}) if lists else [0]:
        base = faiss.downcast_index(index)
        if hasattr(base, "base_index"):
            base.k_factor = 10
            base = faiss.downcast_index(base.base_index)
        if lists:
            base.nprobe = searched
        index.search(queries[:64], 11)
        seconds = math.inf
        for _ in range(3):
            start = time.perf_counter()
            _, rows = index.search(queries, 11)
            seconds = min(seconds, time.perf_counter() - start)
        faiss.omp_set_num_threads(1)
        start = time.perf_counter()
        for query in queries[:100]:
            index.search(query[None], 11)
        single = (time.perf_counter() - start) / 100
        faiss.omp_set_num_threads(os.cpu_count())
        np.save(f"{folder}/rows.npy", rows)
        print(json.dumps([name, searched, seconds, single]), flush=True)
        sys.stdin.readline()  # until the rows are read
"""


def _scann_builders(keys: np.ndarray) -> Iterator[tuple[str, int, int, Callable[[], Any]]]:
    """(name, leaves, batch size, build) of every index that ScaNN is tried with.

    Keys of length 1 have the same neighbours by dot product, which is what SOAR needs.
    """
    from scann.scann_ops.py import scann_builder, scann_ops_pybind

    count = len(keys)
    sample = min(count, 100_000)
    kinds = scann_builder.ReorderType
    unit = np.allclose(np.linalg.norm(keys[:1000], axis=1), 1, atol=1e-3)
    leaves_of = [round(m * math.sqrt(count)) for m in (1, 4)]
    variants: list[tuple[str, int, float | None, Any, int]] = [
        ("squared_l2", block, None, kinds.FLOAT32, 1) for block in (2, 4)
    ]
    variants += [
        ("squared_l2", 4, None, kinds.FLOAT32, 256),
        ("squared_l2", 4, None, kinds.INT8, 256),
    ]
    if unit:
        variants += [("dot_product", 4, soar, kinds.FLOAT32, 256) for soar in (None, 1.5)]
        variants += [("dot_product", 2, 1.5, kinds.BFLOAT16, 256)]
    for leaves in leaves_of:
        for distance, block, soar, reorder, batch in variants:

            def build(
                leaves: int = leaves,
                distance: str = distance,
                block: int = block,
                soar: float | None = soar,
                reorder: Any = reorder,
            ) -> Any:
                builder = scann_ops_pybind.builder(keys, _K + 1, distance)
                tree = builder.tree(leaves, leaves, training_sample_size=sample, soar_lambda=soar)
                hashed = tree.score_ah(
                    block,
                    anisotropic_quantization_threshold=float("nan"),
                    training_sample_size=sample,
                )
                return hashed.reorder(100, quantize=reorder).build()

            parts = [f"ScaNN {distance}", f"{leaves} leaves", f"{block} a block", f"batch {batch}"]
            parts += [f"SOAR {soar}"] if soar else []
            parts += [reorder.name.lower()] if reorder is not kinds.FLOAT32 else []
            yield ", ".join(parts), leaves, batch, build


def _run_scann(keys: np.ndarray, queries: np.ndarray, judge: Callable[[Any], float]) -> list[Row]:
    """Measures ScaNN."""
    rows = []
    for name, leaves, batch, build in _scann_builders(keys):
        searcher = build()
        for searched in sorted({max(1, round(leaves * share)) for share in _SHARES}):
            options = {"leaves_to_search": searched, "pre_reorder_num_neighbors": 100}

            def search(
                some: np.ndarray, searcher: Any = searcher, batch: int = batch, **more: int
            ) -> Any:
                return searcher.search_batched_parallel(some, _K + 1, batch_size=batch, **more)[0]

            search(queries[:64], **options)
            seconds = math.inf
            for _round in range(_ROUNDS):
                start = time.perf_counter()
                found = search(queries, **options)
                seconds = min(seconds, time.perf_counter() - start)
            start = time.perf_counter()
            for query in queries[:100]:
                searcher.search(query, _K + 1, **options)
            single = (time.perf_counter() - start) / 100
            rows.append(Row(name, searched, judge(found), len(queries) / seconds, 1e6 * single))
            print(rows[-1], flush=True)
    return rows


def _run_faiss(keys: np.ndarray, queries: np.ndarray, judge: Callable[[Any], float]) -> list[Row]:
    """Measures FAISS in its own interpreter."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/keys.npy", keys)
        np.save(f"{folder}/queries.npy", queries)
        command = [str(_FAISS.value), "-c", _FAISS_PROGRAM, folder, json.dumps(_SHARES)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            for line in process.stdout:
                name, searched, seconds, single = json.loads(line)
                recall = judge(np.load(f"{folder}/rows.npy"))
                rate = len(queries) / seconds
                rows.append(Row(f"FAISS {name}", searched, recall, rate, 1e6 * single))
                print(rows[-1], flush=True)
                process.stdin.write("\n")
                process.stdin.flush()
        if process.returncode:
            raise SystemExit(f"{command[0]} ended with status {process.returncode}")
    return rows


def _load() -> np.ndarray:
    """The keys [n, d]."""
    if _KEYS.value:
        rows = np.load(_KEYS.value).astype(np.float32)
    else:
        directory = pathlib.Path(_WORKDIR.value or "")
        keys = revisions.open_keys(revisions.open_database(directory), directory)
        rows = np.concatenate([block for _, block in keys.blocks()])
    return np.ascontiguousarray(rows[: _MOST.value or None])


def main(_: list[str]) -> None:
    """Measures both and prints the table."""
    keys = _load()
    asked = np.sort(
        np.random.default_rng(0).choice(len(keys), min(_QUERIES.value, len(keys)), False)
    )
    queries = keys[asked]

    def others(rows: np.ndarray) -> np.ndarray:
        order = np.argsort(rows == asked[:, None], axis=1, kind="stable")
        return np.take_along_axis(np.asarray(rows, np.int64), order, axis=1)[:, :_K]

    truth = others(ExactSearcher(keys).search(queries, _K + 1)[0])

    def judge(rows: np.ndarray) -> float:
        return float((others(rows)[:, :, None] == truth[:, None, :]).any(2).mean())

    print(f"{len(keys):,} keys of {keys.shape[1]} dimensions, {len(queries):,} queries")
    print(f"{'index':54} {'searched':>8} {'recall':>8} {'queries/s':>10} {'single us':>10}")
    rows = _run_scann(keys, queries, judge)
    if _FAISS.value:
        rows += _run_faiss(keys, queries, judge)
    print(f"\nfastest of each at recall@{_K} {_TARGET.value}:")
    for name in dict.fromkeys(row.index for row in rows):
        enough = [row for row in rows if row.index == name and row.recall >= _TARGET.value]
        if enough:
            print(max(enough, key=lambda row: row.queries_per_second))


if __name__ == "__main__":
    app.run(main)
