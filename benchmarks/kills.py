"""SIGKILLs at random moments of a preparation: does it end with the bytes of an undisturbed one?

    python -m benchmarks.kills [--kills=20] [--runner=local] [--seed=0]
    python -m benchmarks.kills --runner=ray

Prepares a small slice undisturbed, then again while processes are killed: the started one, or one of
its workers (on Ray, workers of a local cluster of three nodes). After each kill of the first kind the
same command is run again. Half of the kills hit the stages up to the keys, and half the neighbour
tables, which get the undisturbed run's index, as building one is not reproducible. Preparations are
repeated up to that number of kills. Ends with status 1 if any byte of chunks, keys, tables or the
record of withdrawn documents differs.
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks.process_tree import descendants

_KILLS = flags.DEFINE_integer("kills", 20, "SIGKILLs altogether.", lower_bound=0)
_RUNNER = flags.DEFINE_enum("runner", "local", ["local", "ray"], "As for launch.prepare.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "Of the local runner.", lower_bound=1)
_DOCUMENTS = flags.DEFINE_integer("documents", 300, "Introductions of Wikipedia articles.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and the victims.")
_MINUTES = flags.DEFINE_integer("minutes", 60, "Give up after so long.", lower_bound=1)

_BEFORE = "documents,leakage,tokenizer,chunks,duplicates,keys"
_AFTER = "index,neighbours"
_COMPARED = ("leakage", "chunks", "duplicates", "keys", "neighbours")
_SETTINGS = """
wikipedia/CorpusConfig.name = 'wikipedia'
wikipedia/CorpusConfig.kind = 'wikipedia'
wikipedia/CorpusConfig.max_documents = {documents}
DocumentsConfig.corpora = (@wikipedia/CorpusConfig(),)
DocumentsConfig.shard_bytes = 20_000
TokenizerConfig.vocab_size = 1000
IndexConfig.shard_keys = 400
NeighboursConfig.recall_queries = 50
"""


class Preparation:
    """launch.prepare into a workdir, again and again until it is done."""

    def __init__(self, workdir: pathlib.Path, settings: pathlib.Path, flags_: list[str]) -> None:
        self._command = [sys.executable, "-m", "launch.prepare", f"--workdir={workdir}"]
        self._command += [f"--gin_file={settings}", *flags_]

    def start(self, stages: str) -> subprocess.Popen[str]:
        """Starts some stages."""
        command = [*self._command, f"--stages={stages}"]
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    def finish(self, stages: str) -> float:
        """Runs some stages to their end; returns the seconds."""
        start = time.monotonic()
        process = self.start(stages)
        _, error = process.communicate()
        if process.returncode:
            raise SystemExit(f"launch.prepare ended with {process.returncode}: {error[-2000:]}")
        return time.monotonic() - start


def workers(process: subprocess.Popen[str], roots: list[int]) -> list[int]:
    """Worker processes of a run: its own descendants, or Ray's workers."""
    processes = list(descendants(process.pid))
    for root in roots:
        for pid in (root, *descendants(root)):
            try:
                name = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if name.startswith(b"ray::_call"):
                processes.append(pid)
    return processes


def disturb(
    preparation: Preparation, stages: str, kills: int, seconds: float, roots: list[int]
) -> int:
    """Kills while the stages run, each time after a random part of `seconds`; returns the number."""
    done, process = 0, preparation.start(stages)
    deadline = time.monotonic() + 60 * _MINUTES.value
    while done < kills and time.monotonic() < deadline:
        time.sleep(random.random() * seconds)
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"launch.prepare failed: {process.communicate()[1][-2000:]}")
            break
        victims = workers(process, roots)
        victim = random.choice(victims) if victims and random.random() < 0.5 else process.pid
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
        done += 1
        print(f"killed {'the run' if victim == process.pid else 'a worker'}", flush=True)
        if victim == process.pid:
            process.communicate()
            process = preparation.start(stages)
    _, error = process.communicate()
    if process.returncode and process.returncode != -signal.SIGKILL:
        raise SystemExit(f"launch.prepare ended with {process.returncode}: {error[-2000:]}")
    preparation.finish(stages)
    return done


def compare(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Files that differ."""
    names = set()
    for workdir in (one, other):
        for folder in _COMPARED:
            paths = (path for path in (workdir / folder).rglob("*") if path.is_file())
            names |= {path.relative_to(workdir).as_posix() for path in paths}

    def same(name: str) -> bool:
        files = (one / name, other / name)
        return all(f.is_file() for f in files) and files[0].read_bytes() == files[1].read_bytes()

    return sorted(name for name in names if not same(name))


def _cluster() -> tuple[list[str], list[int], Any]:
    """Flags for a local Ray cluster, its processes, and the object that keeps it alive."""
    from ray.cluster_utils import Cluster

    memory = {"object_store_memory": 80 << 20}
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **memory)
    roots = list(descendants(os.getpid()))
    return ["--runner=ray", f"--ray_address={cluster.address}"], roots, cluster


def main(_: list[str]) -> None:
    """Prepares twice and compares."""
    random.seed(_SEED.value)
    roots: list[int] = []
    flags_, cluster = [f"--processes={_PROCESSES.value}"], None
    if _RUNNER.value == "ray":
        flags_, roots, cluster = _cluster()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        settings = root / "kills.gin"
        settings.write_text(_SETTINGS.format(documents=_DOCUMENTS.value))
        whole = Preparation(root / "whole", settings, [])
        seconds = [whole.finish(stages) for stages in (_BEFORE, _AFTER)]
        print(f"undisturbed: {sum(seconds):.0f} s", flush=True)
        done, rounds = 0, 0
        different: list[str] = []
        deadline = time.monotonic() + 60 * _MINUTES.value
        while done < _KILLS.value and time.monotonic() < deadline:
            workdir = root / f"killed-{rounds}"
            rounds += 1
            killed = Preparation(workdir, settings, flags_)
            half = (_KILLS.value - done + 1) // 2
            done += disturb(killed, _BEFORE, half, seconds[0] / 2, roots)
            shutil.copytree(root / "whole" / "index", workdir / "index")
            done += disturb(killed, "neighbours", _KILLS.value - done, seconds[1] / 2, roots)
            different += [f"{workdir.name}/{name}" for name in compare(root / "whole", workdir)]
    if cluster is not None:
        cluster.shutdown()
    summary = f"{done} kills in {rounds} preparations, runner {_RUNNER.value}"
    print(f"{summary}: {len(different)} files differ")
    for name in different:
        print(f"  {name}")
    if different:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
