"""A folder as an evaluation text: the test split of it, in any form of file, never the training text."""

import json
import logging

import pyarrow
import pytest
from pyarrow import parquet

from data_pipelines.corpora import Reading
from data_pipelines.evaluation.text_files import split_in_name
from data_pipelines.evaluation.texts import SliceConfig, read_texts
from retro_jax.errors import UserError

_ARTICLE = " \n = Town {} = \n \n The town is old . \n"


def _texts(name, path):
    return [text.text for text in read_texts(SliceConfig(name, str(path)), Reading(may_skip=False))]


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


def test_a_summary_with_half_a_character_is_one_line_without_bad_advice(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"article": "a", "summary": "b\\ud800"}\n')
    with pytest.raises(UserError, match=r"x.jsonl:1: .*lone surrogate at character 1") as raised:
        _texts("curation", path)
    assert "skip_bad_documents" not in str(raised.value)


def test_documents_without_a_scored_text_are_counted(tmp_path):
    rows = [{"article": "", "summary": "a"}, {"article": "b", "summary": " "}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = Reading(may_skip=False)
    texts = list(read_texts(SliceConfig("curation", str(tmp_path / "x.jsonl")), reading))
    assert [text.text for text in texts] == ["\n\nTL;DR:\n\na"] and reading.counts["empty"] == 1
