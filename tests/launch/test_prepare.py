"""launch.prepare: every stage on a slice of the real corpora, run again, killed, and misused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from data_pipelines.batches.batches import BatchConfig, Batches
from data_pipelines.batches.training_data import open_training_data, revision_of
from data_pipelines.chunk_database.database import ChunkDatabase
from data_pipelines.corpora import SPLITS
from data_pipelines.evaluation import prepare_text, splits
from data_pipelines.evaluation.texts import SliceConfig
from data_pipelines.retriever.neighbour_table import NeighbourTable
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir.stages import ALL_STAGES, only_one
from retro_jax.errors import UserError
from tests.conftest_prepared import run_prepare, write_slice

DENSE = [name for name in ALL_STAGES if name != "bm25"]  # what runs by default
PLACES = [place for name in DENSE for place in ALL_STAGES[name].places]
# So few documents that a run from the start takes seconds.
TINY = (
    "wikipedia/CorpusConfig.max_documents = 12",
    "python/CorpusConfig.max_documents = 4",
    "python/CorpusConfig.max_bytes = 8_000",
    "TokenizerConfig.vocab_size = 400",
)


def artefacts(workdir):
    """Every file of every stage, by relative name."""
    files = [path for place in PLACES for path in (workdir / place).rglob("*") if path.is_file()]
    return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in files}


def refused(capsys, *arguments):
    """What prepare prints when it refuses, which is one line."""
    assert run_prepare(*arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def start(workdir, settings):
    """launch.prepare in a process of its own."""
    command = [sys.executable, "-m", "launch.prepare"]
    command += [f"--workdir={workdir}", f"--gin_file={settings}"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_every_stage_has_run(prepared_workdir):
    for place in PLACES:
        assert (prepared_workdir / place / MANIFEST_FILE).is_file()
    assert "DocumentsConfig.test = 0.2" in (prepared_workdir / "prepare.gin").read_text()
    versions = json.loads((prepared_workdir / "versions.json").read_text())
    assert "scann" in versions["starts"][-1]["packages"]
    held = {}
    for split in SPLITS:
        database = ChunkDatabase.open(prepared_workdir / "chunks" / split)
        assert set(database.corpora) == {"python", "wikipedia"}
        held[split] = {(record.corpus, record.id) for record in database.records()}
    assert len(set().union(*held.values())) == sum(map(len, held.values())) > 60


def test_neighbours_are_other_documents_of_the_training_split(prepared_workdir):
    train = ChunkDatabase.open(prepared_workdir / "chunks" / "train")
    for split in SPLITS:
        queries = ChunkDatabase.open(prepared_workdir / "chunks" / split)
        table = NeighbourTable.open(prepared_workdir / "neighbours" / split, queries, train)
        ids = table.ids(np.arange(len(queries)))
        assert np.mean(ids >= 0) > 0.95
        if split == "train":
            own = queries.documents(np.arange(len(queries)))
            assert not np.any(train.documents(ids) == own[:, None])
        assert table.manifest.fact("recall")["recall"] > 0.95


@pytest.mark.parametrize("mixture", [None, {"python": 3.0, "wikipedia": 1.0}])
def test_batches_of_the_real_artefacts(prepared_workdir, mixture):
    train = ChunkDatabase.open(prepared_workdir / "chunks" / "train")
    table = NeighbourTable.open(prepared_workdir / "neighbours" / "train", train, train)
    config = BatchConfig(sequence_length=512, batch_size=8, neighbours=2, mixture=mixture)
    batches = Batches(config, train, table, train)
    for step, batch in zip(range(3, 5), batches.iterate(3)):
        expected = batches.rows(step)
        np.testing.assert_array_equal(batch.neighbours, expected.neighbours)
        assert batch.neighbours.shape == (8, 8, 2, 128)
        assert batch.neighbours.dtype == batch.tokens.dtype == np.int32
        assert batch.tokens.max() < train.vocab_size


def test_run_again_it_makes_nothing_and_imports_no_tensorflow(prepared_workdir):
    before = artefacts(prepared_workdir)
    code = (
        "import sys; from launch import prepare; from launch.common import app; "
        "status = app.execute(prepare.main, sys.argv); "
        "sys.exit(status or bool({'tensorflow', 'scann'} & set(sys.modules)))"
    )
    settings = prepared_workdir.parent / "slice.gin"
    flags = [f"--workdir={prepared_workdir}", f"--gin_file={settings}"]
    run = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == DENSE
    assert all(line.endswith("(there already)") for line in lines)
    assert artefacts(prepared_workdir) == before


def test_stats(prepared_workdir, capsys):
    assert run_prepare(prepared_workdir, None, "--stats") == 0
    rows = {line[:25].strip(): line[25:].split() for line in capsys.readouterr().out.splitlines()}
    database = ChunkDatabase.open(prepared_workdir / "chunks" / "train")
    counts = [len(part) for ranges in database.corpora.values() for part in ranges]
    assert [rows["python: chunks"][0], rows["wikipedia: chunks"][0]] == [f"{n:,}" for n in counts]
    assert rows["neighbours a chunk"] == ["4", "10", "10"]
    assert rows["slots filled"] == ["100.0%"] * 3
    assert rows["nearest: median distance"][0] > rows["nearest: 5 % distance"][0]
    assert all(50 < float(share[:-1]) <= 100 for share in rows["of the same corpus"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Settings and artefacts of a preparation that nobody disturbed."""
    folder = tmp_path_factory.mktemp("tiny")
    settings = write_slice(folder, *TINY)
    assert run_prepare(folder / "W", settings) == 0
    return settings, artefacts(folder / "W")


def test_killed_again_and_again_it_ends_as_an_undisturbed_one(tiny, tmp_path):
    settings, expected = tiny
    workdir = tmp_path / "W"
    for marker in ("documents/.spill", "keys/train/stage.json", "neighbours/train/stage.json"):
        process = start(workdir, settings)
        while not (workdir / marker).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert not (workdir / marker).parent.joinpath(MANIFEST_FILE).exists()
    process = start(workdir, settings)
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert artefacts(workdir) == expected


def test_some_stages_only(tiny, tmp_path, capsys):
    settings, expected = tiny
    workdir = tmp_path / "W"
    assert "W/documents/train has no manifest.json" in refused(
        capsys, workdir, settings, "--stages=chunks,tokenizer"
    )
    assert run_prepare(workdir, settings, "--stages=tokenizer,documents") == 0
    assert not (workdir / "chunks").exists()
    made = artefacts(workdir)
    assert made == {name: data for name, data in expected.items() if name in made}
    assert "tokenizer/manifest.json" in made


def test_other_settings_are_refused(tiny, tmp_path, capsys):
    settings, _ = tiny
    workdir = tmp_path / "W"
    stages = "--stages=documents,tokenizer"
    assert run_prepare(workdir, settings, stages) == 0
    before = artefacts(workdir)
    capsys.readouterr()
    error = refused(
        capsys, workdir, settings, stages, "--gin_bindings=TokenizerConfig.vocab_size = 500"
    )
    assert "tokenizer was made with other settings: vocab_size: 400 -> 500" in error
    assert artefacts(workdir) == before


def _more_documents(folder: pathlib.Path, held_out: str) -> pathlib.Path:
    """Settings, over those that W was prepared with, of a corpus with a new text and a held-out one."""
    lines = [
        json.dumps({"id": "copy", "text": held_out}),
        json.dumps({"id": "new", "text": "A text that nobody has read."}),
    ]
    (folder / "more.jsonl").write_text("\n".join(lines))
    (folder / "more.gin").write_text(
        "wikipedia/CorpusConfig.max_documents = 18\n"
        "corpora = (@wikipedia/CorpusConfig(), @python/CorpusConfig(), @more/CorpusConfig())\n"
        "DocumentsConfig.corpora = %corpora\n"
        "more/CorpusConfig.name = 'more'\n"
        "more/CorpusConfig.kind = 'jsonl'\n"
        f"more/CorpusConfig.path = {str(folder / 'more.jsonl')!r}\n"
        "more/CorpusConfig.id_field = 'id'\n"
        "more/CorpusConfig.split = 'train'\n"
    )
    return folder / "more.gin"


def test_documents_are_appended_and_removed(tiny, tmp_path, capsys):
    settings, expected = tiny
    workdir = shutil.copytree(settings.parent / "W", tmp_path / "W")
    before = ChunkDatabase.open(workdir / "chunks" / "train")
    kept, *_, gone = before.records()
    held_out = json.loads(
        (workdir / "documents/test/documents-00000.jsonl").read_bytes().split(b"\n")[0]
    )
    more = _more_documents(tmp_path, held_out["text"])
    (tmp_path / "mine.jsonl").write_text('{"text": "A lobster is a crustacean."}\n')
    prepare_text.prepare_slice(workdir, SliceConfig("mine", str(tmp_path / "mine.jsonl")))
    capsys.readouterr()
    withdraw = f"--remove={gone.corpus}/{gone.id}"
    unknown = refused(capsys, workdir, None, "--remove=wikipedia/Nobody")
    assert "holds no document 'Nobody' of the corpus 'wikipedia': expected one" in unknown
    assert "--remove=Nobody: expected CORPUS/ID" in refused(
        capsys, workdir, None, "--remove=Nobody"
    )
    assert run_prepare(workdir, more, "--append", withdraw) == 0
    out = capsys.readouterr().out
    assert "documents added, 1 removed" in out
    assert (
        f"withdrawn, 13-gram similarity from 0.8 (1 of more near test {held_out['corpus']}" in out
    )
    assert "have a near-duplicate among training chunks" in out
    assert artefacts(workdir) == expected, "what earlier runs read stays as it is"
    retriever = Retriever.open(workdir)
    database = retriever.database
    names = [(record.corpus, record.id) for record in database.records()]
    assert names[0] == (kept.corpus, kept.id)
    assert database.removed.tolist() == [before.num_documents - 1]
    assert names.count((gone.corpus, gone.id)) == 2, "its corpus holds it still: it was replaced"
    assert len(set(names)) == len(names) - 1 > before.num_documents
    assert ("more", "new") in names and ("more", "copy") not in names
    for split in SPLITS:
        queries = database if split == "train" else ChunkDatabase.open(workdir / "chunks" / split)
        table = NeighbourTable.of(workdir, split, queries, database)
        assert table.manifest.revision == 1
        ids = table.ids(np.arange(len(queries)))
        assert not database.is_removed(database.documents(ids)).any()
        assert (ids >= len(before)).any(), "what is new is found"
    with pytest.raises(
        UserError, match=r"neighbours-00001 is missing: .* revision 1 now; expected"
    ):
        splits.open_split(workdir, "mine", neighbours=1)
    prepare_text.prepare_slice(workdir, SliceConfig("mine"))
    table = splits.open_split(workdir, "mine", neighbours=1).table
    assert (table.manifest.revision, table.directory.name) == (1, "neighbours-00001")
    found, _ = retriever.neighbours(database.chunks(np.array([len(before)])), 1)
    assert found.tolist() == [[len(before)]]
    for again in (["--append"], [f"--gin_file={more}", "--append"]):
        assert run_prepare(workdir, None, *again) == 0
        assert "revision 1: nothing to change" in capsys.readouterr().out
    assert not (workdir / "revisions" / "00002").exists()
    assert run_prepare(workdir, None, "--verify", "--verify_sample=5") == 0
    lines = capsys.readouterr().out
    assert "revisions/00001/database: 1 files" in lines
    assert "revisions/00001/leakage again: 1 withdrawn documents compared, equal" in lines
    assert "revisions/00001/neighbours/test: " in lines


def test_the_nearest_keys_are_judged_by_bm25_in_tables_and_live(tiny, tmp_path, capsys):
    settings, _ = tiny
    workdir = shutil.copytree(settings.parent / "W", tmp_path / "W")
    shutil.rmtree(workdir / "neighbours")
    names = ("retriever = 'dense+bm25'", "candidates = 30", "test = 4")
    bindings = [f"--gin_bindings=NeighboursConfig.{name}" for name in names]
    assert run_prepare(workdir, settings, *bindings) == 0
    retriever = Retriever.open(workdir)
    assert (retriever.ranking.retriever, retriever.ranking.candidates) == ("dense+bm25", 30)
    queries = ChunkDatabase.open(workdir / "chunks" / "test")
    table = NeighbourTable.of(workdir, "test", queries, retriever.database)
    ids = np.arange(len(queries))
    found, scores = retriever.neighbours(queries.chunks(ids), 4)
    np.testing.assert_array_equal(found, table.ids(ids))
    np.testing.assert_array_equal(scores, table.scores(ids))
    near, _ = retriever.index.search(retriever.encoder.keys(queries.chunks(ids)), 30)
    assert all(set(row) <= set(nearest) for row, nearest in zip(found.tolist(), near.tolist()))
    assert run_prepare(workdir, None, "--verify", "--verify_sample=5") == 0
    assert "chunks/train and keys/train and index and bm25" in capsys.readouterr().out


def test_training_begins_with_the_newest_revision_and_stays_with_its_own(tiny, tmp_path):
    workdir = shutil.copytree(tiny[0].parent / "W", tmp_path / "W")
    first = next(ChunkDatabase.open(workdir / "chunks" / "train").records())
    config = BatchConfig(sequence_length=64, batch_size=2)
    before = open_training_data(workdir, config)
    assert run_prepare(workdir, None, f"--remove={first.corpus}/{first.id}") == 0
    after = open_training_data(workdir, config)
    assert after.database.removed.tolist() == [0]
    assert after.parents["chunks/train"] == before.parents["chunks/train"]
    assert after.parents["neighbours/train"] != before.parents["neighbours/train"]
    assert open_training_data(workdir, config, 0).parents == before.parents
    for revision, parents in enumerate((before.parents, after.parents)):
        assert revision_of(workdir, parents) == revision


def test_training_reads_materialised_batches_as_it_reads_the_tables(tiny, tmp_path, capsys):
    workdir = shutil.copytree(tiny[0].parent / "W", tmp_path / "W")
    settings = "BatchConfig.sequence_length = 128", "BatchConfig.batch_size = 2"
    flags = [f"--gin_bindings={binding}" for binding in settings]
    assert run_prepare(workdir, tiny[0], "--materialise=5", *flags) == 0
    assert "materialised: 10 sequences of 5 steps" in capsys.readouterr().out
    for neighbours in (2, 0):
        config = BatchConfig(sequence_length=128, batch_size=2, neighbours=neighbours)
        tables, written = (
            open_training_data(place, config) for place in (workdir, workdir / "materialised")
        )
        assert written.parents == tables.parents
        assert revision_of(workdir / "materialised", written.parents) is None
        for step in range(5):
            one, other = (data.batches.rows(step) for data in (tables, written))
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.neighbours, other.neighbours)


def test_one_preparation_at_a_time(tiny, tmp_path, capsys):
    with only_one(tmp_path):
        error = refused(capsys, tmp_path, tiny[0])
    assert f"{tmp_path} is being prepared by another process: expected none" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages=documents,chunk"], "--stages=chunk: expected some of documents,leakage"),
        (["--stages="], "--stages is empty: expected some of documents"),
        (["--processes=0"], "processes"),
        (["--gin_bindings=TokenizerConfig.vocab = 1"], "'vocab'"),
        (["--gin_bindings=DocumentsConfig.test = 2.0"], "DocumentsConfig.test is 2.0"),
        (["--stats", "--verify"], "--stats and --verify: expected one of them"),
        (["--stats", "--print_config"], "--stats and --print_config: expected one of them"),
        (["--verify", "--purge"], "--verify and --purge: expected one of them"),
        (["--questions=a=b", "--remove=a/b"], "--questions and --remove: expected one of them"),
        (["--questions=a=b", "--append"], "--questions and --append: expected one of them"),
        (["--questions=a=b", "--materialise=2"], "--questions and --materialise: expected one"),
        (["--append", "--stages=documents"], "--append and --stages: expected one of them"),
        (["--remove=a/b", "--materialise=2"], "--remove and --materialise: expected one of them"),
        (["--compact", "--stages=index"], "--compact and --stages: expected one of them"),
        (["--questions=a=b", "--questions=a=c"], "--questions=a=c: expected another name than b's"),
        (["--stats"], "holds no chunk database: expected what launch.prepare makes"),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, arguments, message):
    assert message in refused(capsys, tmp_path / "W", write_slice(tmp_path), *arguments)
    assert not (tmp_path / "W").exists()


def test_corpora_must_be_given(tmp_path, capsys):
    assert "DocumentsConfig.corpora has no value" in refused(capsys, tmp_path / "W", None)


def test_bad_documents_are_named_or_skipped(tmp_path, capsys):
    corpus = tmp_path / "texts"
    corpus.mkdir()
    for i in range(30):
        (corpus / f"{i}.txt").write_bytes(b"a text \xff" if i == 7 else b"a text of some words")
    settings = tmp_path / "texts.gin"
    settings.write_text(
        "texts/CorpusConfig.name = 'texts'\n"
        "texts/CorpusConfig.kind = 'text'\n"
        f"texts/CorpusConfig.path = {str(corpus)!r}\n"
        "DocumentsConfig.corpora = (@texts/CorpusConfig(),)\n"
    )
    documents = "--stages=documents"
    error = refused(capsys, tmp_path / "W", settings, documents)
    assert "7.txt has byte 0xff at offset 7: expected UTF-8" in error
    assert run_prepare(tmp_path / "W", settings, documents, "--skip_bad_documents") == 0
    assert "left out: 1 bad" in capsys.readouterr().out


def test_help_says_how_to_use_it():
    command = [sys.executable, "-m", "launch.prepare", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert "python -m launch.prepare --gin_file=" in run.stdout
    for flag in ("--stages", "--gin_file", "--workdir", "--stats", "--processes"):
        assert flag in run.stdout
    assert pathlib.Path("experiments/quickstart.gin").is_file()
