"""Texts for evaluation: one name is one text."""

import json
import shutil

import pytest

from data_pipelines import workdir as module
from data_pipelines.evaluation.prepare_text import prepare_slice, prepare_tables
from data_pipelines.evaluation.splits import open_split
from data_pipelines.evaluation.texts import SliceConfig
from data_pipelines.retriever import publishing
from retro_jax.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A small W by BM25."""
    folder = tmp_path_factory.mktemp("slices")
    texts = [f"A lobster {i} crossed the harbour {'and sky ' * (i % 7)}" for i in range(60)]
    config = module.PrepareConfig(
        module.DocumentsConfig([module.TextCorpus("mine", texts)]),
        tokenizer=module.TokenizerConfig(vocab_size=320),
        neighbours=module.NeighboursConfig(retriever="bm25"),
        leakage=module.LeakageConfig(threshold=None),
    )
    module.prepare(folder / "W", config)
    return folder / "W"


def lines(path, *texts):
    """JSON lines."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_another_file_under_a_prepared_name_is_refused(workdir, tmp_path):
    told = []
    first = lines(tmp_path / "validation.jsonl", "A lobster in the sky.", "And a harbour.")
    prepare_slice(workdir, SliceConfig("mine", first), report=told.append)
    assert told == ["preparing mine ..."]
    other = lines(tmp_path / "test.jsonl", "A lobster in the sea.", "And a harbour.")
    message = r"test.jsonl has .* but the slice mine was read from 'validation.jsonl' of .* another"
    with pytest.raises(UserError, match=message):
        prepare_slice(workdir, SliceConfig("mine", other))
    nowhere = SliceConfig("mine", str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(UserError, match=r"nowhere.jsonl is missing: expected a file or folder"):
        prepare_slice(workdir, nowhere)
    moved = shutil.copy(first, tmp_path / "moved.jsonl")
    for same in (None, first, str(moved)):
        assert prepare_slice(workdir, SliceConfig("mine", same), report=told.append) == "mine"
    assert len(told) == 1
    assert open_split(workdir, "mine", neighbours=3).database.num_documents == 2


def test_a_bad_file_can_be_corrected(workdir, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "no text"}\n')
    with pytest.raises(UserError, match="has no text in 'text'"):
        prepare_slice(workdir, SliceConfig("corrected", str(path)))
    lines(path, "A lobster.")
    assert prepare_slice(workdir, SliceConfig("corrected", str(path))) == "corrected"


def test_more_neighbours_than_a_table_will_have_are_refused_before_it_is_made(workdir, tmp_path):
    path = lines(tmp_path / "many.jsonl", "A lobster.")
    message = "slices/many/neighbours gets 40 neighbours a chunk: expected 50 at least"
    text = SliceConfig("many", path)
    with pytest.raises(UserError, match=message):
        prepare_tables(workdir, "test", [text], [], bert_folder=None, neighbours=50)
    assert not (workdir / "slices/many").exists()
    updated = shutil.copytree(workdir, tmp_path / "W")
    publishing.publish(updated, 1, [0])
    message = "revisions/00001/neighbours/test gets 40 neighbours a chunk: expected 50 at least"
    with pytest.raises(UserError, match=message):
        prepare_tables(updated, "test", [], [0, 1], bert_folder=None, neighbours=50)
    assert not (updated / "revisions/00001/neighbours").exists()
    for texts in ([], [text]):
        prepare_tables(updated, "test", texts, [0, 1], bert_folder=None, neighbours=40)
    assert (updated / "slices/many/neighbours-00001").is_dir()


def test_equal_texts_are_all_scored(workdir, tmp_path):
    path = lines(tmp_path / "twice.jsonl", "A lobster.", "A lobster.", "A sky.")
    prepare_slice(workdir, SliceConfig("twice", path))
    assert open_split(workdir, "twice", neighbours=1).database.num_documents == 3
