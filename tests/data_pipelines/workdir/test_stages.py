"""`prepare` from Python: texts in memory, the settings that W records, and the errors."""

import json
import shutil

import pytest

from data_pipelines import workdir
from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.documents.documents import read_documents
from data_pipelines.workdir import CorpusConfig, DocumentsConfig, PrepareConfig, TextCorpus
from data_pipelines.workdir.settings_file import SETTINGS_FILE
from data_pipelines.workdir.stages import ALL_STAGES, only_one
from launch import prepare as command
from launch.common import configurables
from retro_jax.errors import UserError

TEXTS = [f"Lobster {i} crossed the harbour at {i} o'clock." for i in range(60)]
DOCUMENTS = ["documents"]


def config_of(*corpora, **settings):
    """Settings of a preparation that takes a moment."""
    return PrepareConfig(DocumentsConfig(corpora), **settings)


def texts_of(folder):
    """Texts of all splits by id."""
    splits = [folder / "documents" / split for split in ("train", "validation", "test")]
    every = [d for split in splits for d in read_documents(split, Manifest.read(split))]
    assert len({d.id for d in every}) == len(every)
    return {d.id: d.text for d in every}


def test_texts_in_memory_become_documents(tmp_path):
    named = [(f"n{i}", text) for i, text in enumerate(TEXTS)]
    corpus = TextCorpus("mine", named)
    made = workdir.prepare(tmp_path / "W", config_of(corpus), stages=DOCUMENTS)
    assert made == DOCUMENTS
    assert texts_of(tmp_path / "W") == dict(named)
    settings = Manifest.read(tmp_path / "W/documents/train").settings["corpora"]["mine"]
    assert (settings["documents"], settings["sha256"]) == (60, corpus.digest)
    assert sorted(p.name for p in (tmp_path / "W/documents").iterdir()) == [
        "test",
        "train",
        "validation",
    ]
    again = config_of(TextCorpus("mine", list(named)))
    assert workdir.prepare(tmp_path / "W", again, stages=DOCUMENTS) == []


def test_other_texts_are_refused(tmp_path):
    lines = []
    first = config_of(TextCorpus("mine", TEXTS))
    workdir.prepare(tmp_path / "W", first, stages=DOCUMENTS, report=lines.append)
    assert lines[0] == "documents: ..."
    assert lines[1].startswith("documents: ")
    other = config_of(TextCorpus("mine", [*TEXTS[:-1], "Another text."]))
    message = r"made with other settings: corpora.mine.sha256: .* expected the same, or another"
    with pytest.raises(UserError, match=message):
        workdir.prepare(tmp_path / "W", other, stages=DOCUMENTS)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], r"documents of 'mine' is empty: expected strings alone, or pairs"),
        (["a", ("b", "c")], r"documents\[1\] of 'mine' is a tuple: expected strings alone"),
        ([("a", "b"), "c"], r"documents\[1\] of 'mine' is a str: expected strings alone"),
        ([("a", 1)], r"documents\[0\] of 'mine' is a tuple"),
        ([7], r"documents\[0\] of 'mine' is a int"),
    ],
)
def test_what_is_no_text_is_named(documents, message):
    with pytest.raises(UserError, match=f"TextCorpus.{message}"):
        TextCorpus("mine", documents)


def test_a_bad_name_or_split_is_refused():
    with pytest.raises(UserError, match="name is 'a b': expected letters, digits, - and _"):
        TextCorpus("a b", ["x"])
    with pytest.raises(UserError, match="split is 'dev': expected None or one of"):
        TextCorpus("a", ["x"], split="dev")


def test_a_lone_surrogate_in_memory_is_one_line(tmp_path):
    corpus = TextCorpus("mine", [*TEXTS, "x\ud800"])
    with pytest.raises(UserError, match="has a lone surrogate at character 1: expected valid"):
        workdir.prepare(tmp_path / "W", config_of(corpus), stages=DOCUMENTS)
    assert not (tmp_path / "W" / SETTINGS_FILE).exists()


def test_the_commands_read_the_settings_that_python_recorded(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    corpora = [
        CorpusConfig("texts", "text", str(folder)),
        CorpusConfig("more", "text", str(folder), include=("1*.txt",), split="test"),
    ]
    config = PrepareConfig(
        DocumentsConfig(corpora, validation=0.125),
        neighbours=workdir.NeighboursConfig(retriever="bm25", train=7),
        leakage=workdir.LeakageConfig(threshold=None),
    )
    workdir.prepare(tmp_path / "W", config, stages=DOCUMENTS)
    configurables.load(str(tmp_path / "W" / SETTINGS_FILE))
    assert command.make_config() == config
    assert configurables.operative_config() == (tmp_path / "W" / SETTINGS_FILE).read_text()


def test_corpora_in_memory_are_no_setting_of_a_command(tmp_path):
    config = config_of(TextCorpus("mine", TEXTS), tokenizer=workdir.TokenizerConfig(777))
    workdir.prepare(tmp_path / "W", config, stages=DOCUMENTS)
    configurables.load(str(tmp_path / "W" / SETTINGS_FILE))
    with pytest.raises(UserError, match=r"DocumentsConfig.corpora has no value"):
        command.make_config()
    corpora = "DocumentsConfig.corpora = (@a/CorpusConfig(),)"
    configurables.load(
        None,
        [corpora, "a/CorpusConfig.name = 'a'", "a/CorpusConfig.kind = 'stdlib'"],
        base=str(tmp_path / "W" / SETTINGS_FILE),
    )
    assert command.make_config().tokenizer.vocab_size == 777


def test_errors_have_the_words_of_the_command_line(tmp_path):
    config = config_of(TextCorpus("mine", TEXTS))
    known = ",".join(ALL_STAGES)
    for stages, message in (
        (["documents", "chunk"], f"stages=chunk: expected some of {known}"),
        ([], f"stages is empty: expected some of {known}"),
    ):
        with pytest.raises(UserError) as error:
            workdir.prepare(tmp_path / "W", config, stages=stages)
        assert str(error.value) == message
    assert not (tmp_path / "W").exists()
    with only_one(tmp_path), pytest.raises(UserError, match="prepared by another process"):
        workdir.prepare(tmp_path, config)
    with pytest.raises(UserError, match=r"documents/train has no manifest.json"):
        workdir.prepare(tmp_path / "W", config, stages=["tokenizer"])


@pytest.fixture(scope="module")
def by_bm25(tmp_path_factory):
    """A W, its settings, and the lines about its stages."""
    folder, lines = tmp_path_factory.mktemp("counts"), []
    config = config_of(
        TextCorpus("mine", [*TEXTS, TEXTS[0], " "]),
        tokenizer=workdir.TokenizerConfig(vocab_size=300),
        neighbours=workdir.NeighboursConfig(retriever="bm25"),
    )
    workdir.prepare(folder / "W", config, report=lines.append)
    return folder / "W", config, lines


def test_stages_say_what_came_in_and_what_was_dropped(by_bm25):
    _, _, lines = by_bm25
    said = {line.partition(":")[0]: line for line in lines}
    assert "60 of 61 readable documents; left out: 1 empty, 1 duplicates (" in said["documents"]
    assert "; of 60 documents 0 are withdrawn (" in said["chunks"]


@pytest.mark.parametrize(
    ("stage", "place", "fact", "message"),
    [
        ("documents", "documents/train", "reading", "of 71 documents that were read 60 are kept"),
        ("leakage", "leakage", "documents", "W/leakage has .* documents: expected .*, as many as"),
        ("chunks", "chunks/train", "documents", "W/chunks/train has .* documents: expected"),
        ("bm25", "bm25", "chunks", "W/bm25 has .* chunks: expected"),
        ("neighbours", "neighbours/test", "chunks", "W/neighbours/test has .* chunks: expected"),
    ],
)
def test_a_stage_that_lost_something_is_refused(by_bm25, tmp_path, stage, place, fact, message):
    folder = shutil.copytree(by_bm25[0], tmp_path / "W")
    path = folder / place / "manifest.json"
    fields = json.loads(path.read_text())
    if fact == "reading":
        fields["facts"]["reading"]["mine"]["documents"] += 10
    else:
        fields["facts"][fact] -= 10
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        workdir.prepare(folder, by_bm25[1], stages=[stage])
