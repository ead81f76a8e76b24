"""Rates and peak memory of every stage of `launch.prepare`, on code and prose of this machine.

    python -m benchmarks.pipeline [--megabytes=110] [--workdir=KEPT] [--layers=1] [--processes=1]

Documents are the installed packages, the standard library and 10,033 introductions of Wikipedia
articles, with at most --megabytes of code; 500,000 chunks are about 110 MB. Each stage runs in a
separate process, as a user would run it. A row has its wall time, processor time, rates of wall time,
rates per second of one core, and the peak memory of all its processes together.

--layers=N computes keys with the first N layers of MiniLM instead of all six. This is not the real
encoder, and neighbours have less meaning, but bytes, shapes and machinery are the same, in a sixth of
the time for N = 1. The output says so.

--projected_keys=384 takes random projections of each chunk's tokens as keys instead, and --made_megabytes
takes so much text of lines drawn at random as the corpus: five million chunks are about 1,250 MB.
--bindings adds settings, such as IndexConfig.visit_shards=2.

    python -m benchmarks.pipeline --workdir=NEW --made_megabytes=1250 --projected_keys=384

--shard_megabytes=0.002 with --megabytes=1 makes thousands of tiny shards, to be compared with few. `files` are
those that one process has open.

With --workdir, artefacts stay: after an interruption, the same command resumes. A stage begun earlier
is marked, as its time covers the rest only. Results are in WORKDIR/pipeline.json, and in --output.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks import made_text, process_tree, projected_keys, small_bert
from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.corpora import SPLITS
from data_pipelines.retriever import revisions
from data_pipelines.retriever.keys import GIVEN

_MEGABYTES = flags.DEFINE_integer("megabytes", 110, "Of code, at most.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Keep the artefacts here.")
_LAYERS = flags.DEFINE_integer("layers", None, "Of MiniLM; all by default.", lower_bound=1)
_PROCESSES = flags.DEFINE_integer("processes", 1, "As for launch.prepare.", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "Of the tokeniser.")
_SHARD_MEGABYTES = flags.DEFINE_float("shard_megabytes", 16, "Of documents.", lower_bound=0.001)
_RECALL = flags.DEFINE_integer(
    "recall_queries", 1000, "Chunks of each split whose neighbours are also found by brute force."
)
_MADE = flags.DEFINE_integer("made_megabytes", 0, "Of text made of lines drawn at random.")
_PROJECTED = flags.DEFINE_integer("projected_keys", 0, "Dimensions of keys that no model makes.")
_BINDINGS = flags.DEFINE_multi_string("bindings", [], "Further settings, as gin has them.")
_OUTPUT = flags.DEFINE_string("output", None, "Copy the results to this JSON file too.")

_RESULTS = "pipeline.json"
_STAGES = (
    "documents",
    "leakage",
    "tokenizer",
    "chunks",
    "duplicates",
    "keys",
    "index",
    "neighbours",
)
_MADE_CORPUS = """
made/CorpusConfig.name = 'made'
made/CorpusConfig.kind = 'jsonl'
made/CorpusConfig.path = {made!r}
made/CorpusConfig.id_field = 'id'
DocumentsConfig.corpora = (@made/CorpusConfig(),)
"""
_CORPORA = """
wikipedia/CorpusConfig.name = 'wikipedia'
wikipedia/CorpusConfig.kind = 'wikipedia'
packages/CorpusConfig.name = 'packages'
packages/CorpusConfig.kind = 'packages'
packages/CorpusConfig.max_bytes = {code}
python/CorpusConfig.name = 'python'
python/CorpusConfig.kind = 'stdlib'
python/CorpusConfig.max_bytes = {code}
DocumentsConfig.corpora = (@wikipedia/CorpusConfig(), @packages/CorpusConfig(), @python/CorpusConfig())
"""
_SETTINGS = """
DocumentsConfig.validation = 0.005
DocumentsConfig.test = 0.005
DocumentsConfig.shard_bytes = {shard}
DocumentsConfig.skip_bad_documents = True
TokenizerConfig.vocab_size = {vocabulary}
TokenizerConfig.max_training_bytes = 20_000_000
KeysConfig.model = {model!r}
NeighboursConfig.train = 4
NeighboursConfig.validation = 10
NeighboursConfig.test = 10
NeighboursConfig.recall_queries = {recall}
"""


@dataclasses.dataclass(frozen=True)
class Usage:
    """The cost of a stage: wall and processor seconds, peaks in bytes as `process_tree.Peak` has them.

    Attributes:
      resumed: an earlier run of this benchmark had begun the stage, so this covers the rest only.
    """

    wall: float
    processor: float
    tree: int
    anonymous: int
    bound: int
    open_files: int = 0
    resumed: bool = False


class Results:
    """WORKDIR/pipeline.json, written after every stage."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        record = json.loads(path.read_text()) if path.is_file() else {}
        self.stages = {name: Usage(**fields) for name, fields in record.get("stages", {}).items()}
        self._begun: list[str] = record.get("begun", [])

    def begin(self, stage: str) -> bool:
        """Notes that a stage begins; returns whether it had begun before."""
        again = stage in self._begun
        self._begun.append(stage)
        self.write({})
        return again

    def write(self, facts: dict[str, Any]) -> None:
        """Writes the stages so far, and further facts."""
        stages = {name: dataclasses.asdict(usage) for name, usage in self.stages.items()}
        text = json.dumps(facts | {"begun": sorted(set(self._begun)), "stages": stages}, indent=1)
        self._path.write_text(text + "\n")


def run_stage(stage: str, workdir: pathlib.Path, settings: pathlib.Path, results: Results) -> None:
    """Runs a stage in a separate process, unless an earlier run completed it."""
    if stage in results.stages:
        return
    resumed = results.begin(stage)
    command = [sys.executable, "-m", "launch.prepare", f"--workdir={workdir}"]
    command += [f"--gin_file={settings}", f"--stages={stage}", f"--processes={_PROCESSES.value}"]
    if stage == "keys" and _PROJECTED.value:
        command = [sys.executable, "-m", "benchmarks.projected_keys", f"--keys_workdir={workdir}"]
        command += [f"--dimensions={_PROJECTED.value}"]
    start = time.perf_counter()
    status, processor, peak = process_tree.run(command)
    if status:
        raise SystemExit(f"stage {stage} failed: {' '.join(command)}")
    wall = time.perf_counter() - start
    results.stages[stage] = Usage(wall, processor, **dataclasses.asdict(peak), resumed=resumed)
    results.write({})


def totals(workdir: pathlib.Path) -> dict[str, int]:
    """Documents, tokens and chunks of all splits."""
    sums = {"documents": 0, "tokens": 0, "chunks": 0}
    for split in SPLITS:
        manifest = Manifest.read(workdir / "chunks" / split)
        for name in sums:
            sums[name] += manifest.fact(name)
    return sums


def facts_of(workdir: pathlib.Path, encoder: str) -> dict[str, Any]:
    """The prepared data, its settings, and the recall of each table."""
    tables = {split: Manifest.read(workdir / "neighbours" / split) for split in SPLITS}
    size = sum(path.stat().st_size for path in workdir.rglob("*") if path.is_file())
    return {
        "encoder": encoder,
        "cores": os.cpu_count(),
        "processes": _PROCESSES.value,
        "megabytes_of_code": _MEGABYTES.value,
        "megabytes_made": _MADE.value,
        "bindings": _BINDINGS.value,
        "totals": totals(workdir),
        "key_padding": Manifest.read(workdir / "keys" / "train").fact("padding"),
        "plan": Manifest.read(workdir / "index").fact("plan"),
        "single_query_us": single_queries(workdir),
        "recall": {split: table.fact("recall") for split, table in tables.items()},
        "bytes_on_disk": size,
    }


def single_queries(workdir: pathlib.Path) -> dict[str, float]:
    """Microseconds of searches for the 10 neighbours of one chunk, one after the other; of one index shard."""
    keys = revisions.open_keys(revisions.open_database(workdir), workdir)
    index = revisions.open_index(keys, workdir)
    if len(index.shards) > 1:  # all of them would be in memory
        return {}
    _, rows = next(keys.blocks(size=1000))
    took = []
    for row in rows:
        start = time.perf_counter()
        index.search(row[None], 10)
        took.append(1e6 * (time.perf_counter() - start))
    took = sorted(took[1:])  # the first loads the index
    return {"median": took[len(took) // 2], "99 %": took[len(took) * 99 // 100]}


def show(results: Results, facts: dict[str, Any]) -> None:
    """Prints the table."""
    sums: dict[str, int] = facts["totals"]
    print(", ".join(f"{count:,} {name}" for name, count in sums.items()))
    print(f"encoder: {facts['encoder']}; padding of its batches {facts['key_padding']:.1%}")
    heads = [f"{name}/s" for name in sums] + [f"{name}/core s" for name in sums]
    print(
        f"{'stage':11} {'wall s':>8} {'core s':>8} {'peak MB':>8} {'anon MB':>8} {'files':>6} ",
        end="",
    )
    print(" ".join(f"{head:>16}" for head in heads))
    for stage, usage in results.stages.items():
        rates = [count / usage.wall for count in sums.values()]
        rates += [count / usage.processor for count in sums.values()]
        figures = " ".join(f"{rate:16,.0f}" for rate in rates)
        memory = f"{usage.tree / 1e6:8,.0f} {usage.anonymous / 1e6:8,.0f} {usage.open_files:6,}"
        mark = "  (resumed: time and rates of the rest only)" if usage.resumed else ""
        print(f"{stage:11} {usage.wall:8.1f} {usage.processor:8.1f} {memory} {figures}{mark}")
    wall = sum(usage.wall for usage in results.stages.values())
    peak = max(usage.tree for usage in results.stages.values())
    bound = max(usage.bound for usage in results.stages.values())
    print(f"all: {wall:,.0f} s; peak {peak / 1e6:,.0f} MB, at most {bound / 1e6:,.0f} MB")
    if single := facts["single_query_us"]:
        shown = ", ".join(f"{name} {us:,.0f} us" for name, us in single.items())
        print(f"a query alone, 10 neighbours: {shown}")
    for split, recall in facts["recall"].items():
        figures = (
            f"recall@{recall['k']} {recall['recall'] or 0:.4f} of {recall['queries']:,} queries"
        )
        print(f"{split}: {figures} against brute force")


def main(_: list[str]) -> None:
    """Runs the stages and prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(_WORKDIR.value or folder).absolute()
        workdir.mkdir(parents=True, exist_ok=True)
        model, encoder = "minilm", "MiniLM, all its layers"
        if _PROJECTED.value:
            model = f"{GIVEN}{projected_keys.NAME}"
            encoder = f"NONE: tokens projected at random to {_PROJECTED.value} dimensions"
        elif _LAYERS.value is not None:
            model = str(small_bert.cut(model, _LAYERS.value, workdir / "encoder"))
            encoder = f"NOT THE REAL ONE: the first {_LAYERS.value} layer(s) of MiniLM"
        settings = workdir / "pipeline.gin"
        corpora, made = _CORPORA, workdir / "made"
        if _MADE.value:
            corpora = _MADE_CORPUS
            made_text.write(made, _MADE.value)
        text = (corpora + _SETTINGS + "\n".join([*_BINDINGS.value, ""])).format(
            made=str(made),
            code=_MEGABYTES.value * 1_000_000,
            shard=int(_SHARD_MEGABYTES.value * (1 << 20)),
            vocabulary=_VOCAB_SIZE.value,
            model=model,
            recall=_RECALL.value,
        )
        if settings.is_file() and settings.read_text() != text:
            raise SystemExit(
                f"{settings} has other settings: expected the same, or a new --workdir"
            )
        settings.write_text(text)
        results = Results(workdir / _RESULTS)
        for stage in _STAGES:
            run_stage(stage, workdir, settings, results)
        facts = facts_of(workdir, encoder)
        results.write(facts)
        show(results, facts)
        if _OUTPUT.value:
            shutil.copyfile(workdir / _RESULTS, _OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
