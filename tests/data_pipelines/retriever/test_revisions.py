"""Revisions of a retrieval database: what is added and removed, and tables that follow."""

import functools
import pickle
import shutil

import numpy as np
import pytest

from data_pipelines.batches.batches import BatchConfig, Batches
from data_pipelines.batches.training_data import copy_databases, copy_tables
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.retriever import publishing, revisions
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.index_shard import IndexShard, compare_all
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.neighbours import prepare_neighbours
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Retriever
from retro_jax.errors import UserError
from tests.data_pipelines.small import tree
from tests.data_pipelines.synthetic import clustered, nearest, write_database, write_keys

SIZES = [[3, 1, 5, 2, 4, 6], [2, 7, 1]]  # chunks of the documents of revision 0, and of what 1 adds
NAMES = [[f"old-{i}" for i in range(6)], ["old-3", "new-1", "new-2"]]
REMOVED = [3, 5]  # by revision 1, which adds a document of the id of one of them


def make_part(folder, part):
    """Chunks, keys and index of what a revision adds; the vectors."""
    vectors = clustered(sum(SIZES[part]), seed=part)
    if part == 0:
        vectors[2] = np.nan
    arguments = {"names": NAMES[part], "shards": 2, "seed": part}
    database = write_database(folder / "chunks" / "train", SIZES[part], **arguments)
    keys = write_keys(folder / "keys" / "train", database, vectors)
    prepare_index(folder / "index", keys, IndexConfig(kind="exact"))
    return keys


def open_retriever(workdir, revision=None):
    return Retriever(Database.open(workdir, revision))


def make_table(workdir, split, revision, base=None, *, name="neighbours"):
    """The table of a split against a revision."""
    found = open_retriever(workdir, revision)
    queries = found.keys
    if split != "train":
        chunks = ChunkDatabase.open(workdir / "chunks" / split)
        queries = Keys.open(workdir / "keys" / split, chunks)
    place = revisions.folder_of(workdir, revision) / name / split
    prepare_neighbours(place, queries, found, k=3, recall_queries=99, base=base)
    return NeighbourTable.open(place, queries.database, found.database)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """W with two revisions, and a validation split with a document that the database has too."""
    work = tmp_path_factory.mktemp("revisions") / "W"
    make_part(work, 0)
    queries = write_database(
        work / "chunks" / "validation", [4, 2], names=["held", "new-1"], seed=7
    )
    write_keys(work / "keys" / "validation", queries, clustered(6, seed=7))
    for split in ("train", "validation"):
        make_table(work, split, 0)
    shutil.copytree(work, work.parent / "before")
    added = make_part(revisions.folder_of(work, 1), 1)
    publishing.publish(work, 1, REMOVED, added)
    return work


@pytest.fixture(scope="module")
def database(workdir):
    return revisions.open_database(workdir)


def test_ids_of_chunks_and_documents_go_on(workdir, database):
    parts = [
        ChunkDatabase.open(revisions.folder_of(workdir, r) / "chunks" / "train") for r in (0, 1)
    ]
    assert (len(database), database.num_documents) == (31, 9)
    assert database.manifest.revision == 1
    ids = np.arange(31)
    rows = np.concatenate([part.chunks(np.arange(len(part))) for part in parts])
    np.testing.assert_array_equal(database.chunks(ids), rows)
    owners = np.repeat(np.arange(9), SIZES[0] + SIZES[1])
    np.testing.assert_array_equal(database.documents(ids), owners)
    assert database.documents(np.array([-1, 20, 21])).tolist() == [-1, 5, 6]
    records = list(database.records())
    assert [record.id for record in records] == NAMES[0] + NAMES[1]
    assert [database.record(d) for d in range(9)] == records
    assert [r.first_chunk for r in records] == [0, 3, 4, 9, 11, 15, 21, 23, 30]
    assert (database.value(20)[64:] == 0).all(), "a continuation does not cross revisions"
    assert [len(ids) for ids in database.shards] == [9, 12, 9, 1]
    again = pickle.loads(pickle.dumps(database))
    np.testing.assert_array_equal(again.values(ids), database.values(ids))


def test_removed_documents_are_in_no_corpus(database):
    assert database.removed.tolist() == REMOVED
    assert database.is_removed(np.array([-1, 0, 3, 5, 6, 8])).tolist() == [0, 0, 1, 1, 0, 0]
    assert database.corpora == {"made": [range(0, 9), range(11, 15), range(21, 31)]}


def test_batches_read_what_is_left_and_nothing_else(workdir, database):
    table = make_table(workdir, "train", 1, name="of-batches")
    config = BatchConfig(sequence_length=128, batch_size=1, neighbours=2)
    batches = Batches(config, database, table, database)
    rows = [batches.rows(step) for step in range(sum(batches.sequences.values()))]
    seen = np.concatenate([row.tokens.reshape(-1, 64) for row in rows])
    left = [i for ids in database.corpora["made"] for i in ids]
    expected = database.chunks(np.array(left))
    key = lambda rows: sorted(row.tobytes() for row in rows if row.any())  # noqa: E731
    assert key(seen) == key(expected)
    gone = database.chunks(np.array([9, 10, *range(15, 21)]))
    neighbours = np.concatenate([row.neighbours.reshape(-1, 64) for row in rows])
    assert not set(key(neighbours)) & set(key(gone))
    assert set(key(neighbours)) & set(key(expected[13:])), "what was added is retrieved"


def test_search_finds_the_nearest_of_what_is_left(workdir):
    found = open_retriever(workdir)
    assert len(found.index.shards) == 2
    assert len(found.index) == 30
    queries = clustered(20, seed=3)
    keys = found.keys.rows(np.arange(31))
    forbidden = np.isin(found.database.documents(np.arange(31)), REMOVED)
    truth = nearest(queries, keys, 5, np.tile(forbidden, (20, 1)))
    exact = functools.partial(compare_all, found.keys)
    for search in (found.index.search, exact, pickle.loads(pickle.dumps(found)).index.search):
        ids, scores = search(queries, 5)
        np.testing.assert_allclose(scores, truth, atol=1e-5)
        assert not forbidden[ids].any()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_updated_table_is_the_one_made_anew(workdir, split, monkeypatch):
    before = revisions.open_database(workdir, 0)
    queries = before if split == "train" else ChunkDatabase.open(workdir / "chunks" / split)
    base = NeighbourTable.of(workdir, split, queries, before)
    anew = make_table(workdir, split, 1, name="anew")
    asked, search = [], IndexShard.search

    def counting(self, queries, *rest):
        asked.append((self.ids.start, len(queries)))
        return search(self, queries, *rest)

    monkeypatch.setattr(IndexShard, "search", counting)
    table = make_table(workdir, split, 1, base)
    ids = np.arange(len(table))
    np.testing.assert_array_equal(table.ids(ids), anew.ids(ids))
    np.testing.assert_array_equal(table.scores(ids), anew.scores(ids))
    assert table.manifest.revision == 1
    assert table.manifest.fact("recall")["recall"] == 1.0
    lost = np.isin(before.documents(base.ids(np.arange(len(base)))), REMOVED).any(1).sum()
    old = sum(count for start, count in asked if start == 0)
    assert old == lost + len(table) - len(base), "old rows ask old shards only if they lost one"
    with pytest.raises(UserError, match="do not belong together"):
        NeighbourTable.open(base.directory, None, revisions.open_database(workdir))


def test_the_revision_before_is_as_it_was(workdir):
    for place in ("chunks", "keys", "index", "neighbours"):
        assert tree(workdir / place) == tree(workdir.parent / "before" / place)
    database = revisions.open_database(workdir, 0)
    assert (len(database), len(database.removed)) == (21, 0)
    assert revisions.latest(workdir) == 1
    assert revisions.find(workdir, revisions.open_database(workdir).manifest.hash) == 1
    with pytest.raises(UserError, match="holds no database 0123: expected the revision"):
        revisions.find(workdir, "0123")


def test_a_database_is_opened_at_any_revision(workdir):
    for revision, chunks, keys in ((0, 21, 20), (1, 31, 30), (None, 31, 30)):
        opened = Database.open(workdir, revision, verify=True)
        assert (len(opened.chunks), len(opened.keys), len(opened.index)) == (chunks, chunks, keys)
        again = pickle.loads(pickle.dumps(opened))
        assert again.index.manifest.hash == opened.index.manifest.hash
        assert again.chunks.removed.tolist() == opened.chunks.removed.tolist()
        with pytest.raises(UserError, match=r"bm25 has no manifest\.json"):
            _ = opened.bm25


def test_a_removal_that_was_killed_leaves_nothing_in_the_way(workdir, tmp_path, monkeypatch):
    work = shutil.copytree(workdir, tmp_path / "W")

    class Killed(BaseException):
        pass

    def killed(*arguments, **more):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(publishing.Stage, "finish", killed)
        with pytest.raises(Killed):
            publishing.publish(work, 2, [0])
    place = revisions.folder_of(work, 2)
    assert revisions.latest(work) == 1 and (place / "database" / "stage.json").is_file()
    revisions.clear_unfinished(work)
    assert not place.exists() and revisions.folder_of(work, 1).exists()
    assert publishing.publish(work, 2, [1]).fact("removed") == 3
    begun = revisions.folder_of(work, 3) / "documents"
    (begun / ".spill").mkdir(parents=True)
    revisions.clear_unfinished(work, appending=True)
    assert begun.exists(), "what was read is not read again"
    revisions.clear_unfinished(work)
    assert not begun.exists()
    (begun / "train").mkdir(parents=True)
    (begun / "train" / "stage.json").write_text("{}")
    revisions.clear_unfinished(work)
    assert begun.exists(), "what --append began is taken up"


def test_removing_again_adds_up_and_the_last_can_be_withdrawn(workdir, tmp_path):
    work = shutil.copytree(workdir, tmp_path / "W")
    numbers = revisions.numbers_of(
        revisions.open_database(work), [("made", "old-3"), ("made", "old-0")]
    )
    assert numbers == [0, 6], "the document that took the removed one's place"
    manifest = publishing.publish(work, 2, numbers)
    assert (manifest.fact("added"), manifest.fact("removed")) == (0, 4)
    assert publishing.publish(work, 2, numbers) == manifest
    with pytest.raises(UserError, match="was made with other settings: removed: "):
        publishing.publish(work, 2, [1])
    database = revisions.open_database(work)
    assert database.removed.tolist() == [0, 3, 5, 6]
    assert database.corpora["made"] == [range(3, 9), range(11, 15), range(23, 31)]
    assert len(open_retriever(work).index) == 30
    shutil.rmtree(revisions.folder_of(work, 2))
    assert revisions.open_database(work).manifest.hash == (
        revisions.open_database(workdir).manifest.hash
    )


def test_refuses_what_is_not_there_or_does_not_belong(workdir, tmp_path):
    database = revisions.open_database(workdir)
    assert revisions.numbers_of(database, [("made", "old-5")]) == [], "it was removed before"
    with pytest.raises(UserError, match="holds no document 'old-9' of the corpus 'made': expected"):
        revisions.numbers_of(database, [("made", "old-9")])
    work = shutil.copytree(workdir, tmp_path / "W")
    place = revisions.folder_of(work, 1)
    other = tmp_path / "other"
    make_part(other, 0)
    shutil.rmtree(place / "chunks")
    shutil.copytree(other / "chunks", place / "chunks")
    with pytest.raises(UserError, match=f"{place}/database and {place}/chunks/train do not belong"):
        revisions.open_database(work)
    for name in ("chunks", "keys"):
        shutil.rmtree(work / name / "train")
        shutil.copytree(other / name / "train", work / name / "train")
    assert len(revisions.open_database(work, 0)) == 21
    changed = write_database(tmp_path / "changed", [1], seed=9)
    shutil.rmtree(work / "chunks" / "train")
    shutil.copytree(changed.directory, work / "chunks" / "train")
    with pytest.raises(UserError, match=f"{place}/database and {work} do not belong together"):
        revisions.open_database(work)


def test_what_training_reads_of_a_revision_is_staged_from_a_bucket(workdir, tmp_path):
    shutil.copytree(
        workdir, tmp_path / "W", ignore=shutil.ignore_patterns("revisions/*/neighbours")
    )
    for split in ("train", "validation"):
        shutil.rmtree(revisions.folder_of(tmp_path / "W", 1) / "neighbours" / split, True)
        make_table(tmp_path / "W", split, 1)
    url, config = f"file://{tmp_path}/W", BatchConfig(sequence_length=128, batch_size=4)
    for revision, disk in ((None, tmp_path / "newest"), (0, tmp_path / "first")):
        folder = copy_databases(url, disk)
        copy_tables(url, folder, revision, config, held_out=True)
        assert not (disk / "keys").exists() and not (disk / "index").exists()
        assert not list(disk.rglob("scores-*"))
        held = [(revisions.open_database(w, revision), w) for w in (disk, tmp_path / "W")]
        assert held[0][0].manifest.hash == held[1][0].manifest.hash
        train = [Batches(config, d, NeighbourTable.of(w, "train", d, d), d) for d, w in held]
        for a, b in zip(vars(train[0].rows(1)).values(), vars(train[1].rows(1)).values()):
            np.testing.assert_array_equal(a, b)
        chunks = ChunkDatabase.open(disk / "chunks" / "validation")
        assert NeighbourTable.of(disk, "validation", chunks, held[0][0]).k == 3
