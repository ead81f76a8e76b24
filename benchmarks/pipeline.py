"""Rates and peak memory of every stage of `launch.prepare`, on code and prose of this machine.

    python benchmarks/pipeline.py [--megabytes=100] [--workdir=KEPT] [--processes=1]

Documents are the installed packages, the standard library and 10,033 introductions of Wikipedia articles,
so many megabytes of code at most. Each stage runs in a process of its own, as a user would run it; a row
has its wall time, processor time, rates of wall time, rates per second of one core, and peak memory of
the largest of its processes. 500,000 chunks are about 100 MB. With --workdir, artefacts stay, and
stages that are there already are not measured again.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
import time

from absl import app, flags

from data_pipelines.corpora import SPLITS
from data_pipelines.manifest import MANIFEST_FILE, Manifest

_MEGABYTES = flags.DEFINE_integer("megabytes", 100, "Of code, at most.", lower_bound=1)
_WORKDIR = flags.DEFINE_string("workdir", None, "Keep the artefacts here.")
_PROCESSES = flags.DEFINE_integer("processes", 1, "As for launch.prepare.", lower_bound=1)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 32_000, "Of the tokeniser.")
_SHARD_MEGABYTES = flags.DEFINE_integer("shard_megabytes", 16, "Of documents.", lower_bound=1)

_STAGES = ("documents", "tokenizer", "chunks", "keys", "index", "neighbours")
_SETTINGS = """
wikipedia/CorpusConfig.name = 'wikipedia'
wikipedia/CorpusConfig.kind = 'wikipedia'
packages/CorpusConfig.name = 'packages'
packages/CorpusConfig.kind = 'packages'
packages/CorpusConfig.max_bytes = {code}
python/CorpusConfig.name = 'python'
python/CorpusConfig.kind = 'stdlib'
python/CorpusConfig.max_bytes = {code}
DocumentsConfig.corpora = (@wikipedia/CorpusConfig(), @packages/CorpusConfig(), @python/CorpusConfig())
DocumentsConfig.validation = 0.005
DocumentsConfig.test = 0.005
DocumentsConfig.shard_bytes = {shard}
TokenizerConfig.vocab_size = {vocabulary}
TokenizerConfig.max_training_bytes = 20_000_000
NeighboursConfig.train = 4
"""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a stage took: wall and processor seconds, and the largest process's peak memory in bytes."""

    wall: float
    processor: float
    memory: int


def run_stage(stage: str, workdir: pathlib.Path, settings: pathlib.Path) -> Usage:
    """Runs a stage in a process of its own."""
    command = [sys.executable, "-m", "launch.prepare", f"--workdir={workdir}"]
    command += [f"--gin_file={settings}", f"--stages={stage}", f"--processes={_PROCESSES.value}"]
    start = time.perf_counter()
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"stage {stage} failed: {' '.join(command)}")
    wall = time.perf_counter() - start
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def totals(workdir: pathlib.Path) -> dict[str, int]:
    """Documents, tokens and chunks of all splits, as far as they are made."""
    sums = {"documents": 0, "tokens": 0, "chunks": 0}
    for split in SPLITS:
        if (workdir / "chunks" / split / MANIFEST_FILE).is_file():
            manifest = Manifest.read(workdir / "chunks" / split)
            for name in sums:
                sums[name] += manifest.fact(name)
    return sums


def main(_: list[str]) -> None:
    """Runs the stages and prints a table."""
    with tempfile.TemporaryDirectory() as place:
        workdir = pathlib.Path(_WORKDIR.value or place)
        workdir.mkdir(parents=True, exist_ok=True)
        settings = workdir / "pipeline.gin"
        values = {
            "code": _MEGABYTES.value * 1_000_000,
            "shard": _SHARD_MEGABYTES.value << 20,
            "vocabulary": _VOCAB_SIZE.value,
        }
        settings.write_text(_SETTINGS.format(**values))
        usages = {stage: run_stage(stage, workdir, settings) for stage in _STAGES}
        sums = totals(workdir)
        print(", ".join(f"{count:,} {name}" for name, count in sums.items()))
        heads = [f"{name}/s" for name in sums] + [f"{name}/core s" for name in sums]
        print(f"{'stage':11} {'wall s':>8} {'core s':>8} {'peak MB':>8} ", end="")
        print(" ".join(f"{head:>16}" for head in heads))
        for stage, usage in usages.items():
            rates = [count / usage.wall for count in sums.values()]
            rates += [count / usage.processor for count in sums.values()]
            told = " ".join(f"{rate:16,.0f}" for rate in rates)
            memory = usage.memory / 1e6
            print(f"{stage:11} {usage.wall:8.1f} {usage.processor:8.1f} {memory:8,.0f} {told}")


if __name__ == "__main__":
    app.run(main)
