"""Updates of a database whose corpus gives no ids: documents are known by their texts."""

import dataclasses
import json
import random
import shutil

import pytest

from data_pipelines import workdir as module
from data_pipelines.artefacts.manifest import STAGE_FILE, Manifest
from data_pipelines.artefacts.runner import InProcess
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.corpora import SPLITS, CorpusConfig, read_file
from data_pipelines.corpora.document import content_id
from data_pipelines.documents import documents, reading
from data_pipelines.documents.documents import read_documents, split_of
from data_pipelines.questions.prepared import QuestionBatches, prepare_questions
from data_pipelines.questions.reader import Passage, Question, QuestionFile
from data_pipelines.retriever import revisions
from data_pipelines.workdir import compaction, update
from data_pipelines.workdir.preparation import Preparation
from data_pipelines.workdir.update import named_documents
from retro_jax.errors import UserError

_WORDS = [
    "pale",
    "gulls",
    "quiet",
    "harbour",
    "lobster",
    "boats",
    "crust",
    "sky",
    "return",
    "while",
    "under",
    "lay",
]


def texts_of(name, count, seed):
    """Texts of some words, each of its own."""
    rng = random.Random(seed)
    return [f"{name} {i} {' '.join(rng.choices(_WORDS, k=40))}" for i in range(count)]


OLD, NEW, LATER = texts_of("old", 40, 0), texts_of("new", 20, 1), texts_of("later", 10, 2)


def prepared(folder, texts):
    """A W of JSON lines without ids, by BM25; returns its settings and the file of lines."""
    path = folder / "day.jsonl"
    write(path, texts)
    corpus = module.CorpusConfig("day", "jsonl", str(path))
    config = module.PrepareConfig(
        module.DocumentsConfig([corpus], validation=0.1, test=0.1),
        tokenizer=module.TokenizerConfig(vocab_size=330),
        neighbours=module.NeighboursConfig(retriever="bm25", train=2, validation=2, test=2),
        leakage=module.LeakageConfig(threshold=None),
    )
    module.prepare(folder / "W", config)
    return config, path


def write(path, texts):
    """Lines with a text and nothing else."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def changed(folder, config, **what):
    """Runs an update; returns the lines about it."""
    lines = []
    p = Preparation(folder / "W", config, InProcess(), lines.append)
    update.update(p, append=what.get("append", True), remove=what.get("remove", []))
    return lines


def held_texts(folder):
    """Texts of the newest database, and those of the held-out splits."""
    every = {}
    newest = revisions.latest(folder / "W")
    for place in (revisions.folder_of(folder / "W", r) for r in range(newest + 1)):
        for split in SPLITS if (place / "documents").is_dir() else ():
            for document in read_documents(
                place / "documents" / split, Manifest.read(place / "documents" / split)
            ):
                every[place / split, document.id] = document.text
    database = revisions.open_database(folder / "W")
    removed = set(database.removed.tolist())
    names = [r.id for number, r in enumerate(database.records()) if number not in removed]
    texts = [next(t for (_, name), t in every.items() if name == wanted) for wanted in names]
    held_out = {t for (place, _), t in every.items() if place.parent == folder / "W"} - set(texts)
    return sorted(texts), held_out


def in_training(texts):
    """The texts that a hash of their id puts into the training split."""
    shares = {"validation": 0.1, "test": 0.1}
    return {text for text in texts if split_of(content_id(text), **shares) == "train"}


def test_lines_in_front_add_what_is_new_and_nothing_else(tmp_path):
    config, path = prepared(tmp_path, OLD)
    write(path, [*NEW, *OLD])
    lines = changed(tmp_path, config)
    wanted = in_training(NEW)
    assert 10 < len(wanted) < 20
    assert lines[1].startswith(f"revision 1: {len(wanted)} documents added, 0 removed")
    texts, held_out = held_texts(tmp_path)
    assert texts == sorted(wanted | in_training(OLD))
    assert held_out == set(OLD) - in_training(OLD)
    assert changed(tmp_path, config)[0] == "revision 1: nothing to change"
    assert module.prepare(tmp_path / "W", config) == [], "what was appended is no change"
    write(path, [*LATER, *OLD])
    with pytest.raises(
        UserError, match="made of other files: corpus 'day' has other bytes and had"
    ):
        module.prepare(tmp_path / "W", config)


def test_other_lines_in_the_same_places_are_new_documents(tmp_path):
    config, path = prepared(tmp_path, OLD)
    write(path, NEW)  # day.jsonl:1 and so on were known before
    changed(tmp_path, config)
    assert held_texts(tmp_path)[0] == sorted(in_training(OLD) | in_training(NEW))


def test_a_removed_document_comes_back_where_its_corpus_has_it(tmp_path):
    config, _ = prepared(tmp_path, OLD)
    gone = min(in_training(OLD))
    changed(tmp_path, config, append=False, remove=[f"day/{content_id(gone)}"])
    assert held_texts(tmp_path)[0] == sorted(in_training(OLD) - {gone})
    changed(tmp_path, config)
    assert held_texts(tmp_path)[0] == sorted(in_training(OLD))


def killed_append(folder, config, patched, remove=()):
    """An --append that is killed between its documents and its chunks; returns its folder."""

    class Killed(BaseException):
        pass

    def killed(*arguments, **more):
        raise Killed

    with patched.context() as inside:
        inside.setattr(update, "prepare_chunks", killed)
        with pytest.raises(Killed):
            changed(folder, config, remove=remove)
    return revisions.folder_of(folder / "W", revisions.latest(folder / "W") + 1)


def test_a_killed_append_goes_on_with_what_it_removes_and_nothing_else(tmp_path, monkeypatch):
    config, path = prepared(tmp_path, OLD)
    write(path, [*NEW, *OLD])
    first, second = (f"day/{content_id(text)}" for text in sorted(in_training(OLD))[:2])
    every = sorted(in_training(OLD) | in_training(NEW))
    for begun, others, told in (
        ([first], ([], [second], [first, second]), f"begun with --remove of {first}: expected"),
        ([], ([first],), "begun with no --remove: expected the same, or that folder removed"),
    ):
        folder = killed_append(tmp_path, config, monkeypatch, begun)
        for remove in others:
            with pytest.raises(UserError, match=told):
                changed(tmp_path, config, remove=remove)
        with pytest.raises(UserError, match="unfinished: expected --append, which began it"):
            changed(tmp_path, config, append=False, remove=[first])
        changed(tmp_path, config, remove=begun)
        assert held_texts(tmp_path)[0] == every, "each once"
        assert not (folder / revisions.REMOVAL_FILE).exists()
        shutil.rmtree(folder)
    folder = killed_append(tmp_path, config, monkeypatch)
    (folder / revisions.REMOVAL_FILE).unlink()  # as an earlier version left it
    changed(tmp_path, config)
    assert held_texts(tmp_path)[0] == every


def test_a_refused_append_is_in_nobodys_way(tmp_path, monkeypatch):
    config, path = prepared(tmp_path, OLD)
    gone = f"day/{content_id(min(in_training(OLD)))}"
    folder = revisions.folder_of(tmp_path / "W", 1)
    for text, message in (
        ("", "holds no documents"),
        ('{"text": ""}\n', "holds no documents"),
        ("{", "not valid JSON"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            changed(tmp_path, config, remove=[gone])
        assert (folder / "documents").is_dir(), "what was read is kept for the next --append"
        changed(tmp_path, config, append=False, remove=[gone])
        assert len(held_texts(tmp_path)[0]) == len(in_training(OLD)) - 1
        shutil.rmtree(folder)
    write(path, [*NEW, *OLD])
    read = []
    monkeypatch.setattr(reading, "read_file", lambda *a: read.append(a) or read_file(*a))

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(documents, "plan_shards", killed)
        with pytest.raises(KeyboardInterrupt):
            changed(tmp_path, config)
    changed(tmp_path, config, remove=[gone])
    assert len(read) == 1, "nothing is read again"
    assert held_texts(tmp_path)[0] == sorted(in_training(OLD) | in_training(NEW))
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        changed(tmp_path, config)
    compaction.compact(Preparation(tmp_path / "W", config, InProcess(), print))
    with pytest.raises(UserError, match="not valid JSON"):
        changed(tmp_path, config)
    compaction.purge(Preparation(tmp_path / "W", config, InProcess(), print))
    assert not revisions.folder_of(tmp_path / "W", 3).exists(), "no text stays there"


def test_passages_of_questions_go_with_the_documents_that_are_purged(tmp_path, caplog):
    """Those of a file stay: they are its own text."""
    config, _ = prepared(tmp_path, OLD)
    work, gone = tmp_path / "W", held_texts(tmp_path)[0][0]
    for name, passages in (("found", ()), ("given", (Passage("t", "a passage"),))):
        question = Question("q:0", "0", gone, ("yes",), passages)
        prepare_questions(work, name, QuestionFile("q.jsonl", "00", (question,)), 2)
    asked = BatchConfig(sequence_length=256, batch_size=1, neighbours=2, questions="found")
    tokenizer = Tokenizer.open(work / "tokenizer")
    read = QuestionBatches.read(work, asked).rows(0).neighbours[0]
    quoted = [tokenizer.decode(row[row != tokenizer.pad_id]) for row in read.reshape(-1, 128)]
    assert any(gone[:60] in text for text in quoted) and not caplog.messages
    changed(tmp_path, config, append=False, remove=[f"day/{content_id(gone)}"])
    QuestionBatches.read(work, asked)
    assert "has passages of the database" in caplog.text and "revision 1 is" in caplog.text
    for name, file in (("begun", STAGE_FILE), ("mine", "notes.txt")):  # "mine" is no artefact
        (work / "questions" / name).mkdir()
        (work / "questions" / name / file).write_text("{}")
    compaction.purge(Preparation(work, config, InProcess(), print))
    assert sorted(path.name for path in (work / "questions").iterdir()) == ["given", "mine"]
    assert (work / "questions" / "mine" / "notes.txt").is_file()
    QuestionBatches.read(work, dataclasses.replace(asked, questions="given"))


def test_an_id_that_ends_as_a_line_does_is_removed_by_its_name_alone(tmp_path):
    path = tmp_path / "day.jsonl"
    corpora = [module.CorpusConfig("day", "jsonl", str(path), id_field="id")]
    config = module.PrepareConfig(
        module.DocumentsConfig(corpora, validation=0, test=0),
        tokenizer=module.TokenizerConfig(vocab_size=330),
        neighbours=module.NeighboursConfig(retriever="bm25", train=2, validation=2, test=2),
        leakage=module.LeakageConfig(threshold=None),
    )
    path.write_text(
        "".join(json.dumps({"id": f"{i}\r", "text": t}) + "\n" for i, t in enumerate(OLD))
    )
    module.prepare(tmp_path / "W", config)
    (tmp_path / "ids").write_bytes(b"day/7\r\n")
    message = r"holds no document '7' of the corpus 'day' but '7\\r': expected its name as a flag's"
    with pytest.raises(UserError, match=message):
        changed(tmp_path, config, append=False, remove=[f"@{tmp_path / 'ids'}"])
    lines = changed(tmp_path, config, append=False, remove=["day/7\r"])
    assert "0 documents added, 1 removed" in lines[0]


@pytest.fixture
def old_workdir(tmp_path, monkeypatch):
    """A W as the versions before made it: documents have the ids of lines."""
    with monkeypatch.context() as patched:
        patched.setattr(CorpusConfig, "ids_from_content", False)
        config, path = prepared(tmp_path, OLD)
    settings = Manifest.read(tmp_path / "W/documents/train").settings["corpora"]["day"]
    assert "ids" not in settings
    names = {record.id for record in revisions.open_database(tmp_path / "W").records()}
    assert names < {f"day.jsonl:{i}" for i in range(1, 41)}
    return tmp_path, config, path


def test_a_workdir_with_ids_of_lines_opens_and_grows_by_what_is_new(old_workdir):
    folder, config, path = old_workdir
    assert module.prepare(folder / "W", config) == [], "all is there already"
    before, held_out = held_texts(folder)
    assert held_out == set(OLD) - set(before)
    assert held_out
    assert changed(folder, config)[0] == "revision 0: nothing to change"
    write(path, [*NEW, *OLD])
    changed(folder, config)
    texts, still_held_out = held_texts(folder)
    assert texts == sorted({*before, *in_training(NEW)})
    assert still_held_out == held_out, "none of them became a training document"
    write(path, [*LATER, *OLD])
    changed(folder, config)
    assert held_texts(folder)[0] == sorted({*before, *in_training(NEW), *in_training(LATER)})
    assert changed(folder, config)[0] == "revision 2: nothing to change"


def test_a_list_of_documents_as_any_editor_writes_it(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes("\ufeffc/a\r\n\r\nc/x\u2028y / z\n".encode())
    assert named_documents([f"@{path}", "d/1"]) == [("c", "a"), ("c", "x\u2028y / z"), ("d", "1")]
    path.write_bytes(b"c/a\nc\xff/b\n")
    with pytest.raises(
        UserError, match=r"ids.txt has byte 0xff at offset 5: expected a line CORPUS"
    ):
        named_documents([f"@{path}"])
    with pytest.raises(UserError, match="--remove=: expected CORPUS/ID of a document, or @FILE"):
        named_documents(["d/1", ""])
    path.write_text("c/a\nnothing\n")
    with pytest.raises(UserError, match=r"ids.txt:2 is 'nothing': expected CORPUS/ID"):
        named_documents([f"@{path}"])
    with pytest.raises(UserError, match=r"none cannot be read \(No such file"):
        named_documents([f"@{tmp_path / 'none'}"])
