"""Corpora cut by a label of each document: the Pile, Parquet columns, and any JSON lines."""

import json

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import CorpusConfig, Reading, read_corpus
from data_pipelines.corpora.document import content_id
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents, read_documents
from retro_jax.errors import UserError
from tests.data_pipelines.small import prepare

_SETS = ("Github", "PubMed Central", "Gutenberg (PG-19)")


def _pile(folder, count=30):
    """Two files as the Pile's are."""
    for part in range(2):
        objects = [
            {"text": f"document {i} of the pile", "meta": {"pile_set_name": _SETS[i % 3]}}
            for i in range(part, count, 2)
        ]
        data = "".join(json.dumps(each) + "\n" for each in objects).encode()
        (folder / f"{part:02d}.jsonl.zst").write_bytes(zstandard.compress(data))
    return str(folder)


def _read(config, **reading):
    return list(read_corpus(config, Reading(**reading)))


def test_the_pile_keeps_its_sets(tmp_path):
    documents = _read(CorpusConfig("pile", "pile", _pile(tmp_path)))
    assert {d.corpus for d in documents} == {
        "pile-github",
        "pile-pubmed_central",
        "pile-gutenberg",
    }
    assert {d.text: d.corpus for d in documents}["document 2 of the pile"] == "pile-gutenberg"
    chosen = CorpusConfig("pile", "pile", str(tmp_path), labels=["github", "gutenberg"])
    assert len(_read(chosen)) == 20
    wrong = CorpusConfig("pile", "pile", str(tmp_path), labels=["git"])
    expected = r"has no label 'git': expected some of github, gutenberg, pubmed_central"
    with pytest.raises(UserError, match=expected):
        _read(wrong)


def test_sets_are_corpora_of_the_database(tmp_path):
    (tmp_path / "pile").mkdir()
    corpus = CorpusConfig("pile", "pile", _pile(tmp_path / "pile", 90), max_documents=11)
    prepare(tmp_path / "w", DocumentsConfig([corpus], validation=0.2, test=0.0, sort_bytes=1000))
    places = [tmp_path / "w" / "documents" / split for split in ("train", "validation")]
    documents = [
        document
        for place in places
        for document in read_documents(place, Manifest.open(place, "documents"))
    ]
    names = [f"pile-{name}" for name in ("github", "gutenberg", "pubmed_central")]
    counts = {name: sum(d.corpus == name for d in documents) for name in names}
    assert counts == dict.fromkeys(names, 11), "the limit is each set's own"
    reading = Manifest.open(places[0], "documents").fact("reading")["pile"]
    assert reading["labels"] == {"github": 30, "gutenberg": 30, "pubmed_central": 30}
    assert (reading["documents"], reading["beyond_limit"]) == (90, 57)
    assert list(ChunkDatabase.open(tmp_path / "w" / "chunks" / "train").corpora) == names


def test_two_corpora_of_one_name_are_refused(tmp_path):
    folders = [tmp_path / "pile", tmp_path / "text"]
    for folder in folders:
        folder.mkdir()
    (folders[1] / "a.txt").write_text("a text")
    corpora = [
        CorpusConfig("pile", "pile", _pile(folders[0])),
        CorpusConfig("pile-github", "text", str(folders[1])),
    ]
    with pytest.raises(UserError, match="both hold documents of 'pile-github': expected other"):
        prepare_documents(tmp_path / "out", DocumentsConfig(corpora))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "text", "label_field": "x"}, "label_field is 'x': expected None for the kind"),
        ({"kind": "jsonl", "labels": ["x"]}, r"labels is \('x',\): expected None, or some labels"),
        ({"kind": "pile", "labels": []}, r"labels is \(\): expected None, or some labels"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=f"CorpusConfig.{message}"):
        CorpusConfig("c", path="x", **settings)


def test_a_document_without_a_label_is_bad(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "meta": {"pile_set_name": "A"}}\n{"text": "b", "meta": "A"}\n')
    config = CorpusConfig("p", "pile", str(path))
    with pytest.raises(UserError, match=r"x.jsonl:2 has no label in 'meta.pile_set_name'"):
        _read(config)
    assert [d.corpus for d in _read(config, skip_bad=True)] == ["p-a"]


def _table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=4)


def test_parquet_by_row_groups(tmp_path):
    texts = [f"text {i} ½" for i in range(10)]
    meta = [{"source": "ab"[i % 2], "n": i} for i in range(10)]
    _table(tmp_path / "data" / "train-00000.parquet", body=texts, key=list(range(10)), meta=meta)
    (tmp_path / "data" / "README.md").write_text("#")
    plain = CorpusConfig("p", "parquet", str(tmp_path), text_field="body")
    documents = _read(plain)
    assert [d.text for d in documents] == texts
    assert documents[4].id == content_id(texts[4])
    named = CorpusConfig(
        "p",
        "parquet",
        str(tmp_path),
        text_field="body",
        id_field="key",
        label_field="meta.source",
    )
    assert [(d.id, d.corpus) for d in _read(named)][:2] == [("0", "p-a"), ("1", "p-b")]


def test_what_can_be_wrong_with_parquet_is_one_line(tmp_path):
    path = tmp_path / "x.parquet"
    _table(path, text=["a", None, "c"], number=[1, 2, 3], meta=[{"a": "x"}] * 3)
    for settings, name in (
        ({"text_field": "body"}, "body"),
        ({"label_field": "meta.b"}, "meta.b"),
        ({"id_field": "number.x"}, "number.x"),
    ):
        expected = rf"x.parquet has no column '{name}': expected one of text, number, meta$"
        with pytest.raises(UserError, match=expected):
            _read(CorpusConfig("p", "parquet", str(path), **settings))
    with pytest.raises(UserError, match=r"x.parquet:2 has no text in 'text': expected a string"):
        _read(CorpusConfig("p", "parquet", str(path)))
    assert [d.text for d in _read(CorpusConfig("p", "parquet", str(path)), skip_bad=True)] == [
        "a",
        "c",
    ]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"x.parquet is damaged .*: expected a whole Parquet file"):
        _read(CorpusConfig("p", "parquet", str(path)))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pyarrow cannot be imported .*retro-jax\[parquet\]"):
        _read(CorpusConfig("p", "parquet", str(path)))
