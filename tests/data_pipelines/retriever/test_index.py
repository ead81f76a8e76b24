"""The index: its kind by the number of keys, what it finds, and that it is whole or not there."""

import shutil
import sys

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.retriever import index as module
from data_pipelines.retriever.index import Index, IndexConfig, plan_index, prepare_index
from retro_jax.errors import UserError
from tests.data_pipelines.synthetic import clustered, nearest, write_database, write_keys


def make_keys(folder, vectors):
    database = write_database(folder / "chunks", [len(vectors)])
    return write_keys(folder / "keys", database, vectors)


@pytest.mark.parametrize(
    ("n", "kind"),
    [
        (0, "brute_force"),
        (3, "brute_force"),
        (19_999, "brute_force"),
        (20_000, "hashing"),
        (99_999, "hashing"),
        (100_000, "tree"),
    ],
)
def test_the_kind_follows_the_number_of_keys(n, kind):
    assert plan_index(n, 384, IndexConfig()).kind == kind


def test_the_tree_of_the_plan():
    plan = plan_index(175_000, 384, IndexConfig())
    assert (plan.num_leaves, plan.leaves_to_search) == (418, 53)
    assert (plan.dimensions_per_block, plan.reorder) == (4, 100)
    chosen = IndexConfig(num_leaves=7, leaves_to_search=3, dimensions_per_block=2, reorder=50)
    assert plan_index(100_000, 384, chosen) == module.IndexPlan("tree", 7, 3, 2, 50)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"kind": "brute_force"}, 1.0),
        ({"kind": "exact"}, 1.0),
        ({"kind": "exact", "shard_keys": 600}, 1.0),
        ({"kind": "hashing", "shard_keys": 1000}, 0.99),
        ({"kind": "hashing"}, 0.99),
        ({"kind": "tree", "num_leaves": 40, "leaves_to_search": 10}, 0.9),
    ],
)
def test_finds_the_nearest(tmp_path, settings, least):
    vectors = clustered(2000)
    vectors[[5, 77, 1999]] = np.nan
    keys = make_keys(tmp_path, vectors)
    prepare_index(tmp_path / "index", keys, IndexConfig(**settings))
    index = Index.open(tmp_path / "index", keys)
    assert len(index) == 1997
    queries = clustered(100, seed=1)
    ids, distances = index.search(queries, 10)
    truth = nearest(queries, vectors, 10)
    assert (distances <= truth[:, -1:] + 1e-5).mean() >= least
    assert (np.diff(distances, axis=1) >= 0).all()
    again = ((vectors[ids] - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(distances, again, atol=1e-5)  # so chunk ids, not positions


def test_widening_looks_into_more_leaves(tmp_path):
    vectors, queries = clustered(2000), clustered(100, seed=1)
    keys = make_keys(tmp_path, vectors)
    config = IndexConfig(kind="tree", num_leaves=40, leaves_to_search=1)
    prepare_index(tmp_path / "index", keys, config)
    index = Index.open(tmp_path / "index", keys)
    furthest = nearest(queries, vectors, 10)[:, -1:] + 1e-5
    narrow = (index.search(queries, 10)[1] <= furthest).mean()
    wide = (index.search(queries, 10, widen=40)[1] <= furthest).mean()
    assert narrow < 0.8 < 0.99 < wide


@pytest.mark.parametrize("n", [1, 3])
def test_a_database_of_few_chunks(tmp_path, n):
    vectors = clustered(n)
    keys = make_keys(tmp_path, vectors)
    prepare_index(tmp_path / "index", keys, IndexConfig())
    ids, distances = Index.open(tmp_path / "index", keys).search(vectors, 5)
    assert (ids[:, 0] == np.arange(n)).all()
    assert np.sort(ids[:, :n], axis=1).tolist() == [list(range(n))] * n
    assert (ids[:, n:] == -1).all()
    assert np.isinf(distances[:, n:]).all()


def test_a_database_without_any_text(tmp_path):
    keys = make_keys(tmp_path, np.full((4, 32), np.nan))
    prepare_index(tmp_path / "index", keys, IndexConfig())
    index = Index.open(tmp_path / "index", keys)
    assert len(index) == 0
    assert (index.search(clustered(2), 3)[0] == -1).all()


def test_a_moved_directory_finds_the_same(tmp_path):
    vectors = clustered(500)
    keys = make_keys(tmp_path, vectors)
    prepare_index(tmp_path / "index", keys, IndexConfig(kind="tree", num_leaves=5))
    before = Index.open(tmp_path / "index", keys).search(vectors, 4)
    shutil.move(tmp_path / "index", tmp_path / "elsewhere" / "index")
    after = Index.open(tmp_path / "elsewhere" / "index", keys).search(vectors, 4)
    for a, b in zip(before, after, strict=True):
        assert a.tobytes() == b.tobytes()
    for path in (tmp_path / "elsewhere" / "index").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        assert path.suffix != ".pkl"


def test_is_published_once_and_whole(tmp_path, monkeypatch):
    keys = make_keys(tmp_path, clustered(200))
    config = IndexConfig(kind="hashing")

    class Killed(BaseException):
        pass

    build = module.build_searcher

    def killed(*arguments):
        searcher = build(*arguments)
        real = searcher.serialize

        def serialize(folder, relative):
            real(folder, relative)
            raise Killed

        searcher.serialize = serialize
        return searcher

    monkeypatch.setattr(module, "build_searcher", killed)
    with pytest.raises(Killed):
        prepare_index(tmp_path / "index", keys, config)
    with pytest.raises(UserError, match="is unfinished"):
        Index.open(tmp_path / "index", keys)
    monkeypatch.setattr(module, "build_searcher", build)
    manifest = prepare_index(tmp_path / "index", keys, config)
    on_disk = {path.name for path in (tmp_path / "index").iterdir()} - {"manifest.json"}
    assert on_disk == {shard.name for shard in manifest.shards}
    monkeypatch.setattr(module, "build_searcher", killed)
    assert prepare_index(tmp_path / "index", keys, config).hash == manifest.hash


def test_refuses_other_keys_and_other_settings(tmp_path):
    keys = make_keys(tmp_path, clustered(30))
    other = make_keys(tmp_path / "other", clustered(30, seed=1))
    prepare_index(tmp_path / "index", keys, IndexConfig())
    with pytest.raises(UserError, match=f"{tmp_path}/index and {tmp_path}/other/keys do not"):
        Index.open(tmp_path / "index", other)
    with pytest.raises(UserError, match=r'config.kind: "auto" -> "hashing"'):
        prepare_index(tmp_path / "index", keys, IndexConfig(kind="hashing"))


def test_keys_that_miscount_are_refused(tmp_path):
    keys = make_keys(tmp_path, clustered(30))
    keys.manifest.facts["keys"] = 31
    with pytest.raises(UserError, match="holds 30 keys: expected 31 by its manifest"):
        prepare_index(tmp_path / "index", keys, IndexConfig())


def test_refuses_what_few_keys_cannot_give(tmp_path):
    keys = make_keys(tmp_path, clustered(10))
    with pytest.raises(UserError, match=r"IndexConfig\.kind is 'hashing': expected 'brute_force'"):
        prepare_index(tmp_path / "index", keys, IndexConfig(kind="hashing"))
    assert not (tmp_path / "index").exists()
    with pytest.raises(UserError, match="num_leaves is 50: expected at most the 20 keys"):
        plan_index(20, 16, IndexConfig(kind="tree", num_leaves=50))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "forest"),
        ("num_leaves", -1),
        ("leaves_to_search", 0.5),
        ("dimensions_per_block", -2),
        ("reorder", 0),
        ("training_sample", 0),
        ("shard_keys", -1),
        ("recall_target", 0.0),
    ],
)
def test_refuses_a_setting(field, value):
    with pytest.raises(UserError, match=f"IndexConfig.{field} is {value!r}: expected"):
        IndexConfig(**{field: value})


def test_a_missing_scann_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    with pytest.raises(UserError, match=r"ScaNN cannot be imported.*retro-jax\[data\]"):
        module._scann()


def test_a_damaged_index_is_named(tmp_path):
    keys = make_keys(tmp_path, clustered(30))
    prepare_index(tmp_path / "index", keys, IndexConfig())
    path = tmp_path / "index" / "dataset.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{path} has"):
        Index.open(tmp_path / "index", keys)
    assert Manifest.read(tmp_path / "index").fact("plan")["kind"] == "brute_force"
