"""Embeddings given as arrays: their tables are those of brute force, and nothing else is embedded."""

import dataclasses

import numpy as np
import pytest

from data_pipelines import workdir
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.retriever.given_keys import write_given_keys
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir import DocumentsConfig, KeysConfig, PrepareConfig, TextCorpus
from retro_jax.errors import UserError
from tests.data_pipelines.chunk_database import base_tokenizers

_TEXTS = [(f"d{i}", f"lobster {i} def return {i * 7} crustacean") for i in range(24)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """W with chunks alone, its settings, and vectors for them."""
    root = tmp_path_factory.mktemp("given")
    base_tokenizers.train(root / "base")
    config = PrepareConfig(
        DocumentsConfig((TextCorpus("mine", _TEXTS),), validation=0.2, test=0.2),
        tokenizer=workdir.TokenizerConfig(base=str(root / "base")),
        keys=KeysConfig("given:mine"),
        index=workdir.IndexConfig(kind="exact"),
        neighbours=workdir.NeighboursConfig(train=2, validation=3, test=3, recall_queries=5),
    )
    workdir.prepare(root / "W", config, stages=["documents", "leakage", "tokenizer", "chunks"])
    random = np.random.default_rng(0)
    counts = {s: len(ChunkDatabase.open(root / "W/chunks" / s)) for s in SPLITS}
    return root / "W", config, {s: random.normal(size=(n, 6)) for s, n in counts.items()}


def test_wrong_vectors_are_refused_before_anything_is_written(prepared):
    folder, config, vectors = prepared
    with pytest.raises(
        UserError, match=r"keys/train is missing: expected the keys of 'given:mine'"
    ):
        workdir.prepare(folder, config)
    with pytest.raises(UserError, match=r"vectors are of \['train'\]: expected train, validation"):
        write_given_keys(folder, {"train": vectors["train"]}, name="mine")
    for split, wrong in (
        ("test", vectors["test"][:-1]),
        ("validation", vectors["validation"][:, 1:]),
    ):
        with pytest.raises(UserError, match=rf"vectors of {split} have shape .* expected \("):
            write_given_keys(folder, vectors | {split: wrong}, name="mine")
    wrong = vectors["train"].copy()
    wrong[0, 2] = np.inf
    with pytest.raises(UserError, match=r"vectors of train have numbers that are not finite"):
        write_given_keys(folder, vectors | {"train": wrong}, name="mine")
    assert not (folder / "keys").exists()


class Computed:
    """Rows that are computed a shard at a time."""

    def __init__(self, array, shards):
        self.shape, self._array, self._shards = array.shape, array, shards

    def __getitem__(self, rows):
        assert range(rows.start, rows.stop) in self._shards
        return self._array[rows]


def test_tables_are_those_of_the_vectors(prepared):
    folder, config, vectors = prepared
    shards = ChunkDatabase.open(folder / "chunks" / "train").shards
    train = Computed(vectors["train"], shards)
    write_given_keys(folder, vectors | {"train": train}, name="mine")
    workdir.prepare(folder, config)
    scores = NeighbourTable.open(folder / "neighbours" / "test").scores(
        np.arange(len(vectors["test"]))
    )
    distances = np.square(vectors["test"][:, None] - vectors["train"][None]).sum(-1)
    np.testing.assert_allclose(scores, np.sort(distances, axis=1)[:, :3], rtol=1e-4)
    with pytest.raises(UserError, match=r"was given as arrays \('given:mine'\): no model is here"):
        Retriever.open(folder).check_model()
    other = dataclasses.replace(config, keys=KeysConfig("given:other"))
    with pytest.raises(
        UserError, match=r"keys/train is given:mine: expected the keys of 'given:oth"
    ):
        workdir.prepare(folder, other)
