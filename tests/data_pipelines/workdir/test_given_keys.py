"""Embeddings given as arrays: their tables are those of brute force, and nothing else is embedded."""

import dataclasses
import shutil

import numpy as np
import pytest
from pyarrow import parquet

from data_pipelines import workdir
from data_pipelines.artefacts.runner import InProcess
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.evaluation.export import export_chunks
from data_pipelines.evaluation.splits import open_split
from data_pipelines.retriever import revisions
from data_pipelines.retriever.given_keys import write_added_keys, write_given_keys
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir import DocumentsConfig, KeysConfig, PrepareConfig, TextCorpus
from data_pipelines.workdir.compaction import compact
from data_pipelines.workdir.preparation import Preparation
from data_pipelines.workdir.update import update
from data_pipelines.workdir.verify import verify
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
    write_given_keys(folder, vectors, name="mine")  # the same again
    other = vectors | {"test": vectors["test"] + 1}
    with pytest.raises(UserError, match=r"keys/test/\S+ has other keys of 'given:mine': expected"):
        write_given_keys(folder, other, name="mine")
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


def test_an_update_takes_given_keys(prepared, tmp_path):
    folder, config, vectors = prepared
    W = tmp_path / "W"
    lines = []
    shutil.copytree(folder, W)
    write_given_keys(W, vectors, name="mine")
    workdir.prepare(W, config)
    with pytest.raises(UserError, match=r"revisions/00001/chunks/train is missing: expected docu"):
        write_added_keys(W, vectors["train"])
    texts = [("new", "a crab of def return"), ("other", "lobster " * 200)]
    corpora = (TextCorpus("more", texts, split="train"),)
    documents = dataclasses.replace(config.documents, corpora=corpora)
    more = dataclasses.replace(config, documents=documents)
    p = Preparation(W, more, InProcess(), lines.append)
    missing = r"revisions/00001/keys/train is missing: expected the keys of \d+ new chunks"
    for _ in range(2):
        with pytest.raises(UserError, match=missing):
            update(p, append=True, remove=[])
    count = export_chunks(W, "added", tmp_path / "added.parquet")
    table = parquet.read_table(tmp_path / "added.parquet")
    assert "crab" in table["text"].to_pylist()[table["document"].to_pylist().index("new")]
    new = np.random.default_rng(1).normal(size=(count, 6))
    for wrong in (new[1:], new[:, 1:], new[:0]):
        with pytest.raises(UserError, match=r"vectors of added have shape .* expected \("):
            write_added_keys(W, wrong)
    write_added_keys(W, new)
    update(p, append=True, remove=[])
    every = np.concatenate([vectors["train"], new])
    distances = np.square(vectors["test"][:, None] - every[None]).sum(-1)
    ids = np.arange(len(distances))
    expected = np.sort(distances, axis=1)[:, :3]
    scores = open_split(W, "test", neighbours=3).table.scores(ids)
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    # What was removed is gone, with or without a compaction, and --verify has nothing to embed.
    removed = ChunkDatabase.open(W / "chunks/train").record(0)
    gone = range(removed.first_chunk, removed.first_chunk + removed.chunks)
    distances[:, list(gone)] = np.inf
    expected = np.sort(distances, axis=1)[:, :3]
    for change in (
        lambda: update(p, append=False, remove=[f"mine/{removed.id}"]),
        lambda: compact(p),
    ):
        change()
        scores = open_split(W, "test", neighbours=3).table.scores(ids)
        np.testing.assert_allclose(scores, expected, rtol=1e-4)
    folder = revisions.folder_of(W, 4)
    folder.mkdir()
    (folder / revisions.COMPACTION_FILE).touch()  # one that was killed
    with pytest.raises(
        UserError, match="revisions/00004/chunks/train is of a compaction: expected"
    ):
        write_added_keys(W, new)
    shutil.rmtree(folder)
    verify(W, sample=3, seed=0, report=lines.append)
    assert any("given:mine is not here, so no chunk is embedded again" in line for line in lines)


def test_arrays_of_two_calls_are_not_mixed(prepared, tmp_path, monkeypatch):
    folder, _, vectors = prepared
    shutil.copytree(folder / "chunks", tmp_path / "chunks")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            write_given_keys(tmp_path, vectors, name="mine")
    other = vectors | {"train": vectors["train"] + 1}
    with pytest.raises(UserError, match=r"has other keys of 'given:mine': expected the same"):
        write_given_keys(tmp_path, other, name="mine")
    manifests = write_given_keys(tmp_path, vectors, name="mine")
    assert manifests["train"].fact("keys") == len(vectors["train"])
