"""Materialised batches are those of the tables, bit for bit, and refuse what they were not made for."""

import dataclasses

import numpy as np
import pytest

from data_pipelines.batches import materialised as module
from data_pipelines.batches.batches import BatchConfig, Batches
from data_pipelines.batches.materialised import MaterialisedBatches, prepare_batches
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.neighbours import prepare_neighbours
from retro_jax.errors import UserError
from tests.data_pipelines.small import tree
from tests.data_pipelines.synthetic import clustered, retriever

CONFIG = BatchConfig(sequence_length=128, batch_size=3, neighbours=2, prefetch=0)
STEPS = 9  # more than an epoch


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A database, its table, and where their batches are written in files of four steps."""
    folder = tmp_path_factory.mktemp("materialise")
    found = retriever(folder, [3, 1, 4, 1, 5, 9], clustered(23))
    prepare_neighbours(folder / "table", found.keys, found, k=2, recall_queries=0)
    table = NeighbourTable.open(folder / "table", found.database, found.database)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BYTES", 40_000)
        prepare_batches(folder / "W", CONFIG, found.database, table, steps=STEPS)
    return found.database, table, folder / "W"


def same(one, other):
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype == np.int32
            np.testing.assert_array_equal(a, b)


def test_every_batch_is_that_of_the_table(made):
    database, table, folder = made
    batches = Batches(CONFIG, database, table, database)
    read = MaterialisedBatches.read(folder, CONFIG, verify=True)
    assert len(read.manifest.shards) == 3
    assert (read.corpora, read.sequences) == (batches.corpora, batches.sequences)
    assert (read.vocab_size, read.pad_id) == (database.vocab_size, database.pad_id)
    for step in range(STEPS):
        same(read.rows(step), batches.rows(step))
    same(read.rows(5, [2, 0]), batches.rows(5, [2, 0]))
    for step, batch in zip(range(4, STEPS), read.iterate(4)):
        same(batch, batches.rows(step))


def test_the_documents_of_a_batch_are_named_by_their_numbers(made):
    database, table, folder = made
    named = Batches(CONFIG, database, table, database).document_ids(2)
    numbers = {database.record(d).id: d for d in range(database.num_documents)}
    expected = [f"number {numbers[name]} of the chunk database" for name in named]
    assert MaterialisedBatches.read(folder, CONFIG).document_ids(2) == expected


def test_without_neighbours(made, tmp_path):
    database, _, _ = made
    config = dataclasses.replace(CONFIG, neighbours=0)
    prepare_batches(tmp_path, config, database, None, steps=2)
    read = MaterialisedBatches.read(tmp_path, config)
    assert read.rows(0).neighbours is None
    same(read.rows(1), Batches(config, database).rows(1))


def test_a_part_of_the_neighbours_is_written_alone(made, tmp_path):
    """And read with no other part, nor the whole with this one."""
    database, table, folder = made
    config = dataclasses.replace(CONFIG, neighbour_part="last_96")
    prepare_batches(tmp_path, config, database, table, steps=2)
    same(
        MaterialisedBatches.read(tmp_path, config).rows(1),
        Batches(config, database, table, database).rows(1),
    )
    for place, wrong in ((tmp_path, CONFIG), (folder, config)):
        with pytest.raises(
            UserError, match=r"BatchConfig\.neighbour_part is '\w+': expected '\w+'"
        ):
            MaterialisedBatches.read(place, wrong)


def test_further_neighbours_are_read_as_written_or_not_at_all(made, tmp_path):
    """Two of them would not begin with one of them."""
    database, table, _ = made
    order = dataclasses.replace(CONFIG, neighbours=1, further_neighbours=0.5)
    prepare_batches(tmp_path / "written", order, database, table, steps=2)
    read = MaterialisedBatches.read(tmp_path / "written", order).rows(1)
    wanted = Batches(order, database, table, database).rows(1)
    np.testing.assert_array_equal(read.neighbours, wanted.neighbours)
    none = dataclasses.replace(order, neighbours=0)
    assert MaterialisedBatches.read(tmp_path / "written", none).rows(1).neighbours is None
    with pytest.raises(UserError, match=r"further_neighbours is 0\.0: expected 0\.5"):
        MaterialisedBatches.read(
            tmp_path / "written", dataclasses.replace(order, further_neighbours=0.0)
        )


def test_fewer_neighbours_than_were_written(made):
    database, table, folder = made
    for k in (0, 1):
        config = dataclasses.replace(CONFIG, neighbours=k)
        expected = Batches(config, database, table, database).rows(3)
        same(MaterialisedBatches.read(folder, config).rows(3), expected)
    with pytest.raises(UserError, match=r"BatchConfig\.neighbours is 3: expected 2"):
        MaterialisedBatches.read(folder, dataclasses.replace(CONFIG, neighbours=3))


def test_an_interrupted_run_writes_what_is_missing(made, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    database, table, folder = made
    monkeypatch.setattr(module, "_BYTES", 40_000)
    rows, calls = Batches.rows, []

    def killed(self, step, *rest):
        calls.append(step)
        if len(calls) == 6:
            raise Killed
        return rows(self, step, *rest)

    monkeypatch.setattr(Batches, "rows", killed)
    with pytest.raises(Killed):
        prepare_batches(tmp_path / "W", CONFIG, database, table, steps=STEPS)
    with pytest.raises(UserError, match="is unfinished"):
        MaterialisedBatches.read(tmp_path / "W", CONFIG)
    prepare_batches(tmp_path / "W", CONFIG, database, table, steps=STEPS)
    assert calls[6:] == [4, 5, 6, 7, 8], "the finished file is not written again"
    assert tree(tmp_path / "W") == tree(folder)


def test_refuses_other_settings_and_steps_that_are_not_there(made):
    _, _, folder = made
    with pytest.raises(UserError, match=r"BatchConfig.seed is 5: expected 0, with which .*/W was"):
        MaterialisedBatches.read(folder, dataclasses.replace(CONFIG, seed=5))
    read = MaterialisedBatches.read(folder, dataclasses.replace(CONFIG, prefetch=3))
    with pytest.raises(UserError, match=r"step 9 of .*/W: expected one of the 9 it holds"):
        read.rows(STEPS)
    path = folder / "batches-00001.array_record"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{path} has {len(data) - 1} bytes: expected {len(data)}"):
        MaterialisedBatches.read(folder, CONFIG)
    path.write_bytes(data)
