"""Queries a second at a target recall@10: ScaNN with all it offers, beside FAISS, in one run.

    python -m benchmarks.ann --workdir=W [--faiss_python=/elsewhere/bin/python] [--most_keys=175000]
    python -m benchmarks.ann --keys=keys.npy [--variants=3,4] [--output=ann.json]

Keys are a workdir's, or rows [n, d] float32 of a .npy file; queries are a sample of them, none its own
neighbour. FAISS runs in a separate environment, on the same keys, queries and cores:

    python -m venv /elsewhere && /elsewhere/bin/pip install faiss-cpu==1.15.1 numpy==2.4.6

Each index is built once. For each number of candidates that are compared again exactly, the benchmark
searches for the fewest leaves that reach the target, and times them with several batch sizes. Around
the fastest such setting it measures the curve: half and twice the leaves. A row has recall@10,
queries per second of all allowed cores with all queries in one call, and microseconds of a query that
comes alone, on one core. Each is the best of three rounds, on both sides. Rows are printed, and
written to --output, as they are measured.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
from absl import app, flags

from data_pipelines.retriever import revisions
from data_pipelines.retriever.exact import ExactSearcher

_WORKDIR = flags.DEFINE_string("workdir", None, "A prepared workdir.")
_KEYS = flags.DEFINE_string("keys", None, "Or a .npy file of keys.")
_FAISS = flags.DEFINE_string("faiss_python", None, "An interpreter that has faiss-cpu.")
_QUERIES = flags.DEFINE_integer("queries", 2000, "How many keys ask.", lower_bound=1)
_TARGET = flags.DEFINE_float("target_recall", 0.95, "At which indexes are compared.")
_MOST = flags.DEFINE_integer("most_keys", 0, "Take so many keys only; 0 for all.")
_VARIANTS = flags.DEFINE_list("variants", [], "Only ScaNN's variants of these numbers; from 0.")
_OUTPUT = flags.DEFINE_string("output", None, "Write the rows to this JSON file.")
_K, _ROUNDS, _ALONE = 10, 3, 200
_REORDER = (30, 60, 120)
_BATCHES = (1, 32, 256)
_MOST_LEAVES = 0.4  # share beyond which a tree is no use

Ids = np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured setting of an index."""

    index: str
    leaves: int
    searched: int
    reorder: int
    batch: int
    recall: float
    queries_per_second: float
    single_us: float

    def __str__(self) -> str:
        places = f"{self.searched:6}/{self.leaves:<6} {self.reorder:7} {self.batch:6}"
        rates = f"{self.recall:7.4f} {self.queries_per_second:10,.0f} {self.single_us:10,.0f}"
        return f"{self.index:46} {places} {rates}"


class Index(Protocol):
    """A built index.

    Attributes:
      name, leaves: its label and number of leaves.
      reorders: numbers of candidates that it is tried with.
      batches: sizes that its search is tried with.
    """

    name: str
    leaves: int
    reorders: tuple[int, ...]
    batches: tuple[int, ...]

    def find(self, searched: int, reorder: int, batch: int, rounds: int) -> tuple[Ids, float]:
        """Neighbours of all queries, and the least seconds of some rounds."""
        ...

    def single(self, searched: int, reorder: int) -> float:
        """Seconds of a query that comes alone."""
        ...


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to build ScaNN's index.

    Attributes:
      distance: "dot_product" is for keys of length 1, which have the same neighbours by it: only then
        does ScaNN code residuals, share one top-N over leaves, and offer SOAR.
      leaves: times the square root of the number of keys.
      block: dimensions of a code.
      soar: SOAR's lambda; None without.
      reorder: the type in which candidates are compared again: FLOAT32, BFLOAT16 or INT8.
      anisotropic: the threshold of anisotropic quantisation; NaN without.
      centroids: whether centroids are compared in 8 bits.
      pca: dimensions that keys are cut to before they are coded; 0 for all.
    """

    distance: str = "dot_product"
    leaves: float = 4
    block: int = 2
    soar: float | None = None
    reorder: str = "FLOAT32"
    anisotropic: float = math.nan
    centroids: bool = False
    pca: int = 0

    @property
    def name(self) -> str:
        """Its settings in words."""
        parts = [f"ScaNN {self.distance[:3]}", f"{self.leaves:g} root n", f"{self.block} a code"]
        parts += [f"SOAR {self.soar}"] if self.soar else []
        parts += [self.reorder.lower()] if self.reorder != "FLOAT32" else []
        parts += [f"anisotropic {self.anisotropic}"] if self.anisotropic > 0 else []
        parts += ["int8 centroids"] if self.centroids else []
        return ", ".join(parts + ([f"pca {self.pca}"] if self.pca else []))


VARIANTS = (
    Variant("squared_l2", leaves=1, block=4),
    Variant("squared_l2", block=4),
    Variant("squared_l2"),
    Variant(block=4),
    Variant(),
    Variant(leaves=1),
    Variant(reorder="INT8"),
    Variant(reorder="BFLOAT16", centroids=True),
    Variant(soar=1.5),
    Variant(block=4, soar=1.5),
    Variant(anisotropic=0.2),
    Variant(pca=192),
)


class ScannIndex:
    """ScaNN, of a variant."""

    reorders, batches = _REORDER, _BATCHES

    def __init__(self, variant: Variant, keys: np.ndarray, queries: np.ndarray) -> None:
        from scann.scann_ops.py import scann_builder, scann_ops_pybind

        self.name, self._queries = variant.name, queries
        self.leaves = round(variant.leaves * math.sqrt(len(keys)))
        sample = min(len(keys), 100_000)
        builder = scann_ops_pybind.builder(keys, _K + 1, variant.distance)
        if variant.pca:
            builder = builder.pca(variant.pca, None)
        tree = builder.tree(
            self.leaves,
            self.leaves,
            training_sample_size=sample,
            soar_lambda=variant.soar,
            quantize_centroids=variant.centroids,
        )
        hashed = tree.score_ah(
            variant.block,
            anisotropic_quantization_threshold=variant.anisotropic,
            training_sample_size=sample,
        )
        kind = scann_builder.ReorderType[variant.reorder]
        self._searcher = hashed.reorder(max(_REORDER), quantize=kind).build()
        self._searcher.set_num_threads(cores())

    def find(self, searched: int, reorder: int, batch: int, rounds: int) -> tuple[Ids, float]:
        """As `Index`."""
        seconds, rows = math.inf, None
        for _ in range(rounds):
            start = time.perf_counter()
            rows = self._searcher.search_batched_parallel(
                self._queries, _K + 1, reorder, searched, batch_size=batch
            )[0]
            seconds = min(seconds, time.perf_counter() - start)
        return np.asarray(rows, np.int64), seconds

    def single(self, searched: int, reorder: int) -> float:
        """As `Index`."""
        return _least(self._queries, lambda q: self._searcher.search(q, _K + 1, reorder, searched))


_FAISS_PROGRAM = """
import json, math, sys, time
import faiss, numpy as np

folder, cores, rounds, alone = sys.argv[1], *map(int, sys.argv[2:5])
keys, queries = (np.load(f"{folder}/{name}.npy") for name in ("keys", "queries"))
n, d = keys.shape
print(json.dumps(faiss.get_compile_options().strip()), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    faiss.omp_set_num_threads(cores)
    if "build" in asked:
        index = faiss.index_factory(d, asked["build"])
        index.train(keys[np.random.default_rng(0).permutation(n)[:100_000]])
        index.add(keys)
        print("{}", flush=True)
        continue
    base = faiss.downcast_index(index)
    if hasattr(base, "base_index"):
        base.k_factor = max(1.0, asked["reorder"] / 11)
        base = faiss.downcast_index(base.base_index)
    base.nprobe = asked["searched"]
    if asked["rounds"]:
        seconds = math.inf
        for _ in range(asked["rounds"]):
            start = time.perf_counter()
            _, rows = index.search(queries, 11)
            seconds = min(seconds, time.perf_counter() - start)
        np.save(f"{folder}/rows.npy", rows)
    else:
        faiss.omp_set_num_threads(1)
        seconds = math.inf
        for _ in range(rounds):
            start = time.perf_counter()
            for query in queries[:alone]:
                index.search(query[None], 11)
            seconds = min(seconds, (time.perf_counter() - start) / len(queries[:alone]))
    print(json.dumps(seconds), flush=True)
"""


class Faiss:
    """FAISS in its own interpreter; has one index at a time."""

    def __init__(self, folder: str, keys: np.ndarray, queries: np.ndarray) -> None:
        self._folder = folder
        np.save(f"{folder}/keys.npy", keys)
        np.save(f"{folder}/queries.npy", queries)
        numbers = map(str, (cores(), _ROUNDS, _ALONE))
        self._process = subprocess.Popen(
            [str(_FAISS.value), "-c", _FAISS_PROGRAM, folder, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(f"FAISS was compiled with {self._reply()}", flush=True)

    def ask(self, **what: Any) -> Any:
        """Its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._reply()

    def rows(self) -> Ids:
        """The neighbours of its last search."""
        return np.load(f"{self._folder}/rows.npy")

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _reply(self) -> Any:
        """The next line."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{_FAISS.value} ended with status {self._process.wait()}")
        return json.loads(line)


class FaissIndex:
    """An index of FAISS's factory."""

    batches = (0,)  # its own choice

    def __init__(self, faiss: Faiss, factory: str) -> None:
        self.name, self._faiss = f"FAISS {factory}", faiss
        self.leaves = int(factory.split(",")[0][3:])
        self.reorders = _REORDER if "RFlat" in factory else (0,)
        faiss.ask(build=factory)

    def find(self, searched: int, reorder: int, batch: int, rounds: int) -> tuple[Ids, float]:
        """As `Index`."""
        seconds = self._faiss.ask(searched=searched, reorder=reorder, rounds=rounds)
        return self._faiss.rows(), seconds

    def single(self, searched: int, reorder: int) -> float:
        """As `Index`."""
        return self._faiss.ask(searched=searched, reorder=reorder, rounds=0)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def faiss_factories(count: int, dimension: int) -> list[str]:
    """Its indexes that are tried: fast-scan codes of 4 and 2 dimensions, and no codes."""
    one, four = round(math.sqrt(count)), round(4 * math.sqrt(count))
    fast = [f"IVF{n},PQ{dimension // m}x4fs,RFlat" for n in (one, four) for m in (4, 2)]
    return [*fast, f"IVF{one},PQ{dimension // 4}x4fsr,RFlat", f"IVF{one},Flat"]


def _least(queries: np.ndarray, search: Callable[[np.ndarray], Any]) -> float:
    """Seconds a query, one after the other, of the best round."""
    subset, seconds = queries[:_ALONE], math.inf
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for query in subset:
            search(query)
        seconds = min(seconds, (time.perf_counter() - start) / len(subset))
    return seconds


def fewest_leaves(index: Index, reorder: int, judge: Callable[[Ids], float]) -> int | None:
    """The fewest leaves that reach the target, within a tenth; None if 40% of them do not."""

    def reaches(searched: int) -> bool:
        return judge(index.find(searched, reorder, index.batches[-1], 1)[0]) >= _TARGET.value

    low, high = 0, max(1, index.leaves // 100)
    while not reaches(high):
        if high >= _MOST_LEAVES * index.leaves:
            return None
        low, high = high, min(2 * high, index.leaves)
    while high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def measure(index: Index, queries: int, judge: Callable[[Ids], float]) -> Iterator[Row]:
    """The rows of one index."""

    def row(searched: int, reorder: int, batch: int) -> Row:
        rows, seconds = index.find(searched, reorder, batch, _ROUNDS)
        single = 1e6 * index.single(searched, reorder)
        settings = (index.name, index.leaves, searched, reorder, batch)
        return Row(*settings, judge(rows), queries / seconds, single)

    at_target = []
    for reorder in index.reorders:
        searched = fewest_leaves(index, reorder, judge)
        if searched is not None:
            for batch in index.batches:
                at_target.append(row(searched, reorder, batch))
                yield at_target[-1]
    if not at_target:
        most = max(1, round(_MOST_LEAVES * index.leaves))
        yield row(most, max(index.reorders), index.batches[-1])
        return
    best = max(at_target, key=lambda setting: setting.queries_per_second)
    for searched in (best.searched // 2, min(2 * best.searched, index.leaves)):
        if searched:
            yield row(searched, best.reorder, best.batch)


def indexes(keys: np.ndarray, queries: np.ndarray, folder: str) -> Iterator[Index]:
    """All compared indexes, built one after the other."""
    unit = np.allclose(np.linalg.norm(keys[:1000], axis=1), 1, atol=1e-3)
    numbers = [int(number) for number in _VARIANTS.value] or range(len(VARIANTS))
    for variant in (VARIANTS[number] for number in numbers):
        if unit or variant.distance == "squared_l2":
            yield ScannIndex(variant, keys, queries)
    if _FAISS.value:
        faiss = Faiss(folder, keys, queries)
        for factory in faiss_factories(*keys.shape):
            yield FaissIndex(faiss, factory)
        faiss.close()


def _load() -> np.ndarray:
    """The keys [n, d]."""
    if _KEYS.value:
        rows = np.load(_KEYS.value).astype(np.float32)
    elif _WORKDIR.value:
        directory = pathlib.Path(_WORKDIR.value)
        keys = revisions.open_keys(revisions.open_database(directory), directory)
        rows = np.concatenate([block for _, block in keys.blocks()])
    else:
        raise SystemExit("expected --workdir=W or --keys=FILE.npy")
    if _MOST.value and len(rows) > _MOST.value:  # of all corpora, which follow each other
        sample = np.random.default_rng(1).choice(len(rows), _MOST.value, replace=False)
        rows = rows[np.sort(sample)]
    return np.ascontiguousarray(rows)


def main(_: list[str]) -> None:
    """Measures both and prints the table."""
    keys = _load()
    asked = np.random.default_rng(0).choice(len(keys), min(_QUERIES.value, len(keys)), False)
    asked.sort()
    queries = keys[asked]

    def others(rows: Ids) -> Ids:
        order = np.argsort(rows == asked[:, None], axis=1, kind="stable")
        return np.take_along_axis(np.asarray(rows, np.int64), order, axis=1)[:, :_K]

    truth = others(ExactSearcher(keys).search(queries, _K + 1)[0])
    furthest = ((keys[truth[:, -1]] - queries) ** 2).sum(1)

    def judge(rows: Ids) -> float:
        """Of keys at one distance any is a neighbour: code has many equal chunks."""
        ids = others(rows)
        distances = ((keys[ids] - queries[:, None]) ** 2).sum(-1)
        near = (distances <= furthest[:, None] * (1 + 1e-5) + 1e-6) & (ids >= 0)
        return float(near.mean())

    print(f"{len(keys):,} keys of {keys.shape[1]} dimensions, {len(queries):,} queries,", end=" ")
    print(f"{cores()} cores")
    head = f"{'searched':>13} {'reorder':>7} {'batch':>6} {'recall':>7} {'queries/s':>10}"
    print(f"{'index':46} {head} {'single us':>10}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for index in indexes(keys, queries, folder):
            for row in measure(index, len(queries), judge):
                print(row, flush=True)
                rows.append(row)
                if _OUTPUT.value:
                    text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
                    pathlib.Path(_OUTPUT.value).write_text(text + "\n")
    print(f"\nfastest of each at recall@{_K} {_TARGET.value}:")
    for name in dict.fromkeys(row.index for row in rows):
        enough = [row for row in rows if row.index == name and row.recall >= _TARGET.value]
        if enough:
            print(max(enough, key=lambda row: row.queries_per_second))
        else:
            best = max(row.recall for row in rows if row.index == name)
            print(f"{name:46} not reached: {best:.4f} with {_MOST_LEAVES:.0%} of the leaves")


if __name__ == "__main__":
    app.run(main)
