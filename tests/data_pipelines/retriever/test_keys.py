"""Keys: one path for all, a row a chunk, restartable block by block."""

import json

import ml_dtypes
import numpy as np
import pytest

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.retriever import keys as module
from data_pipelines.retriever.embedder import Embedder
from data_pipelines.retriever.keys import (
    BlockSource,
    ChunkEncoder,
    Keys,
    KeysConfig,
    as_float32,
    iterate,
    prepare_keys,
)
from retro_jax.errors import UserError
from tests.data_pipelines.retriever import bert_folder
from tests.data_pipelines.small import documents_config, prepare, tree, write_texts
from tests.data_pipelines.synthetic import write_database, write_keys


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    write_texts(folder / "texts", 60)
    (folder / "texts" / "no-text.txt").write_text("word" + " \n" * 400)
    prepare(folder / "w", documents_config(folder / "texts", validation=0.05, test=0.05))
    bert_folder.write(folder / "bert")
    make(folder / "w", folder / "bert", "keys/train")
    return folder / "w"


@pytest.fixture(scope="module")
def bert(workdir):
    return workdir.parent / "bert"


@pytest.fixture(scope="module")
def database(workdir):
    return ChunkDatabase.open(workdir / "chunks" / "train")


@pytest.fixture(scope="module")
def tokenizer(workdir):
    return Tokenizer.open(workdir / "tokenizer")


def make(workdir, bert, name, chunks="train", **settings):
    """Runs the stage into W/NAME."""
    config = KeysConfig(model=str(bert), **settings)
    return prepare_keys(workdir / name, workdir / "chunks" / chunks, workdir / "tokenizer", config)


def test_a_key_is_the_vector_of_the_decoded_chunk(workdir, bert, database, tokenizer):
    keys = Keys.open(workdir / "keys" / "train", database, verify=True)
    assert len(keys) == len(database) > 100
    assert len(database.shards) > 2, "the test should see several shards"
    ids = np.random.default_rng(0).permutation(len(database))
    texts = [tokenizer.decode(row) for row in database.chunks(ids)]
    rows, vectors = keys.rows(ids), Embedder.open(bert).embed(texts)
    np.testing.assert_allclose(rows, vectors, atol=1e-5)
    without = [i for i, text in enumerate(texts) if not text.strip()]
    assert np.flatnonzero(np.isnan(rows).all(1)).tolist() == without != []
    assert np.isfinite(np.delete(rows, without, axis=0)).all()


def test_queries_take_the_same_path(workdir, bert, database, tokenizer):
    encoder = ChunkEncoder(tokenizer, Embedder.open(bert), "float32")
    keys = Keys.open(workdir / "keys" / "train", database)
    ids = np.arange(0, len(database), 7)
    np.testing.assert_allclose(encoder.keys(database.chunks(ids)), keys.rows(ids), atol=1e-6)
    for i in ids[:3]:
        one = encoder.keys(database.chunks(ids[:1] * 0 + i))
        np.testing.assert_allclose(one, keys.rows(np.array([i])), atol=1e-6)


def test_facts(workdir, bert, database, tokenizer):
    facts = Manifest.read(workdir / "keys" / "train").facts
    embedder = Embedder.open(bert)
    texts = [tokenizer.decode(row) for row in database.chunks(np.arange(len(database)))]
    lengths = embedder.word_piece.encode(texts).lengths
    assert facts["chunks"] == len(database)
    assert facts["dimension"] == 12
    assert facts["keys"] == (lengths > 0).sum() < len(database)
    assert facts["truncated"] == (lengths > 38).sum() > 0
    assert facts["positions"] == np.minimum(lengths[lengths > 0] + 2, 40).sum()
    assert 0 < facts["padding"] < 0.5
    text = (workdir / "keys" / "train" / "manifest.json").read_text()
    assert str(workdir.parent) not in text


def test_blocks_skip_chunks_without_text(workdir, database):
    keys = Keys.open(workdir / "keys" / "train", database)
    ids, rows = (np.concatenate(parts) for parts in zip(*keys.blocks(50), strict=True))
    assert (np.diff(ids) > 0).all()
    assert len(ids) == Manifest.read(workdir / "keys" / "train").fact("keys")
    assert rows.tobytes() == keys.rows(ids).tobytes()


def test_bfloat16_keys_are_rounded_once(workdir, bert, database, tokenizer):
    make(workdir, bert, "half", dtype="bfloat16")
    full = Keys.open(workdir / "keys" / "train", database).rows(np.arange(len(database)))
    half = Keys.open(workdir / "half", database)
    rows = half.rows(np.arange(len(database)))
    shard = np.load(workdir / "half" / "keys-00000.npy")
    assert shard.dtype == np.uint16
    np.testing.assert_array_equal(rows, full.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert 0 < np.nanmax(np.abs(rows - full)) < 2**-8
    encoder = ChunkEncoder(tokenizer, Embedder.open(bert), "bfloat16")
    live = encoder.keys(database.chunks(np.arange(5)))
    np.testing.assert_allclose(live, rows[:5], atol=2**-8)
    assert (live.view(np.uint32) & 0xFFFF == 0).all()


def test_made_again_elsewhere_it_is_the_same_bytes(workdir, bert):
    make(workdir, bert, "again")
    assert tree(workdir / "again") == tree(workdir / "keys" / "train")


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(workdir, bert, monkeypatch):
    class Killed(BaseException):
        pass

    stored, calls = ChunkEncoder.stored, []

    def killed_after(limit):
        def run(self, pieces):
            if len(calls) == limit:
                raise Killed
            calls.append(len(pieces.lengths))
            return stored(self, pieces)

        return run

    monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr(BlockSource.__init__, "__defaults__", (32,))
    make(workdir, bert, "whole")
    for limit in (2, 5):
        monkeypatch.setattr(ChunkEncoder, "stored", killed_after(limit))
        with pytest.raises(Killed):
            make(workdir, bert, "killed")
        for parts in (workdir / "killed").glob(".tmp-*"):
            (parts / ".tmp-1-00000000-00009.npy").write_bytes(b"what a killed writer left")
        with pytest.raises(UserError, match="is unfinished"):
            Manifest.open(workdir / "killed", "keys")
    monkeypatch.setattr(ChunkEncoder, "stored", killed_after(-1))
    make(workdir, bert, "killed")
    assert sum(calls) == len(ChunkDatabase.open(workdir / "chunks" / "train")), "none made twice"
    assert tree(workdir / "killed") == tree(workdir / "whole")


def test_a_second_run_loads_no_model(workdir, bert, monkeypatch):
    monkeypatch.setattr(module, "Embedder", None)
    manifest = make(workdir, bert, "keys/train")
    assert manifest.hash == Manifest.read(workdir / "keys" / "train").hash


def test_a_model_that_cannot_be_read_leaves_nothing(workdir, bert, tmp_path):
    """So that the corrected model is not refused as another one."""
    arrays = bert_folder.weights()
    arrays["embeddings.LayerNorm.bias"][0] = np.nan
    broken = bert_folder.write(tmp_path / "bert", arrays=arrays)
    with pytest.raises(UserError, match="is not finite"):
        make(workdir, broken, "corrected")
    assert not (workdir / "corrected").exists()
    bert_folder.write(tmp_path / "bert")
    assert make(workdir, broken, "corrected").fact("keys") > 0


def test_a_split_without_chunks_has_no_keys(workdir, bert, tmp_path):
    stage = write_database(tmp_path / "empty", [])
    assert len(stage) == 0
    keys = write_keys(tmp_path / "keys", stage, np.empty((0, 4)))
    assert len(keys) == 0
    assert list(keys.blocks()) == []
    assert keys.rows(np.array([], np.int64)).shape == (0, 4)


def test_grain_reads_the_blocks_in_order():
    source = BlockSource(range(5, 15), 4)
    blocks = [source[i].tolist() for i in range(len(source))]
    assert blocks == [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14]]
    pipeline = module.grain.MapDataset.source(source).map(lambda ids: int(ids[0]))
    assert list(iterate(pipeline)) == [5, 9, 13]

    def fail(ids):
        raise UserError("bad block: expected a good one")

    with pytest.raises(UserError) as error:
        list(iterate(module.grain.MapDataset.source(source).map(fail)))
    assert str(error.value) == "bad block: expected a good one"


def test_refuses_another_model_or_precision(workdir, bert, tmp_path):
    other = bert_folder.write(tmp_path / "bert", arrays=bert_folder.weights(seed=1))
    with pytest.raises(UserError, match=r"embedder.sha256.model.safetensors: .* -> "):
        make(workdir, other, "keys/train")
    with pytest.raises(UserError, match=r'dtype: "float32" -> "bfloat16"'):
        make(workdir, bert, "keys/train", dtype="bfloat16")
    with pytest.raises(UserError, match=r"KeysConfig\.dtype is 'float16': expected one of"):
        KeysConfig(dtype="float16")


def test_refuses_another_tokeniser_and_another_database(workdir, bert, tmp_path, database):
    write_texts(tmp_path / "texts", 30, seed=5)
    prepare(tmp_path / "w", documents_config(tmp_path / "texts"))
    with pytest.raises(UserError, match="do not belong together"):
        prepare_keys(
            tmp_path / "keys",
            workdir / "chunks" / "train",
            tmp_path / "w" / "tokenizer",
            KeysConfig(model=str(bert)),
        )
    other = ChunkDatabase.open(tmp_path / "w" / "chunks" / "train")
    with pytest.raises(
        UserError, match=f"{workdir}/keys/train and {other.directory} do not belong"
    ):
        Keys.open(workdir / "keys" / "train", other)


def test_refuses_keys_that_do_not_fit(tmp_path):
    database = write_database(tmp_path / "chunks", [3, 4])
    keys = write_keys(tmp_path / "keys", database, np.ones((7, 4)))
    with pytest.raises(UserError, match="holds keys of 6 chunks: expected one for each of the 7"):
        write_keys(tmp_path / "fewer", database, np.ones((6, 4)))
    manifest = keys.manifest
    manifest.facts["dimension"] = 5
    with pytest.raises(
        UserError, match=r"keys-00000.npy holds float32 of shape \(7, 4\): expected"
    ):
        Keys(keys.directory, manifest, database)


def test_float32_is_read_as_it_is():
    rows = np.array([[1.5, -2.0]], np.float32)
    assert as_float32(rows).tobytes() == rows.tobytes()
    assert json.dumps(as_float32(np.array([[0x3FC0]], np.uint16)).tolist()) == "[[1.5]]"
