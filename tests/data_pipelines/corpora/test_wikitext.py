"""WikiText: articles come back whole, by their headings alone, and the words add up."""

import pathlib

import pytest

from data_pipelines.corpora import CorpusConfig, Reading, read_corpus
from retro_jax.errors import UserError

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
_SHARED = _REPOSITORY.parent / "shared" / "data" / "wikitext103" / "wiki.valid.tokens"

# Two articles of one title, sections, and lines of text that look like headings but are not.
_SMALL = (
    " \n = Lobster = \n \n The lobster = a crustacean . \n \n = = Body = = \n \n"
    " = not a heading = \n right below text \n \n = = = Claws = = = \n \n Two . \n \n"
    " = Equal = sign = \n \n x = y = z \n = = \n \n"
    " = Lobster = \n \n A town . \n = nor this = \n \n \n"
)


def _read(path, **settings):
    reading = Reading()
    documents = list(
        read_corpus(CorpusConfig("wikitext", "wikitext", str(path), **settings), reading)
    )
    assert reading.counts["documents"] == len(documents)
    return documents


def _words(documents):
    """As WikiText counts: every line end is a word, <eos>."""
    return sum(len(d.text.split()) + d.text.count("\n") for d in documents)


def _file(tmp_path):
    """The real validation file where it is at hand, else a small one: path, articles and words."""
    if _SHARED.is_file():
        return _SHARED, 60, 217_646
    path = tmp_path / "wiki.valid.tokens"
    path.write_text(_SMALL)
    return path, 3, len(_SMALL.split()) + _SMALL.count("\n")


def test_validation_file_has_60_articles_and_217646_words(tmp_path):
    path, articles, words = _file(tmp_path)
    documents = _read(path)
    assert len(documents) == articles
    assert _words(documents) == words
    assert "".join(d.text for d in documents).encode() == path.read_bytes()
    assert len({d.id for d in documents}) == articles


def test_headings_are_of_the_first_level_and_stand_alone(tmp_path):
    path = tmp_path / "wiki.small.tokens"
    path.write_text(_SMALL)
    documents = _read(tmp_path)
    names = ["Lobster", "Equal = sign", "Lobster [2]"]
    assert [d.id for d in documents] == [f"wiki.small.tokens/{name}" for name in names]
    assert "".join(d.text for d in documents) == _SMALL
    assert documents[0].text.endswith("Two . \n \n")
    assert documents[2].text.startswith(" = Lobster")


def test_raw_files_beside_tokens(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text(_SMALL)
    (tmp_path / "wiki.train.raw").write_text(_SMALL.replace("Lobster", "Hömard"))
    raw = CorpusConfig("wikitext", "wikitext_raw", str(tmp_path))
    documents = list(read_corpus(raw, Reading()))
    names = ["Hömard", "Equal = sign", "Hömard [2]"]
    assert [d.id for d in documents] == [f"wiki.train.raw/{name}" for name in names]
    assert "".join(d.text for d in documents) == _SMALL.replace("Lobster", "Hömard")
    assert [d.id.partition("/")[0] for d in _read(tmp_path)] == ["wiki.train.tokens"] * 3


def test_a_file_without_headings_is_one_document(tmp_path):
    (tmp_path / "wiki.x.tokens").write_text(" only text \n")
    assert [(d.id, d.text) for d in _read(tmp_path)] == [("wiki.x.tokens/0", " only text \n")]


def test_bytes_that_are_not_utf8_are_named_by_their_offset_in_the_file(tmp_path):
    path = tmp_path / "wiki.bad.tokens"
    data = _SMALL.encode()
    offset = data.index(b"A town")
    path.write_bytes(data[:offset] + b"\xff" + data[offset + 1 :])
    with pytest.raises(UserError, match=f"{path} has byte 0xff at offset {offset}: expected UTF-8"):
        _read(path)
