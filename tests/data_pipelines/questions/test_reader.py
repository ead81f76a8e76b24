"""Files of questions: the layouts that are read, and what is said of a bad row."""

import gzip
import json

import pytest

from data_pipelines.questions.reader import Passage, read_questions
from retro_jax.errors import UserError

ROW = {
    "question": "who wrote Emma?",
    "target": "Austen",
    "answers": ["Jane Austen", "Austen"],
    "ctxs": [{"id": 7, "title": "Emma", "text": "a novel", "score": "81.2"}, {"text": "a name"}],
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_of_fid_and_dpr_are_read_from_lines_and_arrays(tmp_path):
    other = {"id": "b", "question": " and this? ", "answer": "it", "ctxs": [{"text": "t"}]}
    lines = read_questions(write(tmp_path / "q.jsonl", ROW, other))
    first, second = lines.questions
    assert first.answers == ("Austen", "Jane Austen")  # the trained one first, each once
    assert first.passages == (Passage("Emma", "a novel"), Passage("", "a name"))
    assert (second.id, second.question, second.answers) == ("b", "and this?", ("it",))
    assert first.place.endswith("q.jsonl:1") and lines.has_passages

    (tmp_path / "q.json").write_text(json.dumps([ROW, other], indent=1))
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress((tmp_path / "q.jsonl").read_bytes()))
    for name in ("q.json", "q.jsonl.gz"):
        again = read_questions(str(tmp_path / name))
        assert again.sha256 == lines.sha256 and again.name == name
        assert [q.answers for q in again.questions] == [q.answers for q in lines.questions]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "q.jsonl:2 is not valid JSON (.*): expected one object a line"),
        ("[1]", "q.jsonl:2 holds a list: expected a JSON object"),
        (b"\xff", "q.jsonl:2 has byte 0xff at offset 0: expected UTF-8"),
        ({"question": None}, "q.jsonl:2 has a bad 'question', NoneType: expected a text"),
        ({"question": " "}, "q.jsonl:2 has a bad 'question', an empty text: expected"),
        ({"question": "\ud800"}, "q.jsonl:2 has a bad 'question', a lone surrogate at character 0"),
        ({"id": "a\ud800"}, "q.jsonl:2 has a bad 'id', a lone surrogate at character 1: expected"),
        (
            {"ctxs": [{"title": "\ud800", "text": "t"}]},
            "q.jsonl:2: passage 1 of 'ctxs' has a bad 'title', a lone surrogate at character 0",
        ),
        ({"target": None}, "q.jsonl:2 has a bad answer in 'target', NoneType"),
        ({"answers": []}, "q.jsonl:2 has no answer in 'answers': expected at least one"),
        ({"answers": ["x", ""]}, "q.jsonl:2 has a bad answer in 'answers', an empty text"),
        ({"ctxs": []}, "q.jsonl:2 has no passages in 'ctxs': expected at least one"),
        ({"ctxs": ["t"]}, "q.jsonl:2: passage 1 of 'ctxs' is a str: expected title and text"),
        ({"ctxs": [{"title": "t"}]}, "q.jsonl:2: passage 1 of 'ctxs' has no 'text'"),
        ({"ctxs": [{"title": 3, "text": "t"}]}, "passage 1 of 'ctxs' has a title of int"),
        ({"ctxs": ...}, "q.jsonl:2 has no 'ctxs' and .*q.jsonl:1 has: expected passages in every"),
        ({"question": ...}, "q.jsonl:2 has no 'question': expected a text"),
        (
            {"target": ..., "answers": ...},
            "q.jsonl:2 has no answer: expected 'answers', 'answer' or",
        ),
    ],
)
def test_a_bad_row_is_refused_in_one_line(tmp_path, row, message):
    if isinstance(row, dict):
        changed = {name: value for name, value in (ROW | row).items() if value is not ...}
        row = json.dumps(changed)
    data = row if isinstance(row, bytes) else row.encode()
    (tmp_path / "q.jsonl").write_bytes(json.dumps(ROW).encode() + b"\n" + data)
    with pytest.raises(UserError, match=message) as raised:
        read_questions(str(tmp_path / "q.jsonl"))
    assert "\n" not in str(raised.value)


def test_an_empty_or_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no question: expected one JSON object a line"):
        read_questions(write(tmp_path / "q.jsonl"))
    with pytest.raises((UserError, OSError), match=r"none\.jsonl"):
        read_questions(str(tmp_path / "none.jsonl"))
