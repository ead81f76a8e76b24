"""Slices: each kind of text with its own denominators, sorted and cut as documents are."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import zstandard

from data_pipelines.artefacts.stage import Stage
from data_pipelines.corpora import Reading
from data_pipelines.documents.documents import read_documents
from data_pipelines.evaluation.detokenise import detokenise
from data_pipelines.evaluation.texts import (
    MEASURE_NAMES,
    SliceConfig,
    evaluation_text,
    pile_subset,
    prepare_texts,
    read_measures,
    read_texts,
)
from retro_jax.errors import UserError
from tests.data_pipelines.corpora.test_wikitext import _SHARED, _SMALL


def _lines(path: pathlib.Path, *objects: dict) -> str:
    """A JSON lines file, compressed where its name says so."""
    data = "".join(json.dumps(each) + "\n" for each in objects).encode()
    path.write_bytes(zstandard.compress(data) if path.suffix == ".zst" else data)
    return str(path)


def _pile(tmp_path: pathlib.Path) -> str:
    sets = ("Github", "Gutenberg (PG-19)", "USPTO Backgrounds")
    return _lines(
        tmp_path / "val.jsonl.zst",
        *({"text": f"ünit {i}\n", "meta": {"pile_set_name": sets[i % 3]}} for i in range(12)),
    )


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("Github", "github"),
        ("Gutenberg (PG-19)", "gutenberg"),
        ("PubMed Central", "pubmed_central"),
        ("Pile-CC", "pile_cc"),
        ("DM Mathematics", "dm_mathematics"),
        ("USPTO Backgrounds", "uspto"),
        ("Wikipedia (en)", "wikipedia"),
    ],
)
def test_subsets_have_the_papers_names(name: str, short: str):
    assert pile_subset(name) == short


def test_the_pile_by_subset(tmp_path: pathlib.Path):
    config = SliceConfig("pile", _pile(tmp_path), ("github", "uspto"), max_documents=3)
    manifest = prepare_texts(tmp_path / "slice", config)
    documents = list(read_documents(tmp_path / "slice" / "documents", manifest))
    assert [d.corpus for d in documents] == ["github"] * 3 + ["uspto"] * 3
    assert [shard["corpus"] for shard in manifest.fact("shards")] == ["github", "uspto"]
    measures = read_measures(tmp_path / "slice")
    for document, row in zip(documents, measures.tolist(), strict=True):
        assert row == [len(document.text.encode()), 2, 1, 0]
    # A larger selection begins with the smaller one; what is there is not read again.
    more = prepare_texts(
        tmp_path / "more", SliceConfig("pile", config.path, ("github",), max_documents=4)
    )
    wider = list(read_documents(tmp_path / "more" / "documents", more))
    assert [d.id for d in wider][:3] == [d.id for d in documents[:3]]
    pathlib.Path(str(config.path)).unlink()
    again = dataclasses.replace(config, path=None)
    assert prepare_texts(tmp_path / "slice", again).hash == manifest.hash
    assert config.key == "pile-github-uspto-first3"


def test_summaries_and_last_words_are_scored_by_themselves(tmp_path: pathlib.Path):
    path = _lines(tmp_path / "a.jsonl", {"article": "Äpfel fell.", "summary": "They do\nfall."})
    (text,) = read_texts(SliceConfig("curation", path), Reading())
    assert text.text.encode()[text.scored_from :].decode() == "They do\nfall."
    assert text.text.startswith("Äpfel fell.\n\n")
    assert (text.bytes, text.words, text.lines) == (13, 3, 1)
    path = _lines(tmp_path / "b.jsonl", {"text": "He said néver "}, {"text": "one"})
    last, only = read_texts(SliceConfig("lambada", path), Reading())
    assert last.text.encode()[last.scored_from :].decode() == "néver"
    assert (last.bytes, last.words, last.lines) == (6, 1, 0)
    assert (only.text, only.scored_from) == ("one", 0)


@pytest.mark.parametrize(
    ("key", "name", "measure"),
    [
        ("lambada", "lambada", "last_word_accuracy"),
        ("lambada-first10", "lambada", "last_word_accuracy"),
        ("lambada_de", "lambada_de", None),  # another text, of which nothing is known
        ("pile-github-first3", "pile", None),
        ("test", "test", None),
    ],
)
def test_a_split_has_the_row_of_its_text(key: str, name: str, measure: str | None):
    text = evaluation_text(key)
    assert (text.name, text.measure) == (name, measure)
    assert (text.published is None) == (name in ("test", "lambada_de"))


def test_any_json_lines_are_scored_whole(tmp_path: pathlib.Path):
    path = _lines(tmp_path / "c.jsonl", {"text": "a b\n"}, {"text": "  "}, {"text": "c"})
    texts = list(read_texts(SliceConfig("c4", path), Reading()))
    assert [(t.corpus, t.text, t.bytes, t.words, t.lines) for t in texts] == [
        ("c4", "a b\n", 4, 2, 1),
        ("c4", "c", 1, 1, 0),
    ]


@pytest.mark.parametrize("name", ["wikitext103", "wikitext103_detokenised"])
def test_both_variants_of_wikitext_have_the_words_of_the_original(name: str, tmp_path):
    path, articles, words = _SHARED, 60, 217_646
    if not path.is_file():
        path = tmp_path / "wiki.valid.tokens"
        path.write_text(_SMALL)
        articles, words = 3, len(_SMALL.split()) + _SMALL.count("\n")
    prepare_texts(tmp_path / "slice", SliceConfig(name, str(path)))
    sums = dict(zip(MEASURE_NAMES, read_measures(tmp_path / "slice").sum(axis=0), strict=True))
    assert len(read_measures(tmp_path / "slice")) == articles
    assert sums["words"] + sums["lines"] == words
    size = path.stat().st_size
    assert sums["bytes"] == size if name == "wikitext103" else 0.6 * size < sums["bytes"] < size


@pytest.mark.parametrize(
    ("tokenised", "prose"),
    [
        (" = = Early life = = ", "== Early life =="),
        (" It has 1 @,@ 500 people ( or so ) . ", "It has 1,500 people (or so)."),
        (' He said " no , never " , and left . ', 'He said "no, never", and left.'),
        (" Jay @-@ Z 's 2 @.@ 5 m song ; they 're $ 5 off ", "Jay-Z's 2.5 m song; they're $5 off"),
        (" It does n't ' fit ' : the boys ' room ? ", "It doesn't 'fit': the boys' room?"),
        (" \n \n x \n", "\n\nx\n"),
    ],
)
def test_tokenised_text_becomes_prose(tokenised: str, prose: str):
    assert detokenise(tokenised) == prose


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "pile"}, "pile is not prepared: expected --slice_paths=pile=PATH"),
        ({"name": "pile", "subsets": ("x",)}, "has no subset 'x': it holds github, gutenberg, us"),
        ({"name": "curation"}, "has no text in 'article'"),
        ({"name": "c4", "path": "/nowhere.jsonl"}, "/nowhere.jsonl is missing"),
    ],
)
def test_bad_slices_are_refused(config: dict, message: str, tmp_path: pathlib.Path):
    if config != {"name": "pile"}:
        config = {"path": _pile(tmp_path)} | config
    with pytest.raises(UserError, match=message):
        prepare_texts(tmp_path / "slice", SliceConfig(**config))
    assert not np.any([p.name == "manifest.json" for p in tmp_path.rglob("*")])


def test_another_file_is_not_scored_as_the_one_that_was_read(tmp_path: pathlib.Path):
    test = _lines(tmp_path / "test.jsonl", {"text": "of the test set"})
    valid = _lines(tmp_path / "valid.jsonl", {"text": "of the validation set"})
    folder = tmp_path / "slice"
    manifest = prepare_texts(folder, SliceConfig("c4", test))
    same = shutil.copy(test, tmp_path / "copy.jsonl")
    for path in (test, str(same), None):
        assert prepare_texts(folder, SliceConfig("c4", path)).hash == manifest.hash
    with pytest.raises(UserError) as error:
        prepare_texts(folder, SliceConfig("c4", valid))
    for part in (valid, "'test.jsonl'", "source.json", "expected that, or another name"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"/nowhere\.jsonl is missing"):
        prepare_texts(folder, SliceConfig("c4", "/nowhere.jsonl"))
    # One that the code before prepared has no record: any file that exists is taken for its own.
    (folder / "source.json").unlink()
    assert prepare_texts(folder, SliceConfig("c4", valid)).hash == manifest.hash
    assert not (folder / "source.json").exists()


def test_a_folder_is_known_by_all_of_its_files(tmp_path: pathlib.Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b"):
        _lines(source / f"{name}.jsonl", {"text": name})
    config = SliceConfig("c4", str(source))
    manifest = prepare_texts(tmp_path / "slice", config)
    assert prepare_texts(tmp_path / "slice", config).hash == manifest.hash
    _lines(source / "b.jsonl", {"text": "c"})
    with pytest.raises(UserError, match="was read from 'source' of 28 bytes"):
        prepare_texts(tmp_path / "slice", config)


def test_a_preparation_that_was_killed_goes_on_with_its_own_file_only(tmp_path, monkeypatch):
    test = _lines(tmp_path / "test.jsonl", {"text": "of the test set"})
    valid = _lines(tmp_path / "valid.jsonl", {"text": "of the validation set"})
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_texts(tmp_path / "slice", SliceConfig("c4", test))
    with pytest.raises(UserError, match=r"was read from 'test\.jsonl'"):
        prepare_texts(tmp_path / "slice", SliceConfig("c4", valid))
    manifest = prepare_texts(tmp_path / "slice", SliceConfig("c4", test))
    (document,) = read_documents(tmp_path / "slice" / "documents", manifest)
    assert document.text == "of the test set"


def test_a_line_without_its_set_is_refused(tmp_path: pathlib.Path):
    path = _lines(tmp_path / "a.jsonl", {"text": "x", "meta": {}})
    with pytest.raises(UserError, match=r"a\.jsonl:1 has no meta\.pile_set_name"):
        list(read_texts(SliceConfig("pile", path), Reading()))
