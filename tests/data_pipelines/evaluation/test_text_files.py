"""A folder as an evaluation text: the test split of it, in any form of file, never the training text."""

import json
import logging

import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines.corpora import Reading
from data_pipelines.evaluation.text_files import split_in_name
from data_pipelines.evaluation.texts import SliceConfig, prepare_texts, read_texts
from retro_jax.errors import UserError

_ARTICLE = " \n = Town {} = \n \n The town is old . \n"


def _texts(name, path):
    return [text.text for text in read_texts(SliceConfig(name, str(path)), Reading())]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("wiki.test.tokens", "test"),
        ("wiki.valid.tokens", "validation"),
        ("train-00000-of-00002.parquet", "train"),
        ("test/part-0.parquet", "test"),
        ("train/val.jsonl", "validation"),
        ("contest.jsonl", None),
        ("latest.jsonl.zst", None),
    ],
)
def test_the_split_that_a_name_tells_of(name, split):
    assert split_in_name(name) == split


def test_of_a_folder_the_test_file_is_scored(tmp_path, caplog):
    for split in ("train", "valid", "test"):
        (tmp_path / f"wiki.{split}.tokens").write_text(_ARTICLE.format(split))
    with caplog.at_level(logging.WARNING):
        assert _texts("wikitext103", tmp_path) == [_ARTICLE.format("test")]
    assert "wiki.test.tokens is scored; left out are 2 other files" in caplog.text
    (tmp_path / "wiki.test.tokens").unlink()
    with pytest.raises(UserError, match="has files of train and validation: expected the path of"):
        _texts("wikitext103", tmp_path)
    assert _texts("wikitext103", tmp_path / "wiki.train.tokens") == [_ARTICLE.format("train")]


def test_rows_of_parquet_are_scored_as_lines_of_json_are(tmp_path):
    rows = [{"text": "a b", "meta": {"pile_set_name": "Github"}}, {"text": "c", "meta": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert _texts("mine", tmp_path / "test.parquet") == ["a b", "c"]
    assert _texts("mine", tmp_path / "test.jsonl") == ["a b", "c"]
    for name in ("test.parquet", "test.jsonl"):
        with pytest.raises(UserError, match=rf"{name}:2 has no meta.pile_set_name"):
            _texts("pile", tmp_path / name)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("curation", '{"article": "a", "summary": "b\\ud800"}', "lone surrogate at character 1"),
        ("curation", '{"article": "a", "summary": 3}', "has no text in 'summary'"),
        ("pile", '{"text": "a"}', "has no meta.pile_set_name"),
        ("lambada", '{"text": ["a"]}', "has no text in 'text'"),
        ("mine", "{", "is not valid JSON"),
    ],
)
def test_bad_documents_are_one_line_or_are_counted(tmp_path, name, bad, message, caplog):
    path = tmp_path / "x.jsonl"
    good = {"text": "a b", "article": "a", "summary": "b", "meta": {"pile_set_name": "ArXiv"}}
    path.write_text(f"{json.dumps(good)}\n{bad}\n{json.dumps(good | {'text': 'c d'})}\n")
    with pytest.raises(UserError, match=rf"x.jsonl:2.*{message}.*; skip_bad_documents counts such"):
        prepare_texts(tmp_path / "slice", SliceConfig(name, str(path)))
    config = SliceConfig(name, str(path), skip_bad_documents=True)
    manifest = prepare_texts(tmp_path / "slice", config)
    assert manifest.fact("documents") == 2
    (counts,) = manifest.fact("reading").values()
    assert counts["bad"] == 1 and message in counts["first_bad"]
    caplog.clear()
    assert prepare_texts(tmp_path / "slice", SliceConfig(name)).hash == manifest.hash
    assert "is without 1 bad documents: " in caplog.text, "said whenever the rest is scored"


def test_a_damaged_page_of_an_evaluation_text_is_counted(tmp_path):
    rows = [{"text": f"some words {i}"} for i in range(20)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=10)
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[30:60] = bytes(30)
    (tmp_path / "x.parquet").write_bytes(data)
    reading = Reading(skip_bad=True)
    texts = list(read_texts(SliceConfig("mine", str(tmp_path / "x.parquet")), reading))
    assert [text.text for text in texts] == [row["text"] for row in rows[10:]]
    assert reading.counts["bad"] == 10 and "from row 1 to 10" in reading.first_bad


def test_documents_without_a_scored_text_are_counted(tmp_path):
    rows = [{"article": "", "summary": "a"}, {"article": "b", "summary": " "}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading()
    texts = list(read_texts(SliceConfig("curation", str(tmp_path / "x.jsonl")), reading))
    assert [text.text for text in texts] == ["\n\nTL;DR:\n\na"] and reading.counts["empty"] == 1
