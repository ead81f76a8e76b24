"""A node of a Ray cluster is killed within every part of a preparation: are the bytes the same?

    python -m benchmarks.node_deaths [--documents=150] [--only=keys,neighbours]

Prepares a small slice in this process, then over a cluster of three nodes on this machine, stage by stage:
all stages, the tables of an update and of a compaction, materialised batches, and the token memory.
Whenever tasks are given to the cluster, the node that begins one first is killed, workers and all, at a
random moment; another one joins. That task has not reported by then, so its work is lost or done twice.
Prints a line for each kind of task, and ends with status 1 if any byte differs.
"""

import dataclasses
import json
import logging
import os
import pathlib
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags

from benchmarks import small_bert
from data_pipelines.artefacts.ray_runner import RayCluster
from data_pipelines.artefacts.runner import InProcess, Runner
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.corpora import Reading, read_corpus
from data_pipelines.retriever import revisions
from data_pipelines.token_memory.build import TokenMemoryConfig
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from data_pipelines.workdir import (
    CorpusConfig,
    DocumentsConfig,
    IndexConfig,
    KeysConfig,
    NeighboursConfig,
    PrepareConfig,
    TokenizerConfig,
    compaction,
    prepare,
    update,
)
from data_pipelines.workdir.preparation import Preparation, materialise
from data_pipelines.workdir.stages import ALL_STAGES

_DOCUMENTS = flags.DEFINE_integer("documents", 150, "Of Wikipedia; a fifth more are appended.")
_ONLY = flags.DEFINE_list("only", [], "Kill in these steps only; by default in all.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_NODES, _MEMORY = 2, 80 << 20  # beside the head; bytes of each one's object store
_LONGEST = 0.5  # seconds after a task began at which its node is killed
_PATIENCE = 120  # seconds that tasks wait for it
_NEW = ("append", "remove", "compact", "materialise", "token_memory")


@dataclasses.dataclass(frozen=True)
class Doomed:
    """Work that says on which node it began, and does not return before one of them died."""

    work: Any
    folder: str

    def __call__(self, shard: Any) -> Any:
        """As the work."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        pathlib.Path(self.folder, f"on-{node}").touch()
        result, dead = self.work(shard), pathlib.Path(self.folder, "dead")
        deadline = time.monotonic() + _PATIENCE
        while not dead.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        return result


class Deadly:
    """A Ray cluster that loses a node in every run."""

    def __init__(self, folder: pathlib.Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        memory = {"object_store_memory": _MEMORY}
        head = {"num_cpus": 0, "include_dashboard": False, **memory}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._add() for _ in range(_NODES)]
        self._ray = RayCluster(address=self._cluster.address)
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # it tells of every death at length
        self._step, self.armed, self._runs = "", True, 0
        self.lines: list[str] = []
        self.deaths = 0

    @property
    def threads(self) -> int:
        """Of a task."""
        return self._ray.threads

    @property
    def in_process(self) -> bool:
        """No."""
        return False

    def step(self, name: str) -> None:
        """Names what follows; nodes die in it if that was asked for."""
        self._step, self.armed = name, not _ONLY.value or name in _ONLY.value

    def run(self, work: Callable[[Any], Any], shards: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """As `Runner.run`."""
        if not shards or not self.armed:
            yield from self._ray.run(work, shards)
            return
        folder = self._folder / f"run-{self._runs:03d}"
        folder.mkdir()
        self._runs += 1
        over, start = threading.Event(), time.monotonic()
        killer = threading.Thread(target=self._kill, args=(folder, over), daemon=True)
        killer.start()
        try:
            yield from self._ray.run(Doomed(work, str(folder)), shards)
        finally:
            over.set()
            killer.join()
            while len(self._nodes) < _NODES:  # here, as Ray sets handlers of signals
                self._nodes.append(self._add())
        died = (folder / "dead").exists()
        self.deaths += died
        seconds = time.monotonic() - start
        what = "a node died" if died else "NO NODE DIED"
        self.lines.append(
            f"{self._step:13} {type(work).__name__:15} {len(shards):5} tasks {seconds:6.1f} s  {what}"
        )
        print(self.lines[-1], file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the cluster."""
        import ray

        ray.shutdown()
        self._cluster.shutdown()

    def _add(self) -> Any:
        """A further node of one core."""
        return self._cluster.add_node(num_cpus=1, object_store_memory=_MEMORY)

    def _kill(self, folder: pathlib.Path, over: threading.Event) -> None:
        """Kills the node on which a task began first."""
        while not (begun := sorted(folder.glob("on-*"))):
            if over.wait(0.01):
                return
        time.sleep(random.random() * _LONGEST)
        name = begun[0].name.removeprefix("on-")
        victim = next(node for node in self._nodes if node.node_id == name)
        self._nodes.remove(victim)
        self._cluster.remove_node(victim, allow_graceful=False)
        (folder / "dead").touch()


def settings(root: pathlib.Path, more: bool) -> PrepareConfig:
    """Writes the corpus, larger for an update, and returns the settings of both workdirs."""
    count = _DOCUMENTS.value * (6 if more else 5) // 5
    corpus = CorpusConfig("wikipedia", "wikipedia", max_documents=None)
    documents = [d for d, _ in zip(read_corpus(corpus, Reading()), range(count))]
    lines = [json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents]
    (root / "texts.jsonl").write_text("".join(lines))
    corpora = (CorpusConfig("texts", "jsonl", str(root / "texts.jsonl"), id_field="id"),)
    return PrepareConfig(
        DocumentsConfig(corpora, shard_bytes=15_000, sort_bytes=20_000),
        tokenizer=TokenizerConfig(vocab_size=1000),
        keys=KeysConfig(str(small_bert.cut("minilm", 1, root))),
        index=IndexConfig(kind="exact", shard_keys=100, visit_shards=2),
        neighbours=NeighboursConfig(2, 3, 3, recall_queries=20, retriever="dense+bm25"),
    )


def make(
    workdir: pathlib.Path, root: pathlib.Path, runner: Runner, step: Callable[[str], None]
) -> None:
    """Prepares, updates and compacts a workdir."""
    config = settings(root, more=False)
    for stage in ALL_STAGES:
        step(stage)
        prepare(workdir, config, runner=runner, stages=[stage], settings="")
    p = Preparation(workdir, settings(root, more=True), runner, lambda line: None)
    step("append")
    update.update(p, append=True, remove=[])
    step("remove")
    first = revisions.open_database(workdir).record(0)
    update.update(p, append=False, remove=[f"{first.corpus}/{first.id}"])
    step("compact")
    compaction.compact(p)
    step("materialise")
    materialise(workdir, BatchConfig(sequence_length=128, batch_size=2, neighbours=2), 50, runner)
    step("token_memory")
    memory = TokenMemoryConfig(part_tokens=20_000)
    prepare_and_open(revisions.open_database(workdir), memory, runner=runner)


def different(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """The files of two workdirs that are not the same."""
    found = []
    for folder in (one, other):
        found.append({p.relative_to(folder) for p in folder.rglob("*") if p.is_file()})
    both = found[0] & found[1]
    unequal = {name for name in both if (one / name).read_bytes() != (other / name).read_bytes()}
    return sorted(map(str, (found[0] ^ found[1]) | unequal))


def main(_: list[str]) -> None:
    """Makes both, and compares them."""
    unknown = set(_ONLY.value) - {*ALL_STAGES, *_NEW}
    if unknown:
        choices = ",".join([*ALL_STAGES, *_NEW])
        raise app.UsageError(f"--only={min(unknown)}: expected some of {choices}")
    random.seed(_SEED.value)
    root_of_project = str(pathlib.Path(__file__).resolve().parents[1])
    paths = [root_of_project, os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of the cluster's workers
    with tempfile.TemporaryDirectory() as folder:
        root, start = pathlib.Path(folder), time.monotonic()
        make(root / "whole", root, InProcess(), lambda name: None)
        print(f"undisturbed, in one process: {time.monotonic() - start:.0f} s", flush=True)
        deadly = Deadly(root)
        make(root / "killed", root, deadly, deadly.step)
        deadly.close()
        names = different(root / "whole", root / "killed")
    print("\n".join(["", *deadly.lines]))
    print(f"{deadly.deaths} nodes died in {len(deadly.lines)} runs: {len(names)} files differ")
    for name in names:
        print(f"  {name}")
    if names or deadly.deaths < len(deadly.lines):
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
