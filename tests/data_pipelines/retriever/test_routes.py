"""Keys divided by nearness among index shards, of which a query visits few."""

import pickle
import shutil

import numpy as np
import pytest

from data_pipelines.retriever import publishing, revisions
from data_pipelines.retriever.index import Index
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.neighbours import prepare_neighbours
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.retriever.routes import Routes
from data_pipelines.workdir import verify
from tests.data_pipelines.synthetic import clustered, nearest, write_database, write_keys

CHUNKS, SHARDS = 900, 6


def part(folder, name, chunks, seed, **index):
    """Chunks, keys and index of a part of W; a document has three chunks, some have no text."""
    routes = index.pop("routes", None)
    vectors = clustered(chunks, seed=seed)
    vectors[::97] = np.nan
    names = [f"{name}-{i}" for i in range(chunks // 3)]
    database = write_database(
        folder / "chunks" / "train", [3] * (chunks // 3), names=names, shards=5, seed=seed
    )
    keys = write_keys(folder / "keys" / "train", database, vectors)
    config = IndexConfig(kind="exact", shard_keys=CHUNKS // SHARDS, **index)
    prepare_index(folder / "index", keys, config, routes=routes)
    return keys


@pytest.fixture(scope="module", params=[2, SHARDS])
def workdir(request, tmp_path_factory):
    """A W whose queries visit 2 or all of 6 shards."""
    folder = tmp_path_factory.mktemp("routes") / "W"
    part(folder, "old", CHUNKS, 0, visit_shards=request.param)
    return folder


def recall(found, queries, keys, k, forbidden=None):
    """The share of the true neighbours that was found, by distance."""
    truth = nearest(queries, keys, k, forbidden)
    there = np.isfinite(truth)
    return (
        float(((found <= truth.max(1, where=there, initial=0)[:, None] + 1e-5) & there).sum())
        / there.sum()
    )


def test_shards_have_all_keys_once_and_near_ones_together(workdir):
    database = Database.open(workdir)
    index = database.index
    ids = np.concatenate([np.load(shard.directory / "chunk-ids.npy") for shard in index.shards])
    keys = database.keys.rows(np.arange(CHUNKS))
    np.testing.assert_array_equal(np.sort(ids), np.flatnonzero(~np.isnan(keys[:, 0])))
    sizes = index.manifest.fact("sizes")
    assert sum(sizes) == len(ids)
    assert max(sizes) < 1.6 * len(ids) / SHARDS
    verify.check_files(workdir, "index", verify.places()["index"])
    routes = index.routed[0].routes
    again = Routes.train(database.keys, SHARDS)
    np.testing.assert_array_equal(again.shards, routes.shards)
    assert set(routes.shards) == set(range(SHARDS))
    visits = routes.visits(keys[ids[:50]], 3)
    nearest = ((keys[ids[:50], None] - routes.cells) ** 2).sum(-1).argmin(1)
    np.testing.assert_array_equal(visits[:, 0], routes.shards[nearest])
    assert all(len(set(row)) == 3 for row in visits.tolist())


def test_few_shards_have_nearly_all_neighbours(workdir):
    retriever = Retriever(Database.open(workdir))
    index, keys = retriever.index, retriever.keys.rows(np.arange(CHUNKS))
    queries = np.concatenate([clustered(200, seed=5), np.full((1, 32), np.nan)])
    ids, distances = index.search(queries, 5)
    assert (ids[-1] == -1).all()
    share = recall(distances[:-1], queries[:-1], keys, 5)
    assert share == 1 if index.routed[0].visit == SHARDS else 0.9 < share <= 1
    assert index.complete == (index.routed[0].visit == SHARDS)
    again = pickle.loads(pickle.dumps(retriever)).index.search(queries, 5)
    np.testing.assert_array_equal(again[0], ids)
    many, _ = index.search(queries[:3], CHUNKS)
    assert ((many >= 0).sum(1) == (~np.isnan(keys[:, 0])).sum()).all(), "too few: all are searched"


class Pickling:
    """A runner whose workers unpickle the work, as those of processes do."""

    threads, in_process = 1, False

    def run(self, work, shards):
        work = pickle.loads(pickle.dumps(work))
        return ((shard, work(shard)) for shard in shards)


def test_tables_are_what_the_index_finds(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipelines.retriever.neighbours._MOST_SEARCHES", 12)
    retriever = Retriever(Database.open(workdir))
    manifest = prepare_neighbours(
        tmp_path / "t", retriever.keys, retriever, k=4, recall_queries=99, runner=Pickling()
    )
    table = NeighbourTable.open(tmp_path / "t", retriever.database, retriever.database)
    ids = np.arange(CHUNKS)
    own = retriever.database.documents(ids)
    found = retriever.index.search(retriever.keys.rows(ids), 4, own)
    np.testing.assert_array_equal(table.ids(ids), found[0])
    np.testing.assert_array_equal(table.scores(ids), found[1])
    assert manifest.fact("recall")["recall"] > (
        0.9 if retriever.index.routed[0].visit == 2 else 0.999
    )


def test_progress_is_that_of_the_searches_that_are_made(workdir, tmp_path, capsys):
    retriever = Retriever(Database.open(workdir))
    prepare_neighbours(tmp_path / "t", retriever.keys, retriever, k=4, recall_queries=9)
    searches = CHUNKS * retriever.index.routed[0].visit
    assert f" {searches}/{searches} " in capsys.readouterr().err


@pytest.mark.parametrize(("chunks", "shards"), [(450, SHARDS), (90, 1)])
def test_what_an_update_adds_follows_the_routes(workdir, tmp_path, chunks, shards):
    """Many new keys are divided as the old ones; few are one shard, which every query visits."""
    work = shutil.copytree(workdir, tmp_path / "W")
    old = Database.open(work).index.routed[0]
    folder = revisions.folder_of(work, 1)
    keys = part(folder, "new", chunks, 3, visit_shards=old.visit, routes=old.routes)
    own = Index.open(folder / "index", keys)
    assert len(own.shards) == shards
    if shards > 1:
        np.testing.assert_array_equal(own.routed[0].routes.cells, old.routes.cells)
    publishing.publish(work, 1, [0, 250], keys)
    database = Database.open(work)
    assert [group.first for group in database.index.routed] == [0, SHARDS][: 1 + bool(own.routed)]
    every, queries = database.keys.rows(np.arange(CHUNKS + chunks)), clustered(100, seed=5)
    gone = np.isin(database.chunks.documents(np.arange(len(every))), [0, 250])
    _, distances = database.index.search(queries, 5)
    share = recall(distances, queries, every, 5, np.tile(gone, (100, 1)))
    assert share == 1 if old.visit == SHARDS else 0.9 < share <= 1


def test_copies_in_several_shards_are_found_once(workdir, tmp_path):
    """With a copy of each key in its two nearest shards, few shards have more of the neighbours."""
    keys = part(tmp_path / "W", "old", CHUNKS, 0, visit_shards=2, shard_copies=2)
    index, every = Index.open(tmp_path / "W" / "index", keys), keys.rows(np.arange(CHUNKS))
    there = int((~np.isnan(every[:, 0])).sum())
    assert (len(index), sum(index.manifest.fact("sizes"))) == (there, 2 * there)
    queries = clustered(200, seed=5)
    ids, distances = index.search(queries, 5)
    assert all(len(set(row)) == 5 for row in ids.tolist())
    single = Database.open(workdir).index
    share = recall(distances, queries, every, 5)
    assert share >= recall(single.search(queries, 5)[1], queries, every, 5) or single.complete
    assert share > 0.97
