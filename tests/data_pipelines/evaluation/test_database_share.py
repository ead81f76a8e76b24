"""After an update no condition of evaluation retrieves a removed document, or the query's own."""

import dataclasses
import shutil
import types

import numpy as np
import pytest

from data_pipelines.evaluation.database_share import kept_chunks, subsampled
from data_pipelines.evaluation.neighbour_choice import random_neighbours
from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever import publishing, revisions
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.neighbours import prepare_neighbours
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Retriever
from launch.evaluation.conditions import Condition, neighbour_tokens
from tests.data_pipelines.synthetic import clustered, nearest, write_database, write_keys

K = 4
REMOVED = [2, 7, 11]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """W of 20 documents, of which three are removed, and a validation split with one of them too."""
    work = tmp_path_factory.mktemp("shares") / "W"
    sizes = [1 + (i * 7) % 9 for i in range(20)]
    database = write_database(work / "chunks" / "train", sizes, shards=3)
    keys = write_keys(work / "keys" / "train", database, clustered(sum(sizes)))
    prepare_index(work / "index", keys, IndexConfig(kind="exact"))
    names = ["held-out", "document-5"]
    queries = write_database(work / "chunks" / "validation", [9, 6], names=names, seed=1)
    write_keys(work / "keys" / "validation", queries, clustered(15, seed=1))
    publishing.publish(work, 1, REMOVED)
    place = revisions.folder_of(work, 1) / "neighbours" / "validation"
    stored = Keys.open(work / "keys" / "validation", queries)
    prepare_neighbours(place, stored, Retriever(Database.open(work)), k=K, recall_queries=0)
    return work


@pytest.fixture(scope="module")
def split(workdir):
    return open_split(workdir, "validation", neighbours=K)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_a_share_holds_no_removed_document(workdir, split, share, tmp_path):
    found = subsampled(split, share, K, folder=tmp_path, data=workdir)
    database = split.retrieval
    owners, own = database.documents(found), split.database.documents(split.ids)
    assert not database.is_removed(owners).any()
    assert not (owners == np.where(own == 1, 5, -9)[:, None]).any(), "its own document"
    kept = kept_chunks(split, share)
    assert kept[found[found >= 0]].all()
    queries = Keys.open(workdir / "keys" / "validation", split.database).rows(split.ids)
    keys = revisions.open_keys(database, workdir).rows(np.arange(len(database)))
    chunk_owners = database.documents(np.arange(len(database)))
    forbidden = ~kept[None] | ((own == 1)[:, None] & (chunk_owners == 5)[None])
    truth = nearest(queries, keys, K, forbidden)
    distances = ((keys[found] - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(np.where(found < 0, np.inf, distances), truth, rtol=1e-4, atol=1e-5)
    again = subsampled(split, share, K, folder=tmp_path, data="/nowhere")
    np.testing.assert_array_equal(again, found)


def test_what_was_kept_before_the_removal_is_not_read(workdir, split, tmp_path):
    found = subsampled(split, 0.6, K, folder=tmp_path, data=workdir)
    (path,) = tmp_path.glob("neighbours-*.npy")
    old = path.with_name(path.name.replace("-live", ""))
    assert old != path
    np.save(old, np.zeros_like(found))
    path.unlink()
    again = subsampled(split, 0.6, K, folder=tmp_path, data=workdir)
    np.testing.assert_array_equal(again, found)


def test_random_neighbours_are_of_documents_that_are_left(workdir, split, tmp_path):
    run = types.SimpleNamespace(batches=types.SimpleNamespace(neighbour_part="both"))
    condition = Condition("random", run, 50, "random")
    tokens = neighbour_tokens(split, condition, tmp_path, workdir)(split.ids)
    database = split.retrieval
    rows = {row.tobytes(): i for i, row in enumerate(database.chunks(np.arange(len(database))))}
    drawn = np.array([[rows[n[:64].tobytes()] for n in row] for row in tokens])
    owners = database.documents(drawn)
    assert not database.is_removed(owners).any()
    left = set(range(20)) - set(REMOVED)
    assert set(owners.ravel().tolist()) == left, "any document that is left may be drawn"


def test_places_among_what_is_left_are_its_chunks(split):
    database = split.retrieval
    owners = database.documents(np.arange(len(database)))
    left = np.flatnonzero(~np.isin(owners, REMOVED))
    assert database.live_chunks == len(left)
    np.testing.assert_array_equal(database.live_ids(np.arange(len(left))), left)
    documents = database.live_documents(np.array([[-1, 0], [int(left[-1]), -1]]))
    assert documents.tolist() == [[-1, 0], [19, -1]]
    gone = np.flatnonzero(np.isin(owners, REMOVED))
    assert (database.live_documents(gone) == -1).all()


def test_shares_that_differ_in_later_digits_have_files_of_their_own(workdir, split, tmp_path):
    for share in (0.5, 0.5000001, 1, 1.0):
        subsampled(split, share, K, folder=tmp_path, data=workdir)
    names = sorted(path.name.split("-")[2] for path in tmp_path.glob("neighbours-*.npy"))
    assert names == ["0.5", "0.5000001", "1.0"]


def test_random_neighbours_of_an_emptied_database_are_padding(workdir, split, tmp_path):
    shutil.copytree(workdir, tmp_path / "W")
    publishing.publish(tmp_path / "W", 2, range(20))
    emptied = dataclasses.replace(split, retrieval=revisions.open_database(tmp_path / "W"))
    found = random_neighbours(emptied, 3)(np.append(split.ids, -1))
    assert found.shape == (len(split.ids) + 1, 3, 128)
    assert (found == split.database.pad_id).all()
