"""Search: never the own document, as many as there are, nearest first, exactly or nearly so."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.live.settings import LiveSettings
from data_pipelines.retriever import candidates, index_shard
from data_pipelines.retriever.index_build import prepare_index
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.index_shard import compare_all
from data_pipelines.retriever.keys import Keys, KeysConfig, prepare_keys
from data_pipelines.retriever.retriever import Retriever
from retro_jax.errors import UserError
from tests.data_pipelines.retriever import bert_folder
from tests.data_pipelines.small import documents_config, prepare, write_texts
from tests.data_pipelines.synthetic import clustered, nearest, retriever


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir up to its index, whose BERT is a folder beside it."""
    folder = tmp_path_factory.mktemp("retriever")
    write_texts(folder / "texts", 40)
    prepare(folder / "w", documents_config(folder / "texts"))
    bert_folder.write(folder / "bert")
    chunks, config = folder / "w" / "chunks" / "train", KeysConfig(model=str(folder / "bert"))
    prepare_keys(folder / "w" / "keys" / "train", chunks, folder / "w" / "tokenizer", config)
    keys = Keys.open(folder / "w" / "keys" / "train", ChunkDatabase.open(chunks))
    prepare_index(folder / "w" / "index", keys, IndexConfig())
    return folder / "w"


@pytest.fixture(scope="module")
def opened(workdir):
    return Retriever.open(workdir, model=str(workdir.parent / "bert"), verify=True)


def forbidden(found: Retriever, exclude):
    """[n, chunks] bool: which chunks each query must not be given."""
    owners = found.database.documents(np.arange(len(found.database)))
    return owners[None] == exclude[:, None]


KINDS = {
    "brute_force": {},
    "hashing": {"kind": "hashing"},
    "tree": {"kind": "tree", "num_leaves": 20, "leaves_to_search": 5},
}


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_near_and_of_other_documents(tmp_path, kind):
    chunks = [1, 30, 400, 2, 60, 7] * 3
    vectors = clustered(sum(chunks))
    vectors[[0, 40, 900]] = np.nan
    found = retriever(tmp_path, chunks, vectors, shards=3, **KINDS[kind])
    exclude = found.database.documents(np.arange(len(vectors)))
    ids, scores = found.index.search(vectors, 5, exclude)
    assert ids.dtype == np.int64
    assert scores.dtype == np.float32
    without = np.isnan(vectors[:, 0])
    assert (ids[without] == -1).all()
    assert np.isinf(scores[without]).all()
    assert (ids[~without] >= 0).all()
    assert not np.isin(ids, np.flatnonzero(without)).any()
    assert (found.database.documents(ids)[~without] != exclude[~without, None]).all()
    assert all(len(set(row)) == 5 for row in ids[~without].tolist())
    assert (np.diff(scores[~without], axis=1) >= 0).all()
    exact = ((vectors[ids] - vectors[:, None]).astype(np.float64) ** 2).sum(-1)
    np.testing.assert_allclose(scores[~without], exact[~without], rtol=1e-4, atol=1e-6)
    truth = nearest(vectors, vectors, 5, forbidden(found, exclude))
    hits = (scores <= truth[:, -1:] * (1 + 1e-5) + 1e-6)[~without].mean()
    assert hits == 1.0 if kind == "brute_force" else hits > 0.9


@settings(max_examples=30, deadline=None)
@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    k=st.integers(1, 9),
    seed=st.integers(0, 9),
    exact=st.booleans(),
)
def test_gives_as_many_as_there_are(tmp_path_factory, chunks, k, seed, exact):
    vectors = clustered(sum(chunks), 4, seed)
    vectors[np.random.default_rng(seed).random(len(vectors)) < 0.2] = np.nan
    found = retriever(tmp_path_factory.mktemp("r"), chunks, vectors)
    exclude = found.database.documents(np.arange(len(vectors)))
    if exact:
        ids, scores = compare_all(found.keys, vectors, k, exclude)
    else:
        ids, scores = found.index.search(vectors, k, exclude)
    truth = nearest(vectors, vectors, k, forbidden(found, exclude))
    np.testing.assert_array_equal(ids >= 0, np.isfinite(truth))
    np.testing.assert_allclose(scores, truth, atol=1e-5)


def test_three_chunks_are_a_database(tmp_path):
    vectors = clustered(3)
    found = retriever(tmp_path, [2, 1], vectors)
    ids, scores = found.index.search(vectors, 4, np.array([0, 0, 1]))
    assert ids[0].tolist() == ids[1].tolist() == [2, -1, -1, -1]
    assert sorted(ids[2].tolist()) == [-1, -1, 0, 1]
    assert np.isinf(scores[0, 1:]).all()
    ids, scores = found.index.search(vectors, 4)
    assert ids[:, 0].tolist() == [0, 1, 2]
    assert (scores[:, 0] < 1e-6).all()
    assert (ids[:, 3] == -1).all()


def test_a_document_longer_than_any_widening_is_looked_beyond(tmp_path, monkeypatch):
    monkeypatch.setattr(index_shard, "_WIDEST", 100)
    vectors = clustered(600)
    vectors[500:] += 5  # the other documents are far from the long one
    found = retriever(tmp_path, [500, 99, 1], vectors, kind="hashing")
    calls = []
    monkeypatch.setattr(
        index_shard,
        "compare_all",
        lambda keys, q, *rest: calls.append(len(q)) or compare_all(keys, q, *rest),
    )
    exclude = np.zeros(20, np.int64)
    ids, scores = found.index.search(vectors[:20], 2, exclude)
    assert calls == [20]
    assert (ids >= 500).all()
    truth = nearest(vectors[:20], vectors, 2, forbidden(found, exclude))
    np.testing.assert_allclose(scores, truth, rtol=1e-4)
    calls.clear()
    found.index.search(vectors[500:520], 2, np.full(20, 2))
    assert calls == []


def test_equally_near_neighbours_stand_by_id(tmp_path):
    vectors = np.repeat(clustered(4), 5, axis=0)
    found = retriever(tmp_path, [1] * 20, vectors)
    ids, _ = found.index.search(vectors[:1], 4, np.array([2]))
    assert ids[0].tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_finds_the_same_bits_alone_and_among_others(tmp_path, kind):
    vectors = clustered(600)
    found = retriever(tmp_path, [6] * 100, vectors, **KINDS[kind])
    exclude = np.repeat(np.arange(100), 6)
    first = found.index.search(vectors, 4, exclude)
    again = found.index.search(vectors, 4, exclude)
    alone = [
        found.index.search(vectors[i : i + 1], 4, exclude[i : i + 1]) for i in range(0, 600, 60)
    ]
    for part in (0, 1):
        assert first[part].tobytes() == again[part].tobytes()
        one = np.concatenate([found[part] for found in alone])
        assert one.tobytes() == first[part][::60].tobytes()


def test_repeated_candidates_are_dropped():
    ids = np.array([[4, 2, 4, -1, 2], [1, 2, 3, -1, -1]])
    repeated = candidates.repeated(ids)
    assert repeated[:, :3].tolist() == [[False, False, True], [False, False, False]]
    assert repeated[0, 4]
    assert not repeated[ids < 0].any()


def test_retrieve_gives_neighbours_and_their_continuations(opened):
    database = opened.database
    ids = np.arange(0, len(database), 9)
    tokens, exclude = database.chunks(ids), database.documents(ids)
    values = opened.retrieve(tokens, 3, exclude)
    assert values.shape == (len(ids), 3, 128)
    assert values.dtype == np.int32
    found, _ = opened.index.search(opened.keys.rows(ids), 3, exclude)
    np.testing.assert_array_equal(values, database.values(found))
    alone = np.concatenate([opened.retrieve(t[None], 3, e[None]) for t, e in zip(tokens, exclude)])
    np.testing.assert_array_equal(alone, values)


def test_a_chunk_without_text_retrieves_padding(opened):
    tokens = np.zeros((2, 64), np.int32)
    tokens[0, 0] = opened.database.eos_id
    assert (opened.retrieve(tokens, 2) == opened.database.pad_id).all()


def test_without_exclusion_a_stored_chunk_finds_itself(opened):
    ids = np.flatnonzero(np.isfinite(opened.keys.rows(np.arange(len(opened.database)))[:, 0]))[::7]
    found, scores = opened.neighbours(opened.database.chunks(ids), 2)
    assert (scores[:, 0] < 1e-6).all()
    same = opened.database.chunks(found[:, 0]) == opened.database.chunks(ids)
    assert same.all(1).mean() > 0.9  # of equal chunks, any may be the nearest


def test_refuses_another_model_than_that_of_the_keys(workdir, tmp_path):
    chunk, message = (
        np.ones((1, 64), np.int32),
        r"made by the BERT folder 'bert': expected its path",
    )
    with pytest.raises(UserError, match=message):
        Retriever.open(workdir).retrieve(chunk, 1)
    # Live retrieval says so when it is opened, unless the preparation says where it is.
    with pytest.raises(UserError, match=message):
        LiveSettings().open(workdir, Tokenizer.open(workdir / "tokenizer"), 2)
    bert = str(workdir.parent / "bert")
    LiveSettings(bert_folder=bert).open(workdir, Tokenizer.open(workdir / "tokenizer"), 2)
    other = bert_folder.write(tmp_path / "bert", arrays=bert_folder.weights(seed=1))
    with pytest.raises(UserError, match=rf"{other} is not the BERT that made {workdir}/keys/train"):
        Retriever.open(workdir, model=str(other)).retrieve(chunk, 1)


def test_refuses_parts_that_do_not_belong_together(workdir, tmp_path):
    write_texts(tmp_path / "texts", 20, seed=3)
    prepare(tmp_path / "w", documents_config(tmp_path / "texts"))
    for name in ("keys", "index", "chunks"):
        (tmp_path / "mixed").mkdir(exist_ok=True)
        (tmp_path / "mixed" / name).symlink_to(workdir / name)
    (tmp_path / "mixed" / "tokenizer").symlink_to(tmp_path / "w" / "tokenizer")
    with pytest.raises(UserError, match=r"chunks/train and .*/tokenizer do not belong together"):
        Retriever.open(tmp_path / "mixed")
    with pytest.raises(UserError, match=r"keys/train has no manifest\.json"):
        Retriever.open(tmp_path / "w")


def test_refuses_a_bad_query(opened):
    with pytest.raises(UserError, match=r"chunks have shape \(64,\): expected \[C, 64\]"):
        opened.retrieve(np.ones(64, np.int32), 1)
    with pytest.raises(UserError, match="k is 0: expected at least one"):
        opened.retrieve(np.ones((1, 64), np.int32), 0)
