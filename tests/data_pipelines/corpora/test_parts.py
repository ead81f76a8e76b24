"""Large files in parts: together they are the file, whichever way it is cut."""

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_pipelines.corpora import CorpusConfig, Reading, files_of, parts_of, read_file
from data_pipelines.documents import reading
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents
from retro_jax.errors import UserError
from tests.data_pipelines.small import tree

TEXTS = [f"text {i} " + "é\u2028word " * (i % 9) for i in range(60)]


def json_lines(path):
    """Lines with a byte order mark, empty ones, and no newline at the end."""
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(TEXTS)]
    data = ("\n".join(lines[:30]) + "\n\n \r\n" + "\n".join(lines[30:])).encode()
    path.write_bytes(b"\xef\xbb\xbf" + data)


def row_groups(path):
    """A Parquet file of several row groups."""
    parquet.write_table(pa.table({"text": TEXTS}), path, row_group_size=7)


def documents(config, most):
    """The documents of a corpus's parts in order, and how many parts there are."""
    (file,) = files_of(config)
    parts = list(parts_of(config, file, most))
    found = Reading()
    return [d for part in parts for d in read_file(config, part, found)], len(parts)


@pytest.mark.parametrize(("kind", "write"), [("jsonl", json_lines), ("parquet", row_groups)])
def test_parts_together_are_the_file(tmp_path, kind, write):
    path = tmp_path / f"texts.{kind}"
    write(path)
    config = CorpusConfig("made", kind, str(path))
    whole, count = documents(config, 1 << 20)
    assert (count, [d.text for d in whole]) == (1, TEXTS)
    for most in (20, 50, 333, 2000):
        found, count = documents(config, most)
        assert count > 1 and found == whole
    (file,) = files_of(config)
    assert sum(part.size for part in parts_of(config, file, 333)) <= path.stat().st_size


def test_documents_do_not_depend_on_parts(tmp_path, monkeypatch):
    json_lines(tmp_path / "texts.jsonl")
    config = DocumentsConfig([CorpusConfig("made", "jsonl", str(tmp_path / "texts.jsonl"))])
    prepare_documents(tmp_path / "whole", config)
    monkeypatch.setattr(reading, "_PART_BYTES", 100)
    monkeypatch.setattr(reading, "_PORTION_BYTES", 150)
    prepare_documents(tmp_path / "cut", config)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_what_cannot_be_cut_is_one_part(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99))
    rows = [" = Heading = \n", "", *(" text of the article \n",) * 30, " = Other = \n", " more \n"]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "b.jsonl").write_text(lines)
    for file in files_of(CorpusConfig("c", "jsonl", str(tmp_path))):
        assert len(list(parts_of(CorpusConfig("c", "jsonl", str(tmp_path)), file, 10))) == 1
    (tmp_path / "c.parquet").write_bytes(b"no Parquet " * 9)
    config = CorpusConfig("c", "parquet", str(tmp_path / "c.parquet"), id_field="id")
    with pytest.raises(UserError, match=r"c.parquet is damaged .*: expected a whole Parquet file"):
        documents(config, 10)


def test_a_bad_line_of_a_part_is_named_by_its_byte(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a"}\n' * 50 + "{bad\n" + '{"text": "a"}\n' * 50)
    config = CorpusConfig("c", "jsonl", str(path))
    with pytest.raises(UserError, match=r"bad.jsonl:51 is not valid JSON"):
        documents(config, 1 << 20)
    with pytest.raises(UserError, match=r"bad.jsonl at byte 700 is not valid JSON"):
        documents(config, 100)
