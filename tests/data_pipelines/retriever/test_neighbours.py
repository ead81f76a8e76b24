"""The neighbour table: its facts, its lineage, and that it equals live retrieval."""

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever.filled_slots import describe, share_filled, warn_of_few
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.index_shard import IndexShard
from data_pipelines.retriever.keys import BlockSource, Keys, KeysConfig, prepare_keys
from data_pipelines.retriever.neighbour_shards import NeighbourShard
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.neighbours import NeighboursConfig, prepare_neighbours
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.search import Dense
from retro_jax.errors import UserError
from tests.data_pipelines.retriever import bert_folder
from tests.data_pipelines.small import documents_config, prepare, tree, write_texts
from tests.data_pipelines.synthetic import clustered, nearest, retriever, write_database, write_keys


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A whole workdir: texts, a tiny BERT, and a table of every split."""
    folder = tmp_path_factory.mktemp("neighbours")
    write_texts(folder / "a", 40)
    write_texts(folder / "b", 30, seed=1)
    work = folder / "w"
    prepare(work, documents_config(folder / "a", folder / "b"))
    bert_folder.write(folder / "bert")
    config = KeysConfig(model=str(folder / "bert"))
    for split in ("train", "validation"):
        chunks = work / "chunks" / split
        prepare_keys(work / "keys" / split, chunks, work / "tokenizer", config)
    prepare_index(work / "index", open_keys(work, "train"), IndexConfig())
    for split, k in (("train", 3), ("validation", 5)):
        make(work / "neighbours" / split, open_keys(work, split), open_retriever(work), k)
    return work


def open_keys(workdir, split):
    return Keys.open(workdir / "keys" / split, ChunkDatabase.open(workdir / "chunks" / split))


def open_retriever(workdir):
    return Retriever.open(workdir, model=str(workdir.parent / "bert"))


def make(directory, queries, found, k=3, recall_queries=50):
    return prepare_neighbours(directory, queries, found, k=k, recall_queries=recall_queries)


def open_split(workdir, split):
    """A split's chunks, its table, and the retriever."""
    found = open_retriever(workdir)
    queries = ChunkDatabase.open(workdir / "chunks" / split)
    directory = workdir / "neighbours" / split
    table = NeighbourTable.open(directory, queries, found.database, verify=True)
    return queries, table, found


def test_live_retrieval_equals_the_table(workdir):
    queries, table, found = open_split(workdir, "train")
    assert len(queries.shards) > 2, "the test should see several shards"
    ids = np.arange(len(queries))
    own = queries.documents(ids)
    live, scores = found.neighbours(queries.chunks(ids), 3, own)
    np.testing.assert_array_equal(live, table.ids(ids))
    np.testing.assert_allclose(scores, table.scores(ids), atol=1e-5)
    values = found.retrieve(queries.chunks(ids[::5]), 3, own[::5])
    np.testing.assert_array_equal(values, found.database.values(table.ids(ids[::5])))
    for i in ids[::40]:
        alone, _ = found.neighbours(queries.chunks(ids[i : i + 1]), 3, own[i : i + 1])
        np.testing.assert_array_equal(alone, table.ids(ids[i : i + 1]))


def test_no_neighbour_is_of_the_own_document(workdir):
    queries, table, _ = open_split(workdir, "train")
    ids = np.arange(len(queries))
    rows, scores = table.ids(ids), table.scores(ids)
    assert table.k == 3
    assert len(table) == len(queries)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    assert (
        queries.documents(rows)[rows >= 0]
        != np.repeat(queries.documents(ids), 3)[(rows >= 0).ravel()]
    ).all()
    there = np.isfinite(scores)
    np.testing.assert_array_equal(there, rows >= 0)
    assert (np.diff(np.where(there, scores, 1e9), axis=1) >= 0).all()
    assert all(len(set(row)) == 3 for row in rows[there.all(1)].tolist())


def test_another_split_is_queried_with_embedded_chunks(workdir):
    queries, table, found = open_split(workdir, "validation")
    ids = np.arange(len(queries))
    vectors = found.encoder.keys(queries.chunks(ids))
    keys = found.keys.rows(np.arange(len(found.database)))
    truth = nearest(vectors, keys, 5)
    np.testing.assert_allclose(table.scores(ids), truth, atol=1e-4)
    assert table.manifest.parents["chunks"] == queries.manifest.hash
    assert table.manifest.parents["database"] == found.database.manifest.hash
    assert table.manifest.parents["index"] == found.index.manifest.hash


def test_facts(workdir):
    queries, table, found = open_split(workdir, "train")
    facts = table.manifest.facts
    ids = np.arange(len(queries))
    with_text = np.isfinite(found.keys.rows(ids)[:, 0])
    assert facts["chunks"] == len(queries)
    assert facts["queries"] == with_text.sum() < len(queries)
    filled = (table.ids(ids) >= 0).sum(0) / with_text.sum()
    np.testing.assert_allclose(facts["filled"], filled)
    first = table.scores(ids)[with_text, 0]
    assert facts["nearest"]["0.5"] == pytest.approx(float(np.median(first)), rel=1e-6)
    assert facts["recall"]["k"] == 3
    assert 40 <= facts["recall"]["queries"] <= 50
    assert facts["recall"]["recall"] == 1.0
    assert str(workdir.parent) not in (table.directory / "manifest.json").read_text()


@pytest.mark.parametrize("leaves", [1, 3, 20])
def test_the_measured_recall_is_the_recall(tmp_path, leaves):
    vectors, chunks = clustered(600), [6] * 100
    found = retriever(
        tmp_path, chunks, vectors, kind="tree", num_leaves=20, leaves_to_search=leaves, reorder=200
    )
    manifest = make(tmp_path / "table", found.keys, found, k=4, recall_queries=600)
    owners = found.database.documents(np.arange(600))
    truth = nearest(vectors, vectors, 4, owners[None] == owners[:, None])
    scores = NeighbourTable.open(tmp_path / "table").scores(np.arange(600))
    measured = manifest.fact("recall")
    assert measured["queries"] == 600
    expected = (scores <= truth[:, -1:] * (1 + 1e-4) + 1e-5).mean()
    assert measured["recall"] == pytest.approx(expected, abs=1e-3)
    assert (leaves == 20) == (measured["recall"] > 0.99)


def test_a_document_that_stands_in_another_split_too_is_excluded(tmp_path):
    vectors = clustered(9)
    found = retriever(tmp_path, [2, 3, 4], vectors)
    names = ["elsewhere", "document-2", "document-0"]
    queries = write_database(tmp_path / "queries", [2, 2, 1], names=names, seed=1)

    keys = write_keys(tmp_path / "query-keys", queries, vectors[4:9])
    make(tmp_path / "table", keys, found, k=9)
    ids = NeighbourTable.open(tmp_path / "table").ids(np.arange(5))
    assert (np.sort(ids[:2], axis=1) == np.arange(9)).all()
    assert (np.sort(ids[2:4], axis=1)[:, 4:] == np.arange(5)).all()
    assert (ids[2:4, 5:] == -1).all()
    assert sorted(ids[4].tolist()) == [-1, -1, 2, 3, 4, 5, 6, 7, 8]
    assert ids[0, 0] == 4


def test_three_chunks_make_a_table(tmp_path):
    found = retriever(tmp_path, [2, 1], clustered(3))
    manifest = make(tmp_path / "table", found.keys, found, k=4)
    ids = NeighbourTable.open(tmp_path / "table").ids(np.arange(3))
    assert ids[:2].tolist() == [[2, -1, -1, -1]] * 2
    assert sorted(ids[2].tolist()) == [-1, -1, 0, 1]
    np.testing.assert_allclose(manifest.fact("filled"), [1, 1 / 3, 0, 0])
    assert manifest.fact("recall")["recall"] == 1.0


def test_one_document_has_no_neighbours(tmp_path, caplog):
    found = retriever(tmp_path, [5], clustered(5))
    manifest = make(tmp_path / "table", found.keys, found, k=2)
    assert (NeighbourTable.open(tmp_path / "table").ids(np.arange(5)) == -1).all()
    assert manifest.fact("nearest") == {}
    assert manifest.fact("recall") == {"k": 2, "queries": 5, "recall": None}
    told = "2 a chunk, 0.0% of slots filled, recall unknown (no neighbour exists)"
    assert describe(manifest) == told
    warn_of_few("train", share_filled(manifest))
    assert "train: only 0.0% of the neighbour slots are filled" in caplog.text


def test_a_split_without_chunks_has_an_empty_table(tmp_path):
    found = retriever(tmp_path, [5], clustered(5))
    queries = write_database(tmp_path / "queries", [], seed=1)
    keys = write_keys(tmp_path / "query-keys", queries, np.empty((0, 32)))
    manifest = make(tmp_path / "table", keys, found, k=2)
    table = NeighbourTable.open(tmp_path / "table", queries, found.database)
    assert len(table) == 0
    assert table.ids(np.array([], np.int64)).shape == (0, 2)
    assert manifest.fact("filled") == [0.0, 0.0]


def test_is_the_same_bytes_given_the_index_and_after_an_interruption(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    monkeypatch.setattr(BlockSource.__init__, "__defaults__", (16,))
    found = retriever(tmp_path, [6] * 30, clustered(180), shards=3, kind="tree", num_leaves=9)
    make(tmp_path / "once", found.keys, found)
    search, calls = IndexShard.search, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return search(*arguments)

    monkeypatch.setattr(IndexShard, "search", killed)
    with pytest.raises(Killed):
        make(tmp_path / "twice", found.keys, found)
    assert (tmp_path / "twice" / "neighbours-00000.npy").exists()
    with pytest.raises(UserError, match="is unfinished"):
        NeighbourTable.open(tmp_path / "twice")
    make(tmp_path / "twice", found.keys, found)
    assert len(calls) == 6 + 2 * 4, "the finished shard is not made again"
    assert tree(tmp_path / "twice") == tree(tmp_path / "once")


def test_one_index_shard_is_held_at_a_time_and_the_table_is_the_same(tmp_path, monkeypatch):
    vectors = clustered(180)
    whole = retriever(tmp_path / "a", [6] * 30, vectors, shards=3)
    found = retriever(tmp_path / "b", [6] * 30, vectors, shards=3, shard_keys=50)
    assert [len(shard) for shard in found.index.shards] == [45] * 4
    find, held = NeighbourShard.find, []

    def watched(self, shard, *rest):
        result = find(self, shard, *rest)
        held.append((shard.ids.start, sum("_loaded" in vars(s) for s in found.index.shards)))
        return result

    make(tmp_path / "once", whole.keys, whole)
    monkeypatch.setattr(NeighbourShard, "find", watched)
    make(tmp_path / "cut", found.keys, found)
    assert held == [(start, 1) for start in (0, 45, 90, 135) for _ in range(3)]
    once, cut = (NeighbourTable.open(tmp_path / name) for name in ("once", "cut"))
    ids = np.arange(180)
    np.testing.assert_array_equal(cut.ids(ids), once.ids(ids))
    np.testing.assert_array_equal(cut.scores(ids), once.scores(ids))
    assert not list((tmp_path / "cut").glob(".tmp-*"))


def test_a_second_run_searches_nothing(workdir, monkeypatch):
    _, table, found = open_split(workdir, "train")
    for method in ("candidates", "truth"):
        monkeypatch.setattr(Dense, method, None)
    assert make(table.directory, found.keys, found).hash == table.manifest.hash
    with pytest.raises(UserError, match="k: 3 -> 4"):
        make(table.directory, found.keys, found, k=4)


def test_refuses_more_neighbours_than_are_stored(workdir):
    _, table, _ = open_split(workdir, "train")
    assert table.ids(np.array([[0, 1], [2, 3]]), 2).shape == (2, 2, 2)
    np.testing.assert_array_equal(table.ids(np.array([4]), 2), table.ids(np.array([4]))[:, :2])
    for k in (4, 0):
        with pytest.raises(
            UserError, match=rf"k is {k}: expected at most 3, which {table.directory}"
        ):
            table.ids(np.array([0]), k)
    for bad in (-1, len(table)):
        with pytest.raises(IndexError, match=f"of {len(table)} in"):
            table.scores(np.array([bad]))


def test_refuses_the_table_of_other_databases(workdir, tmp_path):
    queries, table, _ = open_split(workdir, "train")
    other = write_database(tmp_path / "other", [3])
    with pytest.raises(UserError, match=f"{table.directory} and {tmp_path}/other do not belong"):
        NeighbourTable.open(table.directory, other)
    with pytest.raises(UserError, match=f"{table.directory} and {tmp_path}/other do not belong"):
        NeighbourTable.open(table.directory, queries, other)
    manifest = Manifest.read(table.directory)
    manifest.settings["k"] = 4
    with pytest.raises(UserError, match=r"neighbours-00000.npy has shape .*: expected \[n, 4\]"):
        NeighbourTable(table.directory, manifest)


@pytest.mark.parametrize(
    ("field", "value"),
    [("train", 0), ("validation", -1), ("test", 2.5), ("recall_queries", -1)],
)
def test_refuses_a_setting(field, value):
    with pytest.raises(UserError, match=rf"NeighboursConfig\.{field} is {value}: expected"):
        NeighboursConfig(**{field: value})


def test_artefacts_of_the_same_settings_keep_their_hashes(tmp_path):
    """Hashes that revision 759fa63 gave: whole numbers, so that every machine computes the same."""
    expected = {
        "exact": ("2b6a18c22ba11d3c", "279f08ca42d51e93"),
        "brute_force": ("1b0247e9ab3f0d9c", "f0da797ed595418a"),
    }
    vectors = np.random.default_rng(0).integers(-4, 5, (300, 8)).astype(np.float32)
    vectors[[0, 40]] = np.nan
    for kind, hashes in expected.items():
        folder = tmp_path / kind
        found = retriever(folder, [6] * 50, vectors, shards=3, kind=kind, shard_keys=120)
        table = make(folder / "table", found.keys, found)
        assert (found.index.manifest.hash[:16], table.hash[:16]) == hashes
