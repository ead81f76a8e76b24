"""The Ray runner on a real cluster of three nodes on this machine, one of them killed in mid-stage."""

import dataclasses
import os
import pathlib
import shutil
import threading
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from data_pipelines.artefacts.ray_runner import RayCluster
from data_pipelines.artefacts.runner import InProcess
from data_pipelines.chunk_database.database import ChunkDatabase, prepare_chunks
from data_pipelines.documents import reading
from data_pipelines.documents.documents import prepare_documents
from data_pipelines.retriever import search
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.keys import Keys, KeysConfig, prepare_keys
from data_pipelines.retriever.neighbours import prepare_neighbours
from data_pipelines.retriever.retriever import Retriever
from retro_jax.errors import UserError
from tests.data_pipelines.retriever import bert_folder
from tests.data_pipelines.small import documents_config, prepare, tree, write_texts

_MEMORY = 80 << 20


@pytest.fixture(scope="module")
def cluster():
    """A head that runs no task, and two nodes of one core; workers import what the tests do."""
    before = os.environ.get("PYTHONPATH")
    root = str(pathlib.Path(__file__).resolve().parents[3])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, before]))
    arguments = {"object_store_memory": _MEMORY, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **arguments})
    made.workers = [made.add_node(num_cpus=1, object_store_memory=_MEMORY) for _ in range(2)]
    yield made
    ray.shutdown()
    made.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def runner(cluster):
    return RayCluster(address=cluster.address)


@dataclasses.dataclass(frozen=True)
class Note:
    """Leaves a note of its process; one shard fails, another does not end."""

    folder: str

    def __call__(self, shard: int) -> int:
        pathlib.Path(self.folder, f"{shard}-{os.getpid()}-{time.monotonic_ns()}").touch()
        if shard == 3:
            raise UserError("shard 3: expected a good one")
        if shard == 4:
            time.sleep(600)
        return shard * shard


def test_runs_shards_and_keeps_the_message_of_a_failure(runner, tmp_path, monkeypatch):
    cancelled, cancel = [], ray.cancel
    monkeypatch.setattr(ray, "cancel", lambda *a, **k: (cancelled.append(a), cancel(*a, **k)))
    assert dict(runner.run(Note(str(tmp_path)), [0, 1, 2])) == {0: 0, 1: 1, 2: 4}
    assert {note.name[0] for note in tmp_path.iterdir()} == {"0", "1", "2"}
    with pytest.raises(UserError, match=r"^shard 3: expected a good one$"):
        list(runner.run(Note(str(tmp_path)), [3]))
    assert len(list(tmp_path.iterdir())) == 4, "what fails by itself is not tried again"
    assert not cancelled, "Ray may end the process that cancels a task which has ended"
    with pytest.raises(UserError, match=r"^shard 3: expected a good one$"):
        list(runner.run(Note(str(tmp_path)), [4, 3]))
    assert len(cancelled) == 1, "what still runs is ended"


class Missing:
    """Work that cannot be opened by a worker."""

    def __reduce__(self):
        return __import__, ("no_such_package",)


def test_work_that_a_node_cannot_open_is_one_line(runner):
    message = (
        r"cannot open its work \(System error: No module named 'no_such_package'\): expected the"
    )
    with pytest.raises(UserError, match=message):
        list(runner.run(Missing(), [0]))


def test_accelerators_are_asked_for_by_work_that_wants_them():
    @dataclasses.dataclass(frozen=True)
    class Embeds:
        wants_accelerator = True

    plain = RayCluster(cpus=3, accelerators="GPU")._options(len)
    assert (plain["num_cpus"], "num_gpus" in plain) == (3, False)
    assert RayCluster(accelerators="GPU")._options(Embeds())["num_gpus"] == 1
    assert RayCluster(accelerators="TPU:4")._options(Embeds())["resources"] == {"TPU": 4}
    assert "resources" not in RayCluster()._options(Embeds())


def make(workdir, source, runner):
    """Documents, chunks, keys and table of the training split, given the index of `source`."""
    with pytest.MonkeyPatch.context() as patched:  # 50 files in portions of 12
        patched.setattr(reading, "_PORTION_FILES", 12)
        config = documents_config(source.parent / "texts", shard_bytes=6000)
        prepare_documents(workdir / "documents", config, runner=runner)
    tokenizer, chunks = source / "tokenizer", workdir / "chunks" / "train"
    keys, config = workdir / "keys" / "train", KeysConfig(model=str(source.parent / "bert"))
    prepare_chunks(chunks, workdir / "documents" / "train", tokenizer, runner=runner)
    prepare_keys(keys, chunks, tokenizer, config, runner=runner)
    opened = Keys.open(keys, ChunkDatabase.open(chunks))
    prepare_index(source / "index", opened, IndexConfig())
    for place in ("index", "tokenizer"):
        if not (workdir / place).exists():
            (workdir / place).symlink_to(source / place)
    found, table = Retriever.open(workdir), workdir / "neighbours" / "train"
    with pytest.MonkeyPatch.context() as patched:  # recall by a task for each shard
        patched.setattr(search, "_TRUTH_CHUNKS", 1)
        prepare_neighbours(table, opened, found, k=3, recall_queries=20, runner=runner)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A workdir made in this process."""
    folder = tmp_path_factory.mktemp("runners")
    write_texts(folder / "texts", 50)
    prepare(folder / "w", documents_config(folder / "texts", shard_bytes=6000))
    bert_folder.write(folder / "bert")
    make(folder / "w", folder / "w", InProcess())
    return folder / "w"


def artefacts(workdir):
    """The files of every stage that a runner makes."""
    stages = ("documents", "chunks", "keys", "neighbours")
    return {name: tree(workdir / name / "train") for name in stages}


def test_a_cluster_makes_the_same_bytes_though_a_node_dies(cluster, runner, source, tmp_path):
    assert len(ChunkDatabase.open(source / "chunks" / "train").shards) > 3
    begun, ended, deaths = tmp_path / "w" / "keys" / "train", threading.Event(), []

    def kill_a_node():
        # Blocks wait in a folder of their shard: both nodes are at work on one then.
        while len(list(begun.glob(".tmp-keys-*"))) < 2:
            if ended.wait(0.005):
                return
        deaths.append((begun / "manifest.json").exists())
        cluster.remove_node(cluster.workers[0], allow_graceful=False)

    for _ in range(3):  # one node may make all shards while the other's workers start
        shutil.rmtree(tmp_path / "w", ignore_errors=True)
        ended.clear()
        killer = threading.Thread(target=kill_a_node, daemon=True)
        killer.start()
        make(tmp_path / "w", source, runner)
        ended.set()
        killer.join(timeout=60)
        if deaths:
            break
    assert deaths == [False], "a node should have died while both were at work"
    assert artefacts(tmp_path / "w") == artefacts(source)
