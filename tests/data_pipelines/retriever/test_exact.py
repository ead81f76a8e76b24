"""Exact search on devices: the same as a naive search, for any number of keys, devices and blocks."""

import jax
import numpy as np
import pytest

from data_pipelines.retriever.exact import ExactSearcher
from tests.data_pipelines.synthetic import clustered, nearest


@pytest.mark.parametrize(("count", "rows"), [(1, 64), (7, 64), (500, 16), (501, 1 << 16)])
def test_equals_a_naive_search(count, rows):
    assert len(jax.devices()) == 8
    keys, queries = clustered(count) * 3, clustered(9, seed=1) * 2
    searcher = ExactSearcher(keys, rows=rows)
    assert len(searcher) == count
    k = min(count, 6)
    found, distances = searcher.search(queries, k)
    assert (found.dtype, distances.dtype) == (np.int64, np.float32)
    truth = nearest(queries, keys, k)
    np.testing.assert_allclose(distances, truth, rtol=1e-4, atol=1e-4)
    again = ((keys[found] - queries[:, None]) ** 2).sum(-1)
    np.testing.assert_allclose(again, distances, rtol=1e-4, atol=1e-4)
    assert all(len(set(row)) == k for row in found.tolist())


def test_keys_lie_over_all_devices():
    searcher = ExactSearcher(clustered(800), rows=50)
    shards = searcher._keys.addressable_shards
    assert {shard.data.shape for shard in shards} == {(1, 2, 50, 32)}
    assert len({shard.device for shard in shards}) == 8
    held = np.concatenate([np.asarray(shard.data).reshape(-1, 32) for shard in shards])
    np.testing.assert_array_equal(held, clustered(800))


def test_equally_near_keys_stand_by_row():
    keys = np.repeat(clustered(3), 4, axis=0)
    found, _ = ExactSearcher(keys).search(keys[4:5], 4)
    assert found.tolist() == [[4, 5, 6, 7]]


def test_an_approximate_search_reaches_its_target():
    keys, queries = clustered(4000), clustered(50, seed=1)
    _, distances = ExactSearcher(keys, recall_target=0.9).search(queries, 10)
    truth = nearest(queries, keys, 10)
    assert (distances <= truth[:, -1:] + 1e-5).mean() >= 0.9
