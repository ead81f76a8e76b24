"""Query and passage prefixes through a whole preparation: every key, table and live query has its own."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from data_pipelines import workdir
from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.artefacts.runner import InProcess
from data_pipelines.evaluation.prepare_text import prepare_slice
from data_pipelines.evaluation.texts import SliceConfig
from data_pipelines.retriever import revisions
from data_pipelines.retriever.embedder import Embedder
from data_pipelines.retriever.keys import KeysConfig
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.prefixes import Prefixes
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir import (
    DocumentsConfig,
    PrepareConfig,
    TextCorpus,
    compaction,
    update,
    verify,
)
from data_pipelines.workdir.preparation import Preparation, open_keys, queries_of
from retro_jax.errors import UserError
from tests.data_pipelines.chunk_database import base_tokenizers
from tests.data_pipelines.retriever import bert_folder

_TEXTS = [(f"d{i}", f"lobster {i} def return {i * 7} crustacean {'abc'[i % 3]}") for i in range(24)]
_E5 = {"prompts": {"query": "query: ", "passage": "passage: "}, "default_prompt_name": None}


def _keys_of(bert, split, prefix, folder):
    """Keys of a split by an independent path: prefixed texts through the embedder."""
    chunks = open_keys(folder, split).database
    retriever = Retriever.open(folder, model=str(bert))
    texts = [
        retriever._tokenizer.decode(chunks.chunks(np.array([i]))[0]) for i in range(len(chunks))
    ]
    vectors = Embedder.open(bert).embed([prefix + text for text in texts])
    vectors[[not text.strip() for text in texts]] = np.nan
    return vectors


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """W by a BERT whose folder states E5's prompts."""
    root = tmp_path_factory.mktemp("prefixes")
    base_tokenizers.train(root / "base")
    bert = bert_folder.write(root / "bert")
    (bert / "config_sentence_transformers.json").write_text(json.dumps(_E5))
    lines: list[str] = []
    config = PrepareConfig(
        DocumentsConfig((TextCorpus("mine", _TEXTS),), validation=0.2, test=0.2),
        tokenizer=workdir.TokenizerConfig(base=str(root / "base")),
        keys=KeysConfig(str(bert)),
        index=workdir.IndexConfig(kind="exact"),
        neighbours=workdir.NeighboursConfig(train=2, validation=3, test=3, recall_queries=5),
    )
    workdir.prepare(root / "W", config, report=lines.append)
    return root / "W", bert, config, lines


def test_keys_have_the_prefix_of_their_role(prepared):
    folder, bert, _, lines = prepared
    assert "'query: ' before queries, 'passage: ' before passages" in "\n".join(lines)
    roles = {"train": "passage: ", "queries": "query: ", "validation": "query: ", "test": "query: "}
    for split, prefix in roles.items():
        keys = open_keys(folder, split)
        assert keys.manifest.settings["prefix"] == prefix
        stated = {"query": "query: ", "passage": "passage: "}
        assert keys.manifest.settings["embedder"]["prefixes"] == stated
        expected = _keys_of(bert, "train" if split == "queries" else split, prefix, folder)
        np.testing.assert_allclose(keys.rows(np.arange(len(keys))), expected, atol=1e-5)
    a, b = (open_keys(folder, split).rows(np.arange(3)) for split in ("train", "queries"))
    assert np.abs(a - b).max() > 0.01


def check_table(folder, bert, split, k):
    """That the newest table has, for each chunk of a split, the nearest passages of its query."""
    retriever = Retriever.open(folder, model=str(bert))
    database = retriever.database
    passages = retriever.keys.rows(np.arange(len(database)))
    queries = queries_of(folder, split, retriever)
    vectors = queries.rows(np.arange(len(queries)))
    table = NeighbourTable.of(folder, split, queries.database, database)
    distances = np.square(vectors[:, None] - passages[None]).sum(-1)
    owners = database.live_documents(np.arange(len(passages)))
    distances[:, owners < 0] = np.inf
    if split == "train":  # never one of the chunk's own document
        distances[owners[:, None] == owners[None]] = np.inf
    distances = np.where(np.isnan(distances), np.inf, distances)
    expected = np.sort(distances, axis=1)[:, :k]
    expected[np.isnan(vectors[:, 0])] = np.inf
    live = owners >= 0 if split == "train" else np.ones(len(queries), bool)
    scores = table.scores(np.arange(len(queries)), k)
    np.testing.assert_allclose(scores[live], expected[live], rtol=1e-3, atol=1e-5)
    again = retriever.encoder.keys(queries.database.chunks(np.arange(len(queries))))
    np.testing.assert_allclose(again, vectors, atol=1e-5)


def test_tables_and_live_queries_compare_queries_with_passages(prepared):
    folder, bert, _, _ = prepared
    for split, k in (("train", 2), ("validation", 3)):
        check_table(folder, bert, split, k)


def test_slices_and_verify(prepared, tmp_path):
    folder, bert, _, _ = prepared
    (tmp_path / "x.jsonl").write_text('{"text": "lobster crust"}\n')
    moved, text = tmp_path / "W", SliceConfig("mine", str(tmp_path / "x.jsonl"))
    shutil.copytree(folder, moved)
    assert prepare_slice(moved, text) == "mine", "its BERT is where the preparation found it"
    shutil.rmtree(moved / "slices")
    settings = (moved / "prepare.gin").read_text()
    (moved / "prepare.gin").write_text(settings.replace(str(bert), str(tmp_path / "gone")))
    with pytest.raises(UserError, match=r"was made by the BERT folder 'bert': .* \(--bert_folder,"):
        prepare_slice(moved, text)
    assert not (moved / "slices").exists()
    prepare_slice(folder, SliceConfig("mine", str(tmp_path / "x.jsonl")), bert_folder=str(bert))
    assert Manifest.read(folder / "slices/mine/keys").settings["prefix"] == "query: "
    lines: list[str] = []
    verify.verify(folder, sample=5, seed=0, model=str(bert), report=lines.append)
    assert any(line.startswith("keys/queries again: 5 chunks embedded") for line in lines)


def test_updates_embed_new_documents_as_passages_and_as_queries(prepared, tmp_path):
    """Appended, then removed, then compacted and purged: every table is that of the query prefix."""
    before, bert, config, _ = prepared
    folder, lines = tmp_path / "W", []
    shutil.copytree(before, folder)
    more = (*_TEXTS, *((f"n{i}", f"crustacean {i} while lobster {i * 5}") for i in range(8)))
    documents = dataclasses.replace(config.documents, corpora=(TextCorpus("mine", more),))
    p = Preparation(
        folder, dataclasses.replace(config, documents=documents), InProcess(), lines.append
    )
    update.update(p, append=True, remove=[])
    added = [open_keys(folder / "revisions/00001", split) for split in ("train", "queries")]
    assert [keys.manifest.settings["prefix"] for keys in added] == ["passage: ", "query: "]
    assert np.abs(added[0].rows(np.arange(2)) - added[1].rows(np.arange(2))).max() > 0.01
    for split, k in (("train", 2), ("test", 3)):
        check_table(folder, bert, split, k)
    first = next(revisions.open_database(folder).records())
    update.update(p, append=False, remove=[f"mine/{first.id}"])
    check_table(folder, bert, "train", 2)
    compaction.purge(p)
    assert not list((folder / "keys/queries").glob("*.npy")), "removed text leaves its keys behind"
    for split, k in (("train", 2), ("test", 3)):
        check_table(folder, bert, split, k)
    verify.verify(folder, sample=5, seed=0, model=str(bert), report=lines.append)
    assert any("revisions/00003/keys/queries again: 5 chunks" in line for line in lines)


@pytest.mark.parametrize(
    ("stored", "prefixes"),
    [
        (_E5, ("query: ", "passage: ")),
        ({"prompts": {"query": "Q ", "document": "D "}}, ("Q ", "D ")),
        ({"prompts": {"query": "", "document": ""}}, ("", "")),
        ({"prompts": {"both": "x "}, "default_prompt_name": "both"}, ("x ", "x ")),
        ({"prompts": {"query": "Q "}}, ("Q ", "")),
        ({}, ("", "")),
    ],
)
def test_prompts_as_sentence_transformers_writes_them(tmp_path, stored, prefixes):
    bert = bert_folder.write(tmp_path / "bert")
    (bert / "config_sentence_transformers.json").write_text(json.dumps(stored))
    assert KeysConfig(str(bert)).open().prefixes == Prefixes(*prefixes)
    given = KeysConfig(str(bert), query_prefix="", passage_prefix="p: ").open()
    assert given.prefixes == Prefixes("", "p: ")
    assert ("prefixes" in given.identity) and given.prefixes.differ


def test_bad_prompts_are_one_line(tmp_path):
    bert = bert_folder.write(tmp_path / "bert")
    path = bert / "config_sentence_transformers.json"
    for stored in ({"prompts": {"query": 1}}, {"prompts": [1]}, {"default_prompt_name": "none"}):
        path.write_text(json.dumps(stored))
        with pytest.raises(UserError, match=r"config_sentence_transformers.json: .* expected"):
            KeysConfig(str(bert)).open()
