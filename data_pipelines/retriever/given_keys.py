"""Embeddings of chunks that the caller computed, by any model of any library, as the keys of a workdir.

    prepare(W, config, stages=["documents", "leakage", "tokenizer", "chunks", "duplicates"])
    python -m launch.export --workdir=W --what=chunks --split=train --to=train.parquet      # their texts
    write_given_keys(W, {"train": vectors, "validation": ..., "test": ...}, name="my-model")
    prepare(W, config)                                    with KeysConfig(model="given:my-model")

    python -m launch.prepare --workdir=W --append ...     names the keys that are missing
    python -m launch.export --workdir=W --what=chunks --split=added --to=added.parquet
    write_added_keys(W, vectors)                          then --append again

Tables, training and evaluation of W's own splits then work as with any keys. New texts cannot be embedded:
live retrieval and other evaluation texts are refused.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest, Path, shard_name
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.retriever import revisions
from data_pipelines.retriever.keys import GIVEN, KIND, Keys, KeysConfig
from retro_jax.errors import UserError

ADDED = "added"  # what --append has begun to add, as the name of a split


class Rows(Protocol):
    """An array [n, d] whose rows are read some at a time: a memory map, or what computes them.

    Attributes:
      shape: (n, d).
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


def write_given_keys(
    workdir: Path, vectors: Mapping[str, Rows], *, name: str, dtype: str = "float32"
) -> dict[str, Manifest]:
    """Writes W/keys/SPLIT for each split, or what is missing of them.

    Args:
      workdir: W, whose chunks are made.
      vectors: for each of train, validation and test [n, d], the embedding of each of its n chunks, in
        their order; a row of NaN for a chunk without one. Neighbours are near by squared distance:
        normalise first where a model is meant for cosines. Rows are read twice, a shard at a time:
        once to be checked, then to be written.
      name: of the model, for manifests.
      dtype: as KeysConfig has it.

    Returns:
      The manifests by split.

    Raises:
      UserError: a split is missing, its array has another shape or numbers that are not finite, or
        other keys of that name are there.
    """
    config, root = KeysConfig(f"{GIVEN}{name}", dtype), pathlib.Path(workdir)
    if set(vectors) != set(SPLITS):
        raise UserError(f"vectors are of {sorted(vectors)}: expected {', '.join(SPLITS)}")
    databases = {split: ChunkDatabase.open(root / "chunks" / split) for split in SPLITS}
    width = vectors["train"].shape[-1] if len(vectors["train"].shape) == 2 else 0
    counts = {s: _checked(vectors[s], database, width, s) for s, database in databases.items()}
    return {
        split: _write(root / KIND / split, databases[split], vectors[split], config, counts[split])
        for split in SPLITS
    }


def write_added_keys(workdir: Path, vectors: Rows) -> Manifest:
    """Writes the keys of the documents that an unfinished --append adds, or what is missing of them.

    Args:
      workdir: W, whose keys were given, and where --append has stopped for want of these.
      vectors: [n, d], as for `write_given_keys`, of `added_chunks` in their order, by the same model.

    Returns:
      The manifest. Its settings are those of the keys that are there.

    Raises:
      UserError: no --append was begun, the keys of W were not given, or the array is wrong.
    """
    chunks = added_chunks(workdir)
    before = revisions.open_keys(revisions.open_database(workdir), workdir)
    model = before.model
    if not before.are_given:
        raise UserError(f"{before.directory} is of {model!r}: expected given keys to add to")
    count = _checked(vectors, chunks, before.dimension, ADDED)
    config = KeysConfig(model, before.manifest.settings["dtype"])
    return _write(revisions.beside(chunks, revisions.KEYS), chunks, vectors, config, count)


def added_chunks(workdir: Path) -> ChunkDatabase:
    """The chunks of the documents that an unfinished --append adds.

    Raises:
      UserError: there are none.
    """
    folder = revisions.folder_of(workdir, revisions.latest(workdir) + 1)
    chunks, compacting = folder / "chunks" / "train", (folder / revisions.COMPACTION_FILE).is_file()
    if compacting or not (chunks / MANIFEST_FILE).is_file():
        found = "is of a compaction" if compacting else "is missing"
        raise UserError(f"{chunks} {found}: expected documents that --append has begun to add")
    return ChunkDatabase.open(chunks)


def check_added_keys(chunks: ChunkDatabase, model: str) -> None:
    """Raises unless the keys of an update's chunks, by a model given:NAME, were written."""
    path = revisions.beside(chunks, revisions.KEYS)
    if (path / MANIFEST_FILE).is_file():
        found = Keys.open(path, chunks).model
        if found == model:
            return
        raise UserError(f"{path} is {found}: expected keys of {model!r}")
    raise UserError(
        f"{path} is missing: expected the keys of {len(chunks)} new chunks (launch.export --what=chunks"
        f" --split={ADDED} writes their texts), as write_added_keys writes them, then --append again"
    )


def _rows(vectors: Rows, ids: range) -> np.ndarray:
    """[n, d] float32, some of the rows."""
    return np.asarray(vectors[ids.start : ids.stop], np.float32)


def _checked(vectors: Rows, database: ChunkDatabase, width: int, split: str) -> int:
    """How many rows are a key; raises unless there is one of `width` numbers for each chunk."""
    shape, expected = tuple(vectors.shape), (len(database), width)
    if shape != expected or not width:
        raise UserError(f"vectors of {split} have shape {shape}: expected {expected}")
    return sum(_keys_among(vectors, ids, split) for ids in database.shards)


def _keys_among(vectors: Rows, ids: range, split: str) -> int:
    """How many of some rows are a key."""
    rows = _rows(vectors, ids)
    none = np.isnan(rows).all(1)
    if not (np.isfinite(rows).all(1) | none).all():
        raise UserError(
            f"vectors of {split} have numbers that are not finite: expected rows of"
            " numbers, or of NaN alone"
        )
    return len(rows) - int(none.sum())


def _are_equal(keys: np.ndarray, others: np.ndarray) -> bool:
    """Whether two arrays of keys are the same; NaN is itself."""
    return np.array_equal(keys, others, equal_nan=keys.dtype.kind == "f")


def _write(
    directory: pathlib.Path, database: ChunkDatabase, vectors: Rows, config: KeysConfig, keys: int
) -> Manifest:
    """The keys of one split."""
    settings = {"embedder": {"model": config.model}, "dtype": config.dtype}
    parents = {"chunks": (database.manifest, database.directory)}
    stage = Stage(directory, KIND, settings, parents)
    names = [shard_name(KIND, i) for i in range(len(database.shards))]
    for name, ids in zip(names, database.shards, strict=True):
        stored = _rows(vectors, ids)
        if config.dtype == "bfloat16":
            stored = stored.astype(ml_dtypes.bfloat16).view(np.uint16)
        if not stage.done and stage.missing([name]):
            stage.write_array(name, stored)
        elif not _are_equal(np.load(directory / name, mmap_mode="r"), stored):
            raise UserError(
                f"{directory / name} has other keys of {config.model!r}: expected the same, another"
                f" name, or {directory} removed"
            )
    if stage.done:
        return stage.manifest()
    facts = {"chunks": len(database), "dimension": vectors.shape[1], "keys": keys}
    return stage.finish(facts | {"positions": 0, "truncated": 0, "padding": 0.0}, names)
