"""Neighbours from a part of the retrieval database: what a smaller one would have given.

A document is in a share s of the database when a hash of its name, as a number from 0 to 1, is below
s, so that a smaller database is part of a larger. Removed documents are in no share. Neighbours of the
table that are in the part are the part's nearest; where these are fewer than k, every key of the part
is compared, or every chunk of it scored by BM25.
"""

import hashlib
import pathlib
from collections.abc import Callable

import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.corpora import SPLITS
from data_pipelines.documents.documents import stable_fraction
from data_pipelines.evaluation.splits import Split, places_of
from data_pipelines.retriever.index_shard import compare_all
from data_pipelines.retriever.keys import Keys
from data_pipelines.retriever.queries import OwnDocuments
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Retriever
from retro_jax.distributed.progress import progress_bar
from retro_jax.errors import UserError
from retro_jax.storage.files import read_array, write_array

_QUERIES = 1 << 13  # that pass over the keys together


def check_shares(split: Split) -> None:
    """Refuses shares of the database for its own documents, or where its keys name candidates only.

    Raises:
      UserError: the database's own split, or a table of dense+bm25.
    """
    if split.table is not None and split.table.retriever == "dense+bm25":
        raise UserError(
            f"--database_shares: {split.table.directory} was made by the retriever"
            f" {split.table.retriever!r}: expected 'dense' or 'bm25'"
        )
    if split.is_database:
        others = ", ".join(name for name in SPLITS if name != "train")
        raise UserError(f"--database_shares of the training split itself: expected {others}")


def subsampled(
    split: Split, share: float, k: int, *, folder: pathlib.Path, data: pathlib.Path
) -> np.ndarray:
    """[n, k] int64: the nearest chunks of a share of the database for each of split.ids; -1 for none.

    Args:
      split: with its table. share: from 0 to 1, of the database's documents.
      folder: where the table is kept, to be read the next time. data: of the prepared data.
    """
    assert split.table is not None and split.retrieval is not None
    digest = hashlib.sha256(split.ids.tobytes()).hexdigest()
    parent = split.table.manifest.hash
    live = "-live" if len(split.retrieval.removed) else ""  # other files may have removed documents
    path = folder / f"neighbours-{k}-{float(share)!r}-{parent[:12]}-{digest[:12]}{live}.npy"
    if path.is_file():
        return read_array(path)
    mask = kept_chunks(split, share)
    neighbours = split.table.ids(split.ids, split.table.k)
    inside = (neighbours >= 0) & mask[np.maximum(neighbours, 0)]
    order = np.argsort(~inside, axis=1, kind="stable")[:, :k]
    ids = np.take_along_axis(np.where(inside, neighbours, -1), order, axis=1)
    ids = np.pad(ids, ((0, 0), (0, k - ids.shape[1])), constant_values=-1)
    rows = np.flatnonzero((ids < 0).any(axis=1))
    if len(rows) and mask.any():
        find = (_best if split.table.retriever == "bm25" else _nearest)(split, mask, k, data)
        with progress_bar(len(rows), f"{share:.3g} of the database", "chunk") as bar:
            for first in range(0, len(rows), _QUERIES):
                part = rows[first : first + _QUERIES]
                ids[part] = find(split.ids[part])
                bar.update(len(part))
    write_array(path, ids)
    return ids


def _nearest(
    split: Split, mask: np.ndarray, k: int, data: pathlib.Path
) -> Callable[[np.ndarray], np.ndarray]:
    """Finds the k nearest by keys of the chunks in a mask, for chunks of a split [n]: ids [n, k]."""
    assert split.retrieval is not None
    keys = Database.open(data, split.retrieval.manifest.revision).keys
    candidates = np.flatnonzero(mask)
    embed, owners = _embeddings(split, keys, data), _owners(split)
    return lambda ids: compare_all(keys, embed(ids), k, owners.of(ids), candidates)[0]


def _best(
    split: Split, mask: np.ndarray, k: int, data: pathlib.Path
) -> Callable[[np.ndarray], np.ndarray]:
    """As `_nearest`, the best by BM25."""
    assert split.retrieval is not None
    bm25 = Database.open(data, split.retrieval.manifest.revision).bm25
    owners = _owners(split)
    return lambda ids: bm25.search(split.database.chunks(ids), k, owners.of(ids), mask)[0]


def _owners(split: Split) -> OwnDocuments:
    """What tells the document of the retrieval database that a chunk of a split is of."""
    assert split.retrieval is not None
    return OwnDocuments(split.database, split.retrieval)


def _embeddings(split: Split, keys: Keys, data: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """The embeddings [n, d] of a split's chunks [n]: stored ones, or made anew as the database's keys."""
    stored = places_of(data, split.name).keys
    if (stored / MANIFEST_FILE).is_file():
        return Keys.open(stored, split.database).rows
    encoder = Retriever.encoder_of(data, keys)
    return lambda ids: encoder.keys(split.database.chunks(ids))


def kept_chunks(split: Split, share: float) -> np.ndarray:
    """[chunks of the database] bool: which belong to a document in the share that was not removed."""
    assert split.retrieval is not None
    names = (f"{record.corpus}/{record.id}" for record in split.retrieval.records())
    mask = np.array([stable_fraction(name, "database") < share for name in names], bool)
    mask[split.retrieval.removed] = False
    return mask[split.retrieval.documents(np.arange(len(split.retrieval)))]
