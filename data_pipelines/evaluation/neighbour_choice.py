"""Other neighbours than the nearest, as evaluation compares them with: tokens [n, k, R] of chunks [n].

Each function takes a split that was opened with enough neighbours, and returns a function of chunk ids,
-1 for padding.
"""

from collections.abc import Callable, Collection

import numpy as np

from data_pipelines.evaluation.splits import Split

NeighbourTokens = Callable[[np.ndarray], np.ndarray]
SharedNgrams = Callable[[np.ndarray, np.ndarray, Collection[int], int], np.ndarray]


def random_neighbours(split: Split, k: int) -> NeighbourTokens:
    """Chunks drawn from the whole database as it is now; the same ones for a chunk each time.

    Where every document was removed, there are none.
    """
    assert split.retrieval is not None
    shape, live = (len(split.database), k), split.retrieval.live_chunks
    drawn = np.full(shape, -1)
    if live:
        places = np.random.Generator(np.random.Philox(0)).integers(0, live, shape)
        drawn = split.retrieval.live_ids(places)
    return lambda ids: split.values(ids, drawn[np.maximum(ids, 0)])


def oracle_neighbours(split: Split, k: int) -> NeighbourTokens:
    """The neighbours of the chunk that follows in the same document; none for its last chunk."""
    assert split.table is not None
    table, database = split.table, split.database

    def read(ids: np.ndarray) -> np.ndarray:
        following = np.where((ids >= 0) & (ids + 1 < len(database)), ids + 1, -1)
        same = database.documents(following) == database.documents(ids)
        following = np.where(same, following, -1)
        return split.values(following, table.ids(np.maximum(following, 0), k))

    return read


def unlike_neighbours(
    split: Split, k: int, *, limit: float, size: int, shared_ngrams: SharedNgrams
) -> NeighbourTokens:
    """The first k of the table's neighbours that share few n-grams with their chunk and its successor.

    Args:
      split, k: as above. limit: the largest share of n-grams. size: of an n-gram.
      shared_ngrams: of texts [n, L], neighbours [n, K, R], tokens that match nothing and a size, the
        shares [n, K] (retro_jax.evaluate.overlap).
    """
    assert split.table is not None and split.retrieval is not None
    table, database, retrieval = split.table, split.database, split.retrieval
    ignored = {database.pad_id, database.bos_id, database.eos_id}

    def read(ids: np.ndarray) -> np.ndarray:
        neighbours = table.ids(np.maximum(ids, 0), table.k)
        shares = shared_ngrams(database.values(ids), retrieval.values(neighbours), ignored, size)
        mask = (neighbours >= 0) & (shares <= limit)
        order = np.argsort(~mask, axis=1, kind="stable")[:, :k]
        subset = np.take_along_axis(np.where(mask, neighbours, -1), order, axis=1)
        return split.values(ids, subset)

    return read
