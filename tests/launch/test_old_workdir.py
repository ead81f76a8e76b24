"""A workdir of the code before its folders were rebuilt opens, is evaluated and trains on.

tests/data/make_old_workdir.py says what it holds and how it was made. Users have such workdirs: a
change that breaks one of these tests breaks theirs. On the kind of machine that made the data every
bit is the same; elsewhere losses agree to 1e-6, parameters to 1e-5 of the largest. The last state's
bits are those since the gradients of relative positions are summed in float32; the old code's agree as
elsewhere.
"""

import json
import pathlib
import shutil
import tarfile

import numpy as np
import pytest

from launch import evaluate, prepare, report, sample, train
from tests.data import make_old_workdir as made
from tests.launch.trained import call

DATA = pathlib.Path(made.__file__).parent
KEPT = json.loads((DATA / f"{made.NAME}.json").read_text())
GIN = "--gin_file=settings.gin"
BM25 = "--gin_bindings=NeighboursConfig.retriever='bm25'"
# Made of whole numbers only: the same on any machine.
EXACT = ("documents", "leakage", "tokenizer", "chunks", "duplicates")


@pytest.fixture(name="old")
def _old(tmp_path, monkeypatch):
    """The folder that holds W and B, which is also where the entry points are run."""
    with tarfile.open(DATA / f"{made.NAME}.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / made.NAME)
    return tmp_path / made.NAME


@pytest.fixture(name="exact")
def _exact():
    """Whether this is the kind of machine on which bits are the same."""
    return made.machine() == KEPT["machine"]


def _files(folder):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _known(found, kept):
    """What is found under the names that were kept: later code may say more."""
    return {name: found.get(name) for name in kept}


def test_every_artefact_is_as_it_was_made(old, capsys):
    assert made.manifest_hashes(old) == KEPT["manifests"]
    for workdir in ("W", "B"):
        verify = ["--verify", "--verify_sample=20"]
        assert call(prepare.main, f"--workdir={workdir}", *verify) == 0
        lines = capsys.readouterr().out.splitlines()
        looked_at = {f"{workdir}/{line.partition(':')[0]}" for line in lines}
        own = {name for name in KEPT["manifests"] if name.startswith(f"{workdir}/")}
        others = {name for name in own if name.startswith(("W/slices/", "W/materialised"))}
        assert own - others <= looked_at
        assert call(prepare.main, f"--workdir={workdir}", "--stats") == 0
    assert "bm25" in capsys.readouterr().out


def test_preparing_again_makes_nothing_and_elsewhere_the_same(old, exact, capsys):
    before = _files(old)
    assert call(prepare.main, "--workdir=W", GIN) == 0
    assert call(prepare.main, "--workdir=B", GIN, BM25) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 + 7
    assert all(line.endswith("(there already)") for line in lines)
    assert call(prepare.main, "--workdir=W", "--gin_file=more.gin", "--append") == 0
    assert "revision 1: nothing to change" in capsys.readouterr().out
    assert {path: data for path, data in _files(old).items() if path in before} == before

    assert call(prepare.main, "--workdir=again/W", GIN, "--materialise=2") == 0
    assert call(prepare.main, "--workdir=again/B", GIN, BM25) == 0
    again = made.manifest_hashes(old / "again")
    kept = {name: hash for name, hash in KEPT["manifests"].items() if name in again}
    assert len(again) == len(kept) == 17 + 13
    # BM25's files have parts now: what was found by them is the same.
    since = {name for name in kept if name.startswith(("B/bm25", "B/neighbours"))}
    stages = [name for name in kept if exact or name.split("/")[1] in EXACT]
    stages = [name for name in stages if name not in since]
    assert len(stages) == (26 if exact else 18)
    assert {name: again[name] for name in stages} == {name: kept[name] for name in stages}
    for split in ("train", "validation", "test"):
        one, other = (
            {path.name: np.load(path) for path in (folder / f"B/neighbours/{split}").glob("*.npy")}
            for folder in (old, old / "again")
        )
        assert one.keys() == other.keys() and one
        for name, array in one.items():
            if name.startswith("neighbours"):
                np.testing.assert_array_equal(array, other[name])
            else:
                np.testing.assert_allclose(array, other[name], rtol=1e-6)


def test_figures_are_found_and_those_computed_anew_are_the_same(old, exact, capsys):
    folder = old / "W" / "evaluation"
    kept = _files(folder)
    later = ("documents.npz", "cost.svg")
    sums = {folder / f"{split}-{name}" for split in KEPT["evaluation"] for name in later}
    slices = ["--slices=own", "--bert_folder=bert"]
    for more in ([], slices):
        assert call(evaluate.main, "--workdir=W", *more) == 0
    # An ID of other digits would be another file.
    assert _files(folder).keys() == kept.keys() | sums
    shutil.rmtree(folder)
    for more in ([], slices):
        assert call(evaluate.main, "--workdir=W", *more) == 0
    found = _files(folder)
    assert found.keys() == kept.keys() | sums
    for split, conditions in KEPT["evaluation"].items():
        results = made.figures(folder / f"{split}.json")
        assert results.keys() == conditions.keys()
        for name, figures in conditions.items():
            assert results[name] == pytest.approx(figures, rel=1e-6)
    if exact:
        arrays = [path for path in kept if path.suffix == ".npy"]
        assert len(arrays) == 2 * 3 + 2  # losses by condition, and runs that neighbours share
        assert _known(found, arrays) == _known(kept, arrays)


def test_training_goes_on_where_it_was(old, exact, capsys):
    run = old / "W" / "retro"
    assert call(train.main, "--workdir=W", GIN) == 0
    assert "going on from step 4 of 8" in capsys.readouterr().out
    lines, arrays = made.read_lines(run / "metrics.jsonl"), made.read_arrays(old / made.LAST)
    assert len(arrays) == KEPT["arrays"]
    for found, kept in zip(lines, KEPT["lines"], strict=True):
        assert _known(found, kept) == pytest.approx(kept, rel=1e-6)
    with np.load(DATA / f"{made.NAME}.npz") as params:
        for name in params.files:
            most = np.abs(params[name]).max()
            np.testing.assert_allclose(arrays[name], params[name], atol=1e-5 * most, err_msg=name)
    if exact:
        assert made.digest(arrays) == KEPT["sha256"]
    assert call(train.main, "--workdir=W", GIN) == 0
    assert "trained already, 8 steps" in capsys.readouterr().out


def test_settings_are_read_as_they_were_written(old, capsys):
    four = "--gin_bindings=TrainConfig.steps=4"
    assert call(train.main, "--workdir=W", GIN, "--baseline", four) == 0
    assert "trained already, 4 steps" in capsys.readouterr().out
    recorded = set((old / "W" / "retro" / "config.gin").read_text().splitlines())
    for data in ("W", "W/materialised"):
        assert call(train.main, "--workdir=W", f"--data={data}", GIN, "--print_config") == 0
        assert recorded <= set(capsys.readouterr().out.splitlines())


def test_samples_are_found_and_the_report_shows_all(old, capsys):
    (path,) = (old / "W" / "samples").glob("*.json")
    kept = json.loads(path.read_text())
    arguments = ["--workdir=W", "--data=B", f"--prompt={kept['prompts'][0]}"]
    assert call(sample.main, *arguments, "--max_tokens=70") == 0
    assert [path] == list((old / "W" / "samples").glob("*.json"))
    for split in ("test", "own"):
        assert call(report.main, "--workdir=W", f"--split={split}") == 0
    page = (old / "W" / "report.html").read_text(encoding="utf-8")
    assert "lighthouse keeper" in page
    # Once more, by BM25 of the chunks that are there.
    path.unlink()
    assert call(sample.main, *arguments, "--max_tokens=70") == 0
    (again,) = json.loads(path.read_text())["samples"]
    (before,) = kept["samples"]
    assert again["tokens"] == before["tokens"]
    assert again["log_probabilities"] == pytest.approx(before["log_probabilities"], rel=1e-5)
