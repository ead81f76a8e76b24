"""The index: its kind by the number of keys, what it finds, and that it is whole or not there."""

import shutil
import sys

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.retriever import index_config, index_shard
from data_pipelines.retriever.exact import ExactSearcher
from data_pipelines.retriever.index import Index
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import KINDS, IndexConfig, plan_index
from data_pipelines.retriever.index_kind import IndexPlan
from data_pipelines.retriever.scann_index import ScannIndex, import_scann
from retro_jax.errors import UserError
from tests.data_pipelines.synthetic import clustered, nearest, write_database, write_keys


def make_keys(folder, vectors, chunks=None):
    database = write_database(folder / "chunks", chunks or [len(vectors)])
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
    assert plan_index(100_000, 384, chosen) == IndexPlan("tree", 7, 3, 2, 50)


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"kind": "brute_force"}, 1.0),
        ({"kind": "exact"}, 1.0),
        ({"kind": "exact", "shard_keys": 600}, 1.0),
        ({"kind": "hashing", "shard_keys": 1000}, 0.99),
        ({"kind": "hashing"}, 0.99),
        ({"kind": "tree", "num_leaves": 40, "leaves_to_search": 10}, 0.9),
        ({"kind": "faiss", "num_leaves": 40, "leaves_to_search": 10}, 0.9),
        ({"kind": "faiss", "leaves_to_search": 10**6}, 1.0),
        ({"kind": "faiss", "shard_keys": 600}, 0.7),
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
    (shard,) = Index.open(tmp_path / "index", keys).shards
    furthest = nearest(queries, vectors, 10)[:, -1:] + 1e-5
    narrow = (shard.candidates(queries, 10)[1] <= furthest).mean()
    wide = (shard.candidates(queries, 10, widen=40)[1] <= furthest).mean()
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

    save = ScannIndex.save

    def killed(self, folder):
        save(self, folder)
        raise Killed

    monkeypatch.setattr(ScannIndex, "save", killed)
    with pytest.raises(Killed):
        prepare_index(tmp_path / "index", keys, config)
    with pytest.raises(UserError, match="is unfinished"):
        Index.open(tmp_path / "index", keys)
    assert not list(tmp_path.glob(".tmp-*"))
    monkeypatch.setattr(ScannIndex, "save", save)
    manifest = prepare_index(tmp_path / "index", keys, config)
    on_disk = {path.name for path in (tmp_path / "index").iterdir()} - {"manifest.json"}
    assert on_disk == {shard.name for shard in manifest.shards}
    monkeypatch.setattr(ScannIndex, "save", killed)
    assert prepare_index(tmp_path / "index", keys, config).hash == manifest.hash


@pytest.mark.parametrize("kind", ["brute_force", "hashing"])
@pytest.mark.parametrize("k", [504, 505, 700])
def test_many_neighbours_are_asked_of_the_index_too(tmp_path, monkeypatch, kind, k):
    vectors = clustered(2000)
    keys = make_keys(tmp_path, vectors, [4] * 500)
    prepare_index(tmp_path / "index", keys, IndexConfig(kind=kind, reorder=2000))
    monkeypatch.setattr(index_shard, "compare_all", None)
    exclude = np.arange(3)
    ids, distances = Index.open(tmp_path / "index", keys).search(vectors[:3], k, exclude)
    owners = keys.database.documents(np.arange(2000))
    truth = nearest(vectors[:3], vectors, k, owners[None] == exclude[:, None])
    assert (distances <= truth[:, -1:] * (1 + 1e-5)).mean() > 0.99
    assert (ids >= 0).all() and not (keys.database.documents(ids) == exclude[:, None]).any()


@pytest.mark.parametrize("settings", [{"kind": "hashing"}, {"kind": "tree", "num_leaves": 9}])
def test_a_search_finds_the_same_whether_it_leaves_out_documents(tmp_path, settings):
    """Tables leave out each chunk's own document, generation none: both are one retriever."""
    vectors, queries = np.random.default_rng(0).normal(size=(2, 2000, 32)).astype(np.float32)
    keys = make_keys(tmp_path, vectors)
    prepare_index(tmp_path / "index", keys, IndexConfig(**settings, reorder=20))
    index = Index.open(tmp_path / "index", keys)
    with_none = index.search(queries[:200], 50)
    with_others = index.search(queries[:200], 50, np.full(200, -1))
    np.testing.assert_array_equal(with_none[0], with_others[0])
    np.testing.assert_array_equal(with_none[1], with_others[1])


class Halves:
    """A kind of index that compares the first half of the keys; its file says which."""

    excludes = False

    def __init__(self, vectors=None):
        self.vectors = vectors

    def plan(self, n, dimension, wanted):
        return IndexPlan("halves", reorder=n // 2)

    def complete(self, plan):
        return False

    def build(self, vectors, plan, training_sample):
        return Halves(vectors[: plan.reorder])

    def save(self, folder):
        np.save(folder / "half.npy", self.vectors)

    def load(self, folder, plan, keys):
        return Halves(np.load(folder / "half.npy"))

    def search(self, queries, count, *, widen=1, exclude=None):
        found = min(count, len(self.vectors))
        places, distances = ExactSearcher(self.vectors).search(queries, found)
        missing = ((0, 0), (0, count - found))
        places = np.pad(places, missing, constant_values=-1)
        return places, np.pad(distances, missing, constant_values=np.inf)


def test_a_further_kind_is_a_line_in_kinds(tmp_path, monkeypatch):
    monkeypatch.setitem(index_config.KINDS, "halves", Halves())
    vectors = clustered(400)
    vectors[0] = np.nan
    keys = make_keys(tmp_path, vectors)
    manifest = prepare_index(tmp_path / "index", keys, IndexConfig(kind="halves"))
    assert manifest.shard_names() == ["chunk-ids.npy", "half.npy"]
    index = Index.open(tmp_path / "index", keys, verify=True)
    ids, distances = index.search(clustered(9, seed=1), 5)
    assert ids.max() <= 199 + 1
    np.testing.assert_allclose(
        distances, nearest(clustered(9, seed=1), vectors[:200], 5), rtol=1e-4
    )
    every, _ = index.search(clustered(9, seed=1), 300)
    assert (every >= 0).all() and every.max() == 399, "too few candidates: every key is compared"


def test_two_builders_of_one_index_do_not_mix(tmp_path, monkeypatch):
    keys = make_keys(tmp_path, clustered(600))
    config = IndexConfig(kind="tree", num_leaves=12)
    save, manifests = ScannIndex.save, []

    def meanwhile(self, folder):
        if not manifests:
            manifests.append(None)
            manifests[0] = prepare_index(tmp_path / "index", keys, config)
        save(self, folder)

    monkeypatch.setattr(ScannIndex, "save", meanwhile)
    outer = prepare_index(tmp_path / "index", keys, config)
    assert outer.hash == manifests[0].hash
    index = Index.open(tmp_path / "index", keys, verify=True)
    assert index.manifest.hash == outer.hash
    assert (index.search(clustered(5, seed=1), 3)[0] >= 0).all()
    assert {path.name for path in tmp_path.iterdir()} == {"chunks", "keys", "index"}


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
        import_scann()


def test_a_damaged_index_is_named(tmp_path):
    keys = make_keys(tmp_path, clustered(30))
    prepare_index(tmp_path / "index", keys, IndexConfig())
    path = tmp_path / "index" / "dataset.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"{path} has"):
        Index.open(tmp_path / "index", keys)
    assert Manifest.read(tmp_path / "index").fact("plan")["kind"] == "brute_force"


def test_faiss_of_few_keys_and_its_errors(tmp_path, monkeypatch):
    for n in (0, 1, 3):
        plan = plan_index(n, 16, IndexConfig(kind="faiss"))
        assert (plan.num_leaves, plan.leaves_to_search) == (1, 1)
    plan = plan_index(100_000, 16, IndexConfig(kind="faiss"))
    assert (plan.num_leaves, plan.leaves_to_search) == (316, 40)
    with pytest.raises(UserError, match=r"num_leaves is 50: expected at most the 20 keys"):
        plan_index(20, 16, IndexConfig(kind="faiss", num_leaves=50))
    kind, vectors = KINDS["faiss"], clustered(3)
    kind.build(vectors, plan_index(3, 32, IndexConfig(kind="faiss")), 100).save(tmp_path)
    found = kind.load(tmp_path, plan_index(3, 32, IndexConfig(kind="faiss")), vectors)
    ids, distances = found.search(vectors[:2], 5)
    assert ids[:, 0].tolist() == [0, 1] and (ids[:, 3:] == -1).all()
    assert np.isinf(distances[:, 3:]).all() and (distances[:, 0] == 0).all()
    with pytest.raises(UserError, match=r"index.faiss has 3 keys: expected 2"):
        kind.load(tmp_path, plan, vectors[:2])
    (tmp_path / "index.faiss").write_bytes(b"none")
    with pytest.raises(UserError, match=r"index.faiss cannot be read: expected an index of FAISS"):
        kind.load(tmp_path, plan, vectors)
    random = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    plan = plan_index(600, 8, IndexConfig(kind="faiss", num_leaves=15, leaves_to_search=1))
    index, furthest = kind.build(random, plan, 600), nearest(random, random, 9)[:, -1:] + 1e-5
    shares = [(index.search(random, 9, widen=w)[1] <= furthest).mean() for w in (1, 15)]
    assert shares[0] < 0.8 and shares[1] == 1
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"FAISS cannot be imported .* retro-jax\[faiss\]"):
        kind.load(tmp_path, plan, vectors)
