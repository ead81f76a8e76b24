"""launch.prepare withdraws near-copies of held-out documents, and reports, shows and checks it."""

import json
import shutil

import pytest

from data_pipelines.chunk_database.database import ChunkDatabase
from tests.conftest_prepared import run_prepare
from tests.data_pipelines import planted

STAGES = "--stages=documents,leakage,tokenizer,chunks,duplicates"
TRAINING = {
    "at": planted.text("a", changed=10),
    "below": planted.text("a", changed=11),
    "equal": planted.text("b"),
    **{f"other{i}": planted.text(f"o{i}.") for i in range(4)},
}
HELD_OUT = {"validation": {"v": planted.text("a")}, "test": {"t": planted.text("b")}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A workdir of planted documents up to its chunks, and its settings."""
    folder = tmp_path_factory.mktemp("near_copies")
    settings = ["TokenizerConfig.vocab_size = 320"]
    for split, texts in {"train": TRAINING, **HELD_OUT}.items():
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in texts.items()))
        fields = {"name": split, "kind": "jsonl", "path": str(path), "id_field": "id"}
        settings += [
            f"{split}/CorpusConfig.{n} = {v!r}" for n, v in (fields | {"split": split}).items()
        ]
    every = ", ".join(f"@{split}/CorpusConfig()" for split in ("train", *HELD_OUT))
    settings.append(f"DocumentsConfig.corpora = ({every})")
    (folder / "planted.gin").write_text("\n".join(settings))
    assert run_prepare(folder / "W", folder / "planted.gin", STAGES) == 0
    return folder / "W", folder / "planted.gin"


def test_the_report_says_what_was_withdrawn_and_why(prepared):
    workdir, _ = prepared
    names = [record.id for record in ChunkDatabase.open(workdir / "chunks/train").records()]
    assert set(names) == set(TRAINING) - {"at", "equal"}
    report = json.loads((workdir / "leakage.json").read_text())
    assert report["settings"]["threshold"] == 0.8
    assert report["withdrawn"] == [
        {
            "id": name,
            "corpus": "train",
            "similarity": similarity,
            "equal": similarity == 1,
            "held_out": {"split": split, "corpus": split, "id": split[0]},
        }
        for name, similarity, split in (("equal", 1.0, "test"), ("at", 0.8, "validation"))
    ]
    assert report["documents"]["withdrawn"] == 2
    near = report["chunks"]["held_out"]
    assert near["validation"]["near"] > 0, "the document just below the threshold stays"
    assert near["test"]["near"] == 0


def test_stats_and_verify_show_it(prepared, tmp_path, capsys):
    workdir = shutil.copytree(prepared[0], tmp_path / "W")
    assert run_prepare(workdir, None, "--stats") == 0
    rows = {line[:38].strip(): line[38:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["withdrawn documents, from 0.8"] == ["2", "-", "-"]
    assert rows["documents equal to others of the split"] == ["0", "-", "-"]
    assert rows["near-duplicate chunks"][0] == rows["near-duplicate chunks"][1] != "0"
    assert run_prepare(workdir, None, "--verify") == 0
    assert "leakage again: 2 withdrawn documents compared, equal" in capsys.readouterr().out
    shard = workdir / "leakage/withdrawn-00000.jsonl"
    shard.write_text(shard.read_text().replace("0.8", "0.9"))
    assert run_prepare(workdir, None, "--verify") == 1
    out = capsys.readouterr().out
    assert "leakage: WRONG: " in out
    assert "is said to be 0.9 similar to 'v': expected 0.8" in out


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        (
            "threshold = 0.7",
            "W/leakage was made with other settings: threshold: 0.8 -> 0.7; expected",
        ),
        ("threshold = None", "W/chunks/train was made with other settings: parent leakage: "),
        (
            "threshold = 2",
            "LeakageConfig.threshold is 2.0: expected above 0 and at most 1, or None",
        ),
    ],
)
def test_other_thresholds_are_refused(prepared, capsys, binding, message):
    workdir, settings = prepared
    bindings = f"--gin_bindings=LeakageConfig.{binding}"
    assert run_prepare(workdir, settings, STAGES, bindings) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_nothing_is_withdrawn_where_it_is_not_asked_for(prepared, tmp_path, capsys):
    _, settings = prepared
    off = "--gin_bindings=LeakageConfig.threshold = None"
    assert run_prepare(tmp_path / "W", settings, STAGES, off) == 0
    assert "leakage" not in capsys.readouterr().out
    database = ChunkDatabase.open(tmp_path / "W/chunks/train")
    assert database.num_documents == len(TRAINING)
    assert "leakage" not in database.manifest.parents
    assert run_prepare(tmp_path / "W", settings, STAGES) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "W/chunks/train was made of documents that were not compared with held-out" in error
    assert not (tmp_path / "W/leakage").exists()


def test_a_training_split_of_near_copies_alone_is_refused(prepared, tmp_path, capsys):
    _, settings = prepared
    same = "--gin_bindings=train/CorpusConfig.path = " + repr(str(settings.parent / "test.jsonl"))
    assert run_prepare(tmp_path / "W", settings, STAGES, same) == 1
    assert "all 1 training documents are near-copies of held-out ones" in capsys.readouterr().err
