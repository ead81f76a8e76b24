"""The exact search equals a float64 search by brute force, whatever the keys, devices and blocks."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.retriever import exact
from data_pipelines.retriever.exact import ExactSearcher
from data_pipelines.retriever.index_shard import compare_all
from tests.data_pipelines.synthetic import clustered, nearest, write_database, write_keys


class Rows:
    """Keys with the document of each."""

    def __init__(self, keys, documents):
        self.keys, self.owners = keys, documents

    def __len__(self):
        return len(self.keys)

    def rows(self, places):
        return self.keys[places]

    def documents(self, places):
        return self.owners[places]


def brute_force(queries, keys, k, documents=None, exclude=None):
    """Places and float64 distances by a full sort, of equal distances the lower place first."""
    documents = np.arange(len(keys)) if documents is None else documents
    exclude = np.full(len(queries), -9) if exclude is None else exclude
    places, distances = np.full((len(queries), k), -1), np.full((len(queries), k), np.inf)
    for i, query in enumerate(queries.astype(np.float64)):
        if not np.isfinite(query).all():
            continue
        all_distances = ((keys.astype(np.float64) - query) ** 2).sum(1)
        allowed = np.isfinite(all_distances) & (documents >= 0) & (documents != exclude[i])
        order = [p for p in np.argsort(all_distances, kind="stable") if allowed[p]][:k]
        places[i, : len(order)], distances[i, : len(order)] = order, all_distances[order]
    return places, distances


@pytest.mark.parametrize("on_devices", [True, False])
@pytest.mark.parametrize(("count", "rows"), [(1, 64), (7, 64), (500, 32), (501, 1 << 16)])
def test_equals_a_naive_search(count, rows, on_devices):
    assert len(jax.devices()) == 8
    keys, queries = clustered(count) * 3, clustered(9, seed=1) * 2
    searcher = ExactSearcher(keys, rows=rows, on_devices=on_devices)
    assert len(searcher) == count
    found, distances = searcher.search(queries, 6)
    assert (found.dtype, distances.dtype) == (np.int64, np.float32)
    places, truth = brute_force(queries, keys, 6)
    np.testing.assert_array_equal(found, places)
    np.testing.assert_allclose(distances, truth, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 700),
    kinds=st.integers(1, 40),
    k=st.sampled_from([1, 3, 8, 40, 900]),
    documents=st.integers(1, 9),
    on_devices=st.booleans(),
)
def test_ties_exclusions_and_rows_without_text(seed, count, kinds, k, documents, on_devices):
    """Whole numbers: every distance is exact in float32 too, and most are equal to others."""
    draw = np.random.default_rng(seed)
    keys = draw.integers(-3, 4, (kinds, 8)).astype(np.float32)[draw.integers(0, kinds, count)]
    keys[draw.random(count) < 0.1] = np.nan
    owners = draw.integers(-1, documents, count)  # -1: removed
    queries = draw.integers(-3, 4, (5, 8)).astype(np.float32)
    queries[1] = np.nan
    exclude = draw.integers(-1, documents, 5)
    searcher = ExactSearcher(Rows(keys, owners), rows=32, on_devices=on_devices)
    found, distances = searcher.search(queries, k, exclude)
    places, truth = brute_force(queries, keys, k, owners, np.where(exclude < 0, -9, exclude))
    np.testing.assert_array_equal(found, places)
    np.testing.assert_array_equal(distances, truth.astype(np.float32))


def test_ties_beyond_a_group_and_a_device_are_by_place():
    keys = np.zeros((5000, 4), np.float32)
    keys[::3] = 1
    keys[4999] = np.nan
    searcher = ExactSearcher(keys, rows=256)
    found, distances = searcher.search(np.zeros((2, 4), np.float32), 20)
    assert found[0].tolist() == [i for i in range(40) if i % 3][:20] == found[1].tolist()
    assert (distances == 0).all()


def test_all_candidates_excluded_is_nothing_and_never_nan():
    keys = Rows(clustered(40), np.full(40, 7))
    queries = clustered(3, seed=1)
    found, distances = ExactSearcher(keys).search(queries, 4, np.array([7, 8, -1]))
    assert (found[0] == -1).all() and np.isposinf(distances[0]).all()
    assert (found[1:] >= 0).all() and np.isfinite(distances[1:]).all()
    removed = Rows(clustered(40), np.full(40, -1))
    found, distances = ExactSearcher(removed, on_devices=False).search(queries, 4)
    assert (found == -1).all() and np.isposinf(distances).all()
    for none in (np.empty((0, 32), np.float32), np.full((3, 32), np.nan, np.float32)):
        found, distances = ExactSearcher(none).search(queries, 2)
        assert (found == -1).all() and np.isposinf(distances).all()
    huge = np.full((2, 4), 1e19, np.float32)  # squares of differences overflow
    found, distances = ExactSearcher(huge).search(-huge, 2)
    assert not np.isnan(distances).any()


def test_near_ties_are_told_apart_far_from_the_origin():
    """Products of such keys round by more than the distances differ."""
    draw = np.random.default_rng(0)
    keys = (draw.normal(size=(300, 16)) + 30).astype(np.float32)
    queries = keys[:20] + draw.normal(size=(20, 16)).astype(np.float32)
    found, distances = ExactSearcher(keys).search(queries, 5)
    places, truth = brute_force(queries, keys, 5)
    np.testing.assert_array_equal(found, places)
    np.testing.assert_allclose(distances, truth, rtol=1e-5)


def test_many_queries_are_the_same_alone(monkeypatch):
    monkeypatch.setattr(exact, "_QUERIES", 16)
    keys, queries = clustered(400), clustered(70, seed=1)
    searcher = ExactSearcher(keys, on_devices=False)
    found, distances = searcher.search(queries, 5, np.arange(70))
    for i in (0, 15, 16, 69):
        alone = searcher.search(queries[i : i + 1], 5, np.array([i]))
        assert alone[0].tobytes() == found[i].tobytes()
        assert alone[1].tobytes() == distances[i].tobytes()


def test_keys_are_cut_over_all_devices():
    (block,) = ExactSearcher(clustered(512), rows=64)._blocks
    shards = block.keys.addressable_shards
    assert {shard.data.shape for shard in shards} == {(1, 64, 32)}
    assert len({shard.device for shard in shards}) == 8
    rows = np.concatenate([np.asarray(shard.data).reshape(-1, 32) for shard in shards])
    np.testing.assert_array_equal(rows, clustered(512))


class Made:
    """Keys that are made when they are read, faster than they are compared."""

    def __init__(self, count, compared):
        self._count, self._compared = count, compared

    def __len__(self):
        return self._count

    def rows(self, places):
        assert all(scores.is_ready() for scores, _ in self._compared)
        return np.ones((len(places), 384), np.float32)

    def documents(self, places):
        return np.asarray(places)


def test_one_block_is_in_memory_however_fast_they_are_read(monkeypatch):
    compared, compare = [], exact._compare

    def keep(*arguments, **options):
        compared.append(compare(*arguments, **options))
        return compared[-1]

    monkeypatch.setattr(exact, "_compare", keep)
    rows = (1 << 13) // jax.local_device_count()
    keys = Made(20 << 13, compared)
    ExactSearcher(keys, on_devices=False, rows=rows).search(np.ones((256, 384), np.float32), 4)
    assert len(compared) == 20


def test_an_approximate_search_reaches_its_target():
    keys, queries = clustered(4000), clustered(50, seed=1)
    _, distances = ExactSearcher(keys, recall_target=0.9).search(queries, 10)
    truth = nearest(queries, keys, 10)
    assert (distances <= truth[:, -1:] + 1e-5).mean() >= 0.9


def test_a_database_of_a_thousand_tiny_shards(tmp_path):
    vectors = clustered(1500)
    vectors[[3, 700]] = np.nan
    database = write_database(tmp_path / "chunks", [1, 2] * 500, shards=1000)
    keys = write_keys(tmp_path / "keys", database, vectors)
    queries, owners = clustered(6, seed=1), database.documents(np.arange(1500))
    exclude = np.array([-1, 5, 999, 0, 2, -1])
    found, distances = compare_all(keys, queries, 7, exclude)
    places, truth = brute_force(queries, vectors, 7, owners, np.where(exclude < 0, -9, exclude))
    np.testing.assert_array_equal(found, places)
    np.testing.assert_allclose(distances, truth, rtol=1e-5)
    subset = np.arange(0, 1500, 7)
    found, _ = compare_all(keys, queries, 3, exclude, subset)
    places, _ = brute_force(queries, vectors[subset], 3, owners[subset], exclude)
    np.testing.assert_array_equal(found, subset[places])
