"""The chunk database: whole documents, no continuation across them, the same bytes every time."""

import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.artefacts.runner import LocalProcesses
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database import database as module
from data_pipelines.chunk_database.database import (
    CHUNK_LENGTH,
    ChunkDatabase,
    chunk_rows,
    prepare_chunks,
    token_dtype,
)
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.documents.documents import read_documents
from retro_jax.errors import UserError
from tests.data_pipelines.small import documents_config, prepare, tree, write_texts


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chunks")
    write_texts(folder / "b", 60)
    write_texts(folder / "a", 40, seed=1)
    prepare(folder / "out", documents_config(folder / "b", folder / "a"))
    return folder / "out"


@pytest.fixture(scope="module")
def database(workdir):
    return ChunkDatabase.open(workdir / "chunks" / "train", verify=True)


@pytest.fixture(scope="module")
def tokenizer(workdir):
    return Tokenizer.open(workdir / "tokenizer")


@pytest.fixture(scope="module")
def documents(workdir):
    folder = workdir / "documents" / "train"
    return list(read_documents(folder, Manifest.open(folder, "documents")))


def test_every_document_comes_back_whole(database, documents, tokenizer):
    assert database.num_documents == len(documents) > 50
    assert len(database.shards) > 4, "the test should see several shards"
    end = 0
    for d, document in enumerate(documents):
        record = database.record(d)
        assert (record.id, record.corpus) == (document.id, document.corpus)
        assert record.first_chunk == end
        end += record.chunks
        ids = np.arange(record.first_chunk, end)
        assert np.all(database.documents(ids) == d)
        tokens = database.chunks(ids).ravel()
        text = tokens[tokens != database.pad_id]
        assert text[0] == database.bos_id
        assert text[-1] == database.eos_id
        assert np.all(tokens[len(text) :] == database.pad_id)
        assert len(tokens) - len(text) < CHUNK_LENGTH
        assert tokenizer.decode(text) == document.text, "the tail of a document is never lost"
        assert tokenizer.num_bytes(tokens) == record.bytes == len(document.text.encode())
        assert record.words == len(document.text.split())
        assert record.lines == document.text.count("\n")
    assert end == len(database)
    assert [record.id for record in database.records()] == [d.id for d in documents]


def test_a_continuation_never_crosses_a_document(database):
    ids = np.arange(len(database))
    rows, owners, values = database.chunks(ids), database.documents(ids), database.values(ids)
    crossings = 0
    for i in ids:
        follows = i + 1 < len(database) and owners[i + 1] == owners[i]
        crossings += not follows
        expected = rows[i + 1] if follows else np.full(CHUNK_LENGTH, database.pad_id)
        np.testing.assert_array_equal(values[i], np.concatenate([rows[i], expected]))
        np.testing.assert_array_equal(database.value(int(i)), values[i])
        assert database.document(int(i)) == owners[i]
    assert crossings == database.num_documents
    assert np.all(database.value(len(database) - 1)[CHUNK_LENGTH:] == database.pad_id)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_reading_many_equals_reading_one_by_one(database, data):
    ids = np.array(data.draw(st.lists(st.integers(-1, len(database) - 1))), np.int64)
    for read, width, dtype in (
        (database.chunks, (CHUNK_LENGTH,), np.int32),
        (database.values, (2 * CHUNK_LENGTH,), np.int32),
        (database.documents, (), np.int64),
    ):
        together = read(ids)
        assert together.shape == (len(ids), *width)
        assert together.dtype == dtype
        for i, row in zip(ids, together, strict=True):
            np.testing.assert_array_equal(read(np.array([i]))[0], row)
        folded = read(np.stack([ids, ids]))
        np.testing.assert_array_equal(folded, np.stack([together, together]))


def test_no_chunk_is_all_padding_and_nothing_else_is_accepted(database):
    none = np.array([-1])
    assert np.all(database.values(none) == database.pad_id)
    assert database.documents(none)[0] == -1
    for bad in (len(database), -2):
        for read in (database.chunks, database.values, database.documents):
            with pytest.raises(IndexError, match=f"chunk {bad} of {len(database)}"):
                read(np.array([0, bad]))
    with pytest.raises(IndexError, match="document -1 of"):
        database.record(-1)


def test_corpora_are_ranges_and_facts_add_up(database, documents, tokenizer):
    assert list(database.corpora) == ["a", "b"]
    ranges = [r for parts in database.corpora.values() for r in parts]
    assert [i for r in ranges for i in r] == list(range(len(database)))
    assert [i for r in database.shards for i in r] == list(range(len(database)))
    facts = database.manifest.facts
    rows = database.chunks(np.arange(len(database)))
    assert facts["chunks"] == len(database)
    assert facts["documents"] == len(documents)
    assert facts["tokens"] == np.count_nonzero(rows != database.pad_id)
    assert facts["padding"] == pytest.approx(np.mean(rows == database.pad_id))
    for name, corpus in facts["corpora"].items():
        texts = [d.text for d in documents if d.corpus == name]
        assert corpus["documents"] == len(texts)
        assert corpus["bytes"] == sum(len(text.encode()) for text in texts)
        assert corpus["words"] == sum(len(text.split()) for text in texts)
        assert corpus["lines"] == sum(text.count("\n") for text in texts)
        assert corpus["chunks"] == sum(map(len, database.corpora[name]))
    assert database.vocab_size == tokenizer.vocab_size


def test_arrays_are_small_and_pickled_by_place(database):
    assert (database._chunks.dtype, database._owners.dtype) == (np.uint16, np.int32)
    data = pickle.dumps(database)
    assert len(data) < 20_000
    again = pickle.loads(data)
    np.testing.assert_array_equal(again.values(np.arange(9)), database.values(np.arange(9)))
    assert again.record(3) == database.record(3)


def test_bytes_depend_on_neither_place_nor_processes_nor_batches(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 500)
    split = workdir / "documents" / "train"
    manifest = prepare_chunks(
        tmp_path / "out", split, workdir / "tokenizer", runner=LocalProcesses(2)
    )
    assert tree(tmp_path / "out") == tree(workdir / "chunks" / "train")
    before = tree(tmp_path / "out")
    assert prepare_chunks(tmp_path / "out", split, workdir / "tokenizer") == manifest
    assert tree(tmp_path / "out") == before


_KILLED = """
import os, pathlib, signal, sys
from data_pipelines.artefacts import stage
from tests.data_pipelines.small import documents_config, prepare

workdir, left = pathlib.Path(sys.argv[1]), int(sys.argv[2])
publish = stage.Stage._publish

def dying(self, temporary, shard, facts):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(self, temporary, shard, facts)

stage.Stage._publish = dying
prepare(workdir / "out", documents_config(workdir / "b", workdir / "a"))
"""


@pytest.mark.parametrize("shards", [3, 10, 19])  # in documents, tokeniser and chunks
def test_killed_and_restarted_ends_with_the_same_bytes(workdir, tmp_path, shards):
    for name in ("a", "b"):
        shutil.copytree(workdir.parent / name, tmp_path / name)
    killed = subprocess.run([sys.executable, "-c", _KILLED, tmp_path, str(shards)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any(".tmp-" in name for name in tree(tmp_path / "out"))
    prepare(tmp_path / "out", documents_config(tmp_path / "b", tmp_path / "a"))
    assert tree(tmp_path / "out") == tree(workdir)


def test_parents_that_do_not_belong_are_refused(workdir, tmp_path):
    directory = workdir / "chunks" / "train"
    other = workdir / "documents" / "validation"
    with pytest.raises(UserError, match="parent documents: "):
        prepare_chunks(directory, other, workdir / "tokenizer")
    with pytest.raises(UserError, match="do not belong together"):
        Manifest.open(
            directory, "chunks", {"documents": (Manifest.open(other, "documents"), other)}
        )


def test_damaged_databases_are_one_line(workdir, tmp_path):
    whole = workdir / "chunks" / "train"

    def damaged(change):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "x")
        change(tmp_path / "x")
        with pytest.raises(UserError) as caught:
            ChunkDatabase.open(tmp_path / "x", verify=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    shard = "chunks-00001.npy"
    size = (whole / shard).stat().st_size
    message = damaged(lambda folder: os.truncate(folder / shard, size - 128))
    assert message == f"{tmp_path / 'x' / shard} has {size - 128} bytes: expected {size}"
    assert "is missing" in damaged(lambda folder: (folder / "documents.jsonl").unlink())

    def swap(folder):
        data = bytearray((folder / shard).read_bytes())
        data[-1] ^= 1
        (folder / shard).write_bytes(data)

    assert f"{shard} has SHA-256" in damaged(swap)
    with pytest.raises(UserError, match="holds 'documents': expected 'chunks'"):
        ChunkDatabase.open(workdir / "documents" / "train")


def test_shards_of_other_shapes_are_refused(tmp_path):
    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "vocab_size": 9}
    stage = Stage(tmp_path, "chunks", special)
    stage.write_array("chunks-00000.npy", np.zeros((3, 32), np.uint16))
    stage.write_array("documents-00000.npy", np.zeros(3, np.int32))
    stage.finish({"shards": [3], "corpora": {}, "documents": 1})
    with pytest.raises(UserError, match=r"a shard of \(3, 32\) chunks .*: expected 3 of 64 tokens"):
        ChunkDatabase.open(tmp_path)


def test_a_split_without_documents_is_an_empty_database(tmp_path):
    write_texts(tmp_path / "a", 20)
    prepare(tmp_path / "out", documents_config(tmp_path / "a", validation=0))
    database = ChunkDatabase.open(tmp_path / "out" / "chunks" / "validation", verify=True)
    assert len(database) == database.num_documents == 0
    assert database.corpora == {}
    assert database.values(np.array([-1, -1])).shape == (2, 2 * CHUNK_LENGTH)
    assert list(database.records()) == []


@pytest.mark.parametrize("length", [1, 61, 62, 63, 64, 126, 127, 1000])
def test_rows_of_a_document(tokenizer, length):
    ids = np.arange(4, 4 + length)
    rows = chunk_rows(ids, tokenizer, "uint16")
    assert rows.dtype == np.uint16
    assert len(rows) == -(-(length + 2) // CHUNK_LENGTH)
    tokens = [1, *ids, 2]
    padded = tokens + [0] * (rows.size - len(tokens))
    assert rows.ravel().tolist() == padded


def test_tokens_are_as_narrow_as_the_vocabulary_allows():
    assert token_dtype(65_536) is np.uint16
    assert token_dtype(65_537) is np.uint32
