"""Copies of artefacts in a bucket: what is read and no more, checked, and gone on with."""

import concurrent.futures
import dataclasses
import sys

import fsspec
import numpy as np
import pytest

from data_pipelines.artefacts import bucket_copy
from data_pipelines.artefacts.bucket_copy import Bucket, stage
from data_pipelines.batches import materialised
from data_pipelines.batches.batches import BatchConfig, Batches
from data_pipelines.batches.materialised import MaterialisedBatches, prepare_batches
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.neighbours import prepare_neighbours
from retro_jax.errors import UserError
from tests.data_pipelines.small import tree
from tests.data_pipelines.synthetic import clustered, retriever

CONFIG = BatchConfig(sequence_length=128, batch_size=3, neighbours=2, prefetch=0)
STEPS, STEPS_A_FILE = 9, 4


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
    """W with a chunk database, a table and its batches: (W, database, table)."""
    folder = tmp_path_factory.mktemp("bucket") / "W"
    found = retriever(folder, [3, 1, 4, 1, 5, 9], clustered(23))
    prepare_neighbours(folder / "table", found.keys, found, k=2, recall_queries=0)
    table = NeighbourTable.open(folder / "table", found.database, found.database)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materialised, "_BYTES", 40_000)
        prepare_batches(folder / "batches", CONFIG, found.database, table, steps=STEPS)
    return folder, found.database, table


@pytest.fixture(name="bucket")
def _bucket(made):
    """The same W in memory, as a bucket would hold it."""
    memory = fsspec.filesystem("memory")
    memory.rm("/B", recursive=True) if memory.exists("/B") else None
    memory.put(str(made[0]), "/B/W", recursive=True)
    return Bucket("memory://B/W/")


def _place(made):
    """Where the database is in W."""
    return made[1].directory.relative_to(made[0]).as_posix()


def _copies(monkeypatch):
    """The names that are copied from now on."""
    copied, copy = [], Bucket.copy
    record = lambda self, name, *rest: (copied.append(name), copy(self, name, *rest))[1]  # noqa: E731
    monkeypatch.setattr(Bucket, "copy", record)
    return copied


def test_a_copy_is_the_same_files_and_is_made_once(made, bucket, tmp_path, monkeypatch, capsys):
    _, database, _ = made
    place, copied = _place(made), _copies(monkeypatch)
    manifest = stage(bucket, place, tmp_path)
    assert manifest.hash == database.manifest.hash
    found = tree(tmp_path / place)
    assert b"memory://B/W" in found.pop("staged.json")
    assert found == tree(database.directory)
    assert len(ChunkDatabase.open(tmp_path / place, verify=True)) == len(database)
    shown = capsys.readouterr().err
    assert f"staging memory://B/W/{place}: 100%" in shown
    count = len(copied)
    assert count == len(manifest.shards)
    stage(bucket, place, tmp_path)
    assert len(copied) == count


def test_a_copy_that_was_cut_short_goes_on(made, bucket, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    _, database, _ = made
    place, shards = _place(made), [shard.name for shard in database.manifest.shards]
    monkeypatch.setattr(bucket_copy, "_THREADS", 1)
    copied, copy = _copies(monkeypatch), Bucket.copy

    def killed(self, name, *rest):
        if name.endswith(shards[1]):
            raise Killed
        copy(self, name, *rest)

    monkeypatch.setattr(Bucket, "copy", killed)
    with pytest.raises(Killed):
        stage(bucket, place, tmp_path)
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        ChunkDatabase.open(tmp_path / place)
    monkeypatch.setattr(Bucket, "copy", copy)
    before = list(copied)
    stage(bucket, place, tmp_path)
    assert f"{place}/{shards[0]}" in before
    assert sorted(copied) == sorted(f"{place}/{name}" for name in shards)
    assert tree(tmp_path / place).keys() == {*shards, "manifest.json", "staged.json"}


def test_a_table_without_its_scores_serves_training(made, bucket, tmp_path):
    _, database, table = made
    stage(bucket, "table", tmp_path, wanted=lambda name: not name.startswith("scores"))
    assert not list((tmp_path / "table").glob("scores*"))
    copy = NeighbourTable.open(tmp_path / "table", database, database)
    ids = np.arange(len(database))
    np.testing.assert_array_equal(copy.ids(ids), table.ids(ids))
    assert not list((tmp_path / "table").glob("scores*"))
    np.testing.assert_array_equal(copy.scores(ids), table.scores(ids))  # fetched as they are read


def test_files_of_batches_follow_when_they_are_read(made, bucket, tmp_path):
    folder, database, table = made
    stage(bucket, "batches", tmp_path, wanted=lambda name: False)
    names = sorted(path.name for path in (folder / "batches").glob("batches-*"))
    assert len(names) == 3
    here = lambda: sorted(path.name for path in (tmp_path / "batches").glob("batches-*"))  # noqa: E731
    assert here() == []
    read, made_here = (
        MaterialisedBatches.read(tmp_path / "batches", CONFIG),
        Batches(CONFIG, database, table, database),
    )
    for step in (STEPS_A_FILE, STEPS_A_FILE + 1):  # a run that goes on from its second file
        batch, expected = read.rows(step), made_here.rows(step)
        for field in dataclasses.fields(batch):
            np.testing.assert_array_equal(getattr(batch, field.name), getattr(expected, field.name))
    bucket_copy._ahead.submit(int).result()  # what was begun before it has ended
    assert here() == names[1:]


def test_processes_of_one_host_stage_in_turns(made, bucket, tmp_path):
    place = _place(made)

    def work(_):
        with bucket_copy.alone(tmp_path / "disk") as folder:
            stage(bucket, place, folder)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    found = tree(tmp_path / "disk" / place)
    assert {name: data for name, data in found.items() if name != "staged.json"} == tree(
        made[1].directory
    )


def test_what_is_wrong_there_is_one_line(made, bucket, tmp_path):
    place, memory = _place(made), fsspec.filesystem("memory")
    with pytest.raises(
        UserError, match=r"memory://B/W/none/manifest\.json is missing: expected a fin"
    ):
        stage(bucket, "none", tmp_path)
    shard = made[1].manifest.shards[0]
    name, data = f"/B/W/{place}/{shard.name}", memory.cat(f"/B/W/{place}/{shard.name}")
    memory.pipe(name, bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(
        UserError, match=rf"memory:/{name} has {len(data)} bytes and SHA-256 \w+: exp"
    ):
        stage(bucket, place, tmp_path)
    memory.rm(name)
    with pytest.raises(
        UserError, match=rf"memory:/{name} is missing: expected a shard of {len(data)}"
    ):
        stage(bucket, place, tmp_path)
    assert not (tmp_path / place / shard.name).exists()
    assert not list((tmp_path / place).glob(".tmp*"))
    memory.pipe(name, data)
    stage(bucket, place, tmp_path)
    stage(bucket, "batches", tmp_path / "other", wanted=lambda name: False)
    memory.rm(f"/B/W/{place}", recursive=True)
    memory.put(str(made[0] / "table"), f"/B/W/{place}", recursive=True)
    with pytest.raises(UserError, match="is a copy of something else than memory://B/W/"):
        stage(bucket, place, tmp_path)


def test_protocols_that_are_not_there_are_one_line(monkeypatch):
    with pytest.raises(UserError, match=r"nowhere://B/W cannot be opened .*expected a protocol"):
        Bucket("nowhere://B/W")
    for url, extra in (("gs://B/W", "gcs"), ("s3://B/W", "s3")):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        monkeypatch.setitem(sys.modules, "s3fs", None)
        known = sys.modules["fsspec.registry"]._registry
        monkeypatch.delitem(known, url.partition(":")[0], raising=False)
        expected = rf"{url} cannot be opened .*: expected pip install 'retro-jax\[{extra}\]'"
        with pytest.raises(UserError, match=expected):
            Bucket(url)
