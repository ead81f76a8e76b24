"""Embeddings of chunks that the caller computed, by any model of any library, as the keys of a workdir.

    prepare(W, config, stages=["documents", "leakage", "tokenizer", "chunks", "duplicates"])
    python -m launch.export --workdir=W --what=chunks --split=train --to=train.parquet      # their texts
    write_given_keys(W, {"train": vectors, "validation": ..., "test": ...}, name="my-model")
    prepare(W, config)                                    with KeysConfig(model="given:my-model")

Tables, training and evaluation of W's own splits then work as with any keys. New texts cannot be embedded:
live retrieval and other evaluation texts are refused.
"""

import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from data_pipelines.artefacts.manifest import Manifest, Path, Stage, shard_name
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.retriever.keys import GIVEN, KIND, KeysConfig
from retro_jax.errors import UserError


def write_given_keys(
    workdir: Path, vectors: Mapping[str, np.ndarray], *, name: str, dtype: str = "float32"
) -> dict[str, Manifest]:
    """Writes W/keys/SPLIT for each split, or what is missing of them.

    Args:
      workdir: W, whose chunks are made.
      vectors: for each of train, validation and test [n, d], the embedding of each of its n chunks, in
        their order; a row of NaN for a chunk without one. Neighbours are near by squared distance:
        normalise first where a model is meant for cosines.
      name: of the model, for manifests.
      dtype: as KeysConfig has it.

    Returns:
      The manifests by split.

    Raises:
      UserError: a split is missing, or its array has another shape, or numbers that are not finite.
    """
    config, root = KeysConfig(f"{GIVEN}{name}", dtype), pathlib.Path(workdir)
    if set(vectors) != set(SPLITS):
        raise UserError(f"vectors are of {sorted(vectors)}: expected {', '.join(SPLITS)}")
    databases = {split: ChunkDatabase.open(root / "chunks" / split) for split in SPLITS}
    arrays = {split: np.asarray(vectors[split], np.float32) for split in SPLITS}
    width = arrays["train"].shape[-1] if arrays["train"].ndim == 2 else 0
    for split, array in arrays.items():
        expected = (len(databases[split]), width)
        if array.shape != expected or not width:
            raise UserError(f"vectors of {split} have shape {array.shape}: expected {expected}")
        none = np.isnan(array).all(1)
        if not np.isfinite(array[~none]).all():
            raise UserError(
                f"vectors of {split} have numbers that are not finite: expected rows of"
                " numbers, or of NaN alone"
            )
    return {split: _write(root, split, databases[split], arrays[split], config) for split in SPLITS}


def _write(
    root: pathlib.Path, split: str, database: ChunkDatabase, array: np.ndarray, config: KeysConfig
) -> Manifest:
    """The keys of one split."""
    settings = {"embedder": {"model": config.model}, "dtype": config.dtype}
    parents = {"chunks": (database.manifest, database.directory)}
    stage = Stage(root / "keys" / split, KIND, settings, parents)
    if stage.done:
        return stage.manifest()
    names = [shard_name(KIND, i) for i in range(len(database.shards))]
    stored = array
    if config.dtype == "bfloat16":
        stored = array.astype(ml_dtypes.bfloat16).view(np.uint16)
    for name, ids in zip(names, database.shards, strict=True):
        if stage.missing([name]):
            stage.write_array(name, stored[ids.start : ids.stop])
    keys = int((~np.isnan(array[:, 0])).sum())
    facts = {"chunks": len(database), "dimension": array.shape[1], "keys": keys}
    return stage.finish(facts | {"positions": 0, "truncated": 0, "padding": 0.0}, names)
