"""launch.prepare with retriever = 'bm25': without a key, updated, checked, shown, and asked live."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pytest

from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.evaluation import prepare_text
from data_pipelines.evaluation.database_share import check_shares, kept_chunks, subsampled
from data_pipelines.evaluation.splits import open_split
from data_pipelines.evaluation.texts import SliceConfig
from data_pipelines.live.database import LiveDatabases
from data_pipelines.retriever.bm25 import Bm25
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir import update
from data_pipelines.workdir.served_documents import change_documents
from launch import prepare
from launch.common import configurables
from retro_jax.errors import UserError
from tests.conftest_prepared import run_prepare
from tests.data_pipelines import planted

BM25 = "--gin_bindings=NeighboursConfig.retriever = 'bm25'"


def lines(texts):
    """JSON lines of {id: text}."""
    return "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in texts.items())


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir of 40 documents that share words by twos, prepared by BM25 alone."""
    folder = tmp_path_factory.mktemp("bm25")
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(200)]
    texts = {f"d{i}": " ".join(rng.choice(words[5 * (i // 2) :], 60)) for i in range(40)}
    (folder / "texts.jsonl").write_text(lines(texts))
    (folder / "texts.gin").write_text(
        "texts/CorpusConfig.name = 'texts'\n"
        "texts/CorpusConfig.kind = 'jsonl'\n"
        f"texts/CorpusConfig.path = {str(folder / 'texts.jsonl')!r}\n"
        "texts/CorpusConfig.id_field = 'id'\n"
        "DocumentsConfig.corpora = (@texts/CorpusConfig(),)\n"
        "DocumentsConfig.validation = 0.1\n"
        "DocumentsConfig.test = 0.1\n"
        "TokenizerConfig.vocab_size = 330\n"
        "NeighboursConfig.recall_queries = 20\n"
    )
    assert run_prepare(folder / "W", folder / "texts.gin", BM25) == 0
    return folder / "W"


def check_tables(workdir, retriever):
    """Every split's table is what the retriever finds, and of other documents."""
    database = retriever.database
    for split in SPLITS:
        chunks = workdir / "chunks" / split
        queries = database if split == "train" else ChunkDatabase.open(chunks)
        table = NeighbourTable.of(workdir, split, queries, database)
        ids = np.arange(len(queries))
        own = queries.documents(ids) if split == "train" else np.full(len(ids), -1)
        found, scores = retriever.neighbours(queries.chunks(ids), table.k, own)
        live = ~database.is_removed(own)  # rows of removed chunks are nobody's
        np.testing.assert_array_equal(table.ids(ids)[live], found[live])
        np.testing.assert_array_equal(table.scores(ids)[live], scores[live])
        assert table.score == table.retriever == "bm25"
        assert not database.is_removed(database.documents(found)).any()
        assert (np.diff(np.where(found < 0, -1, scores), axis=1) <= 0).all()


def test_tables_are_made_without_keys_and_equal_live_retrieval(workdir, capsys):
    assert not (workdir / "keys").exists() and not (workdir / "index").exists()
    check_tables(workdir, Retriever.open(workdir))
    assert run_prepare(workdir, workdir.parent / "texts.gin", BM25) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in out][-2:] == ["bm25", "neighbours"]
    assert all(line.endswith("(there already)") for line in out)
    assert run_prepare(workdir, None, "--stats") == 0
    rows = capsys.readouterr().out
    assert "retriever" in rows and "nearest: median BM25" in rows


def test_verify_finds_what_is_wrong(workdir, capsys):
    assert run_prepare(workdir, None, "--verify", "--verify_sample=9") == 0
    out = capsys.readouterr().out
    assert "neighbours/train: " in out and "made from chunks/train and chunks/train and bm25" in out
    assert (
        "neighbours/test again: 9 chunks searched, equal; recall 1.000; the manifest has recall 1.000"
        in out
    )
    path = workdir / "neighbours/test/scores-00000.npy"
    data = path.read_bytes()
    np.save(path, np.load(path) * 1.01)
    try:
        assert run_prepare(workdir, None, "--verify", "--verify_sample=9") == 1
        assert "searching again finds" in capsys.readouterr().out
    finally:
        path.write_bytes(data)


def test_another_retriever_is_refused(workdir, capsys):
    for binding, message in (
        ("'dense+bm25'", "W/keys/train has no manifest.json"),
        ("'bm26'", "NeighboursConfig.retriever is 'bm26': expected one of ('dense', 'bm25'"),
    ):
        flags = f"--gin_bindings=NeighboursConfig.retriever = {binding}"
        stages = "--stages=neighbours"
        assert run_prepare(workdir, workdir.parent / "texts.gin", flags, stages) == 1
        assert message in capsys.readouterr().err
    flags = "--gin_bindings=NeighboursConfig.retriever = 'dense'"
    assert run_prepare(workdir, None, flags, "--append") == 1
    assert "retriever is 'dense': expected 'bm25', by which" in capsys.readouterr().err


def test_slices_use_the_same_retriever(workdir, tmp_path):
    (tmp_path / "slice.jsonl").write_text(lines({"s": "word1 word150 word199 " * 40}))
    name = prepare_text.prepare_slice(workdir, SliceConfig("own", str(tmp_path / "slice.jsonl")))
    split = open_split(workdir, name, neighbours=3)
    assert split.table.retriever == "bm25"
    found, _ = Retriever.open(workdir).neighbours(split.database.chunks(split.ids), 3)
    np.testing.assert_array_equal(split.table.ids(split.ids, 3), found)
    check_share(workdir, split, tmp_path)


def check_share(workdir, split, folder):
    """The neighbours from half of the documents are the best of this half, every chunk scored."""
    mask, tokens = kept_chunks(split, 0.5), split.database.chunks(split.ids)
    assert 0 < mask.sum() < len(mask)
    scores = Bm25.open(workdir / "bm25", split.retrieval).score(
        tokens, np.tile(np.flatnonzero(mask), (len(tokens), 1))
    )
    found = subsampled(split, 0.5, 9, folder=folder, data=workdir)
    for row, best in zip(scores, found, strict=True):
        order = np.lexsort((np.flatnonzero(mask), -row))[:9]
        wanted = np.where(row[order] > 0, np.flatnonzero(mask)[order], -1)
        np.testing.assert_array_equal(best, wanted)
    check_shares(split)
    table = types.SimpleNamespace(retriever="dense+bm25", directory="T")
    with pytest.raises(
        UserError, match=r"T was made by .* 'dense.bm25': expected 'dense' or 'bm25'"
    ):
        check_shares(dataclasses.replace(split, table=table))


def test_a_killed_removal_is_repeated_or_replaced(workdir, tmp_path, capsys, monkeypatch):
    work = shutil.copytree(workdir, tmp_path / "W")
    database = ChunkDatabase.open(work / "chunks/train")
    first, second = (
        f"--remove={r.corpus}/{r.id}" for r in (database.record(0), database.record(1))
    )
    finish = Stage.finish

    class Killed(BaseException):
        pass

    def killed(self, *arguments, **more):
        if self.kind == "database":
            raise Killed
        return finish(self, *arguments, **more)

    for again in (first, second):
        monkeypatch.setattr(Stage, "finish", killed)
        with pytest.raises(Killed):
            run_prepare(work, None, first)
        monkeypatch.setattr(Stage, "finish", finish)
        assert (work / "revisions").is_dir()
        assert run_prepare(work, None, again) == 0
        assert "0 documents added, 1 removed" in capsys.readouterr().out
        assert not Retriever.open(work).database.is_removed(np.array([2]))
        shutil.rmtree(work / "revisions")
    begun = work / "revisions/00001/documents/train"
    begun.mkdir(parents=True)
    (begun / "stage.json").write_text("{}")
    assert run_prepare(work, None, first) == 1
    assert "is unfinished: expected --append, which began it, first" in capsys.readouterr().err


def test_documents_that_come_while_a_database_is_open(workdir, tmp_path, monkeypatch):
    """A change that fails leaves nothing behind; a revision that is taken back is left again."""
    work = shutil.copytree(workdir, tmp_path / "W")
    configurables.load(None, base=str(work / "prepare.gin"))
    config = prepare.make_config()
    databases = LiveDatabases(work)
    before, chunk = databases.newest(), np.full((1, 64), 0, np.int32)
    words = databases.tokenizer.encode("quokka wombat " * 30)[:64]
    chunk[0, : len(words)] = words
    assert not databases.refresh()
    with pytest.raises(UserError, match=r"no document 'none' of the corpus 'texts'"):
        change_documents(work, config, "texts", [("a", "b")], ["texts/none"])
    with monkeypatch.context() as patch:
        patch.setattr(update, "prepare_chunks", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            change_documents(work, config, "served", [("a", "quokka wombat " * 30)], [])
    assert not (work / "revisions/00001").exists()
    lines = change_documents(work, config, "served", [("a", "quokka wombat " * 30)], [])
    assert any(line.startswith("revision 1: 1 documents added") for line in lines)
    assert databases.newest() is before and databases.refresh()
    ids, scores = databases.newest().find(chunk, 2)
    found = databases.newest().neighbour(int(ids[0, 0]), float(scores[0, 0]))
    assert (found.corpus, found.document, found.revision) == ("served", "a", 1)
    # Any of its seven chunks is the best one, as all repeat the same words.
    assert 0 <= found.place < 7 and found.text in "quokka wombat " * 30
    assert found.score == scores[0, 0]
    assert before.revision == 0 and ids[0, 0] not in before.find(chunk, 2)[0]
    assert databases.at(0) is before
    (work / "revisions").rename(work / "aside")
    assert databases.refresh() and databases.newest() is before
    with pytest.raises(UserError, match=r"revision 1 of W is gone .* expected 0 to 0"):
        databases.at(1)


def test_an_update_counts_the_new_database_s_terms(workdir, tmp_path, capsys):
    texts = {"new": planted.text("word"), "other": "word1 word2 " * 30}
    (tmp_path / "more.jsonl").write_text(lines(texts))
    path = f"--gin_bindings=texts/CorpusConfig.path = {str(tmp_path / 'more.jsonl')!r}"
    split = "--gin_bindings=texts/CorpusConfig.split = 'train'"
    database = ChunkDatabase.open(workdir / "chunks/train")
    gone = database.record(3)
    remove = f"--remove={gone.corpus}/{gone.id}"
    assert run_prepare(workdir, None, path, split, "--append", remove) == 0
    assert "revision 1: 2 documents added, 1 removed" in capsys.readouterr().out
    retriever = Retriever.open(workdir)
    check_tables(workdir, retriever)
    terms = Bm25.open(workdir / "revisions/00001/bm25", retriever.database)
    assert terms.manifest.fact("indexed") > terms.manifest.fact("chunks") - gone.chunks - 10
    assert not (workdir / "revisions/00001/keys").exists()
    assert run_prepare(workdir, None, "--verify", "--verify_sample=5") == 0
    assert "revisions/00001/bm25: " in capsys.readouterr().out
