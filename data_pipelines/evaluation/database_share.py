"""Neighbours from a part of the retrieval database: what a smaller one would have given.

A document is in a share s of the database when a hash of its name, as a number from 0 to 1, is below
s, so that a smaller database is part of a larger. Neighbours that the table holds and that are in the
part are the part's nearest; where these are fewer than k, every key of the part is compared.
"""

import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.documents.documents import stable_fraction
from data_pipelines.evaluation.splits import Split, places_of
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.retriever import Retriever
from retro_jax.distributed.progress import progress_bar
from retro_jax.storage.files import read_array, write_array

_QUERIES, _KEYS = 1024, 1 << 16  # compared at once


def subsampled(
    split: Split, share: float, k: int, *, folder: pathlib.Path, data: pathlib.Path
) -> np.ndarray:
    """[n, k] int64: the nearest chunks of a share of the database for each of split.ids; -1 for none.

    Args:
      split: with its table. share: from 0 to 1, of the database's documents.
      folder: where the table is kept, to be read the next time. data: of the prepared data.
    """
    assert split.table is not None and split.retrieval is not None
    chosen = hashlib.sha256(split.ids.tobytes()).hexdigest()
    parent = split.table.manifest.hash
    path = folder / f"neighbours-{k}-{share:g}-{parent[:12]}-{chosen[:12]}.npy"
    if path.is_file():
        return read_array(path)
    kept = kept_chunks(split, share)
    found = split.table.ids(split.ids, split.table.k)
    inside = (found >= 0) & kept[np.maximum(found, 0)]
    order = np.argsort(~inside, axis=1, kind="stable")[:, :k]
    ids = np.take_along_axis(np.where(inside, found, -1), order, axis=1)
    ids = np.pad(ids, ((0, 0), (0, k - ids.shape[1])), constant_values=-1)
    rows = np.flatnonzero((ids < 0).any(axis=1))
    candidates = np.flatnonzero(kept)
    if len(rows) and len(candidates):
        retriever = Retriever.open(data)
        queries = _keys(split, retriever, data)
        with progress_bar(len(rows), f"{share:.3g} of the database", "chunk") as bar:
            for first in range(0, len(rows), _QUERIES):
                part = rows[first : first + _QUERIES]
                ids[part] = nearest(retriever, queries(split.ids[part]), candidates, k)
                bar.update(len(part))
    write_array(path, ids)
    return ids


def _keys(
    split: Split, retriever: Retriever, data: pathlib.Path
) -> Callable[[np.ndarray], np.ndarray]:
    """The keys [n, d] of a split's chunks [n]: stored ones, or made anew where none were kept."""
    stored = places_of(data, split.name).keys
    if (stored / MANIFEST_FILE).is_file():
        return Keys.open(stored, split.database).rows
    return lambda ids: retriever.encoder.keys(split.database.chunks(ids))


def kept_chunks(split: Split, share: float) -> np.ndarray:
    """[chunks of the database] bool: which are of a document in the share."""
    assert split.retrieval is not None
    names = (f"{record.corpus}/{record.id}" for record in split.retrieval.records())
    kept = np.array([stable_fraction(name, "database") < share for name in names], bool)
    return kept[split.retrieval.documents(np.arange(len(split.retrieval)))]


def nearest(
    retriever: Retriever, queries: np.ndarray, candidates: np.ndarray, k: int
) -> np.ndarray:
    """[n, k] int64: the nearest of some chunks of the database, -1 where there are no more.

    Args:
      queries: [n, d] float32; a row of NaN (no text) finds nothing.
      candidates: [c] chunk ids.
    """
    best = np.full((len(queries), k), np.inf, np.float32)
    ids = np.full((len(queries), k), -1, np.int64)
    for first in range(0, len(candidates), _KEYS):
        block = candidates[first : first + _KEYS]
        keys = retriever.keys.rows(block)
        # |q|^2 is the same for all keys of a query; chunks without text have keys of NaN.
        distances = (keys * keys).sum(axis=1)[None, :] - 2 * (queries @ keys.T)
        distances = np.where(np.isnan(distances), np.inf, distances)
        every = np.concatenate([best, distances], axis=1)
        every_ids = np.concatenate([ids, np.broadcast_to(block, distances.shape)], axis=1)
        few = np.argpartition(every, k - 1, axis=1)[:, :k]
        few = np.take_along_axis(few, np.argsort(np.take_along_axis(every, few, 1), axis=1), 1)
        best, ids = np.take_along_axis(every, few, 1), np.take_along_axis(every_ids, few, 1)
    return np.where(np.isinf(best), -1, ids)
