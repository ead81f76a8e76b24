"""Withdrawn documents: those at or above the threshold and no others, against brute force."""

import json

import numpy as np
import pytest

from data_pipelines.artefacts.manifest import Manifest
from data_pipelines.artefacts.runner import LocalProcesses
from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.database import ChunkDatabase, prepare_chunks
from data_pipelines.chunk_database.tokenizer import train_tokenizer
from data_pipelines.leakage import near_documents
from data_pipelines.leakage.near_documents import LeakageConfig, prepare_leakage, read_withdrawn
from retro_jax.errors import UserError
from tests.data_pipelines import planted
from tests.data_pipelines.small import TOKENIZER, tree

TRAINING = {
    "at": planted.text("a", changed=10),  # 80 of 100 grams
    "above": planted.text("a", changed=9),
    "below": planted.text("a", changed=11),
    "equal": planted.text("b"),
    "equal-again": planted.text("b"),
    "spaced": planted.text("b").replace(" ", "\n "),
    "short": "def f(): pass",
    "short-other": "def g(): pass",
    "none": planted.text("n"),
    "half": planted.text("t", words=60),
}
HELD_OUT = {
    "validation": {"v": planted.text("a"), "v2": "def f(): pass", "v3": planted.text("b")},
    "test": {"t": planted.text("t", words=120), "t2": planted.text("b")},
}


def find(folder, documents, *, threshold=0.8, name="leakage", **more):
    held_out = {split: documents / split for split in HELD_OUT}
    config = LeakageConfig(threshold)
    return prepare_leakage(folder / name, documents / "train", held_out, config, **more)


def lines(folder, manifest):
    """Everything withdrawn, by id."""
    every = [line for i in range(len(manifest.shards)) for line in read_withdrawn(folder, i)]
    return {line["id"]: line for line in every}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return planted.write(folder, {"train": TRAINING, **HELD_OUT}, shard_bytes=900)


def test_documents_at_the_threshold_go_and_below_it_stay(tmp_path, documents):
    manifest = find(tmp_path, documents)
    found = lines(tmp_path / "leakage", manifest)
    assert set(found) == {"at", "above", "equal", "equal-again", "spaced", "short"}
    assert found["at"]["similarity"] == 0.8
    assert found["above"]["similarity"] == 81 / 99
    assert found["at"]["held_out"] == {"split": "validation", "corpus": "validation", "id": "v"}
    assert found["equal"]["held_out"]["id"] == "v3", "the first of equal ones"
    assert [found[name]["equal"] for name in ("equal", "spaced", "short")] == [True, False, True]
    facts = manifest.facts
    assert (facts["documents"], facts["withdrawn"], facts["equal"]) == (10, 6, 3)
    assert facts["duplicates"] == 1
    assert facts["held_out"] == 4, "each text once"
    assert facts["missed"] < 1e-6
    expected = {"corpus": "train", "split": "validation", "held_out_corpus": "validation"}
    assert facts["pairs"] == [expected | {"documents": 6}]
    assert len(manifest.shards) > 2, "the test should see several shards"
    held = [shard["documents"] for shard in Manifest.read(documents / "train").fact("shards")]
    gone = [len(list(read_withdrawn(tmp_path / "leakage", i))) for i in range(len(held))]
    assert facts["shards"] == [a - b for a, b in zip(held, gone, strict=True)]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_agrees_with_brute_force(tmp_path, threshold):
    rng = np.random.default_rng(4)
    bases = [planted.text(f"w{i}.", words=int(rng.integers(5, 200))) for i in range(12)]
    other = planted.text("z", words=200)
    held_out = {f"h{i}": planted.mutated(rng, base, other) for i, base in enumerate(bases * 2)}
    training = {f"d{i}": planted.mutated(rng, base, other) for i, base in enumerate(bases * 8)}
    training["none"] = "nothing like it"
    splits = {"train": training, "validation": {}, "test": held_out}
    documents = planted.write(tmp_path, {k: v for k, v in splits.items() if v}, shard_bytes=9000)
    manifest = find(tmp_path, documents, threshold=threshold)
    found = lines(tmp_path / "leakage", manifest)
    expected = planted.nearest(training, held_out, threshold)
    assert 5 < len(expected) < len(training) - 5
    assert set(found) == set(expected)
    for name, (similarity, nearest) in expected.items():
        assert found[name]["similarity"] == float(similarity)
        assert found[name]["held_out"]["id"] in nearest


def test_chunks_leave_withdrawn_documents_out(tmp_path, documents):
    manifest = find(tmp_path, documents)
    gone = set(lines(tmp_path / "leakage", manifest))
    tokenizer = tmp_path / "tokenizer"
    train_tokenizer(tokenizer, documents / "train", TOKENIZER)
    for name, place in (("all", None), ("kept", tmp_path / "leakage")):
        prepare_chunks(tmp_path / name, documents / "train", tokenizer, leakage_directory=place)
    every, kept = (ChunkDatabase.open(tmp_path / name) for name in ("all", "kept"))
    names = [record.id for record in every.records() if record.id not in gone]
    assert [record.id for record in kept.records()] == names
    assert len(kept.shards) == len(every.shards)
    assert any(len(ids) == 0 for ids in kept.shards), "the test should see a shard without any left"
    wanted = [every.chunks(ids_of(record)) for record in every.records() if record.id in names]
    np.testing.assert_array_equal(kept.chunks(np.arange(len(kept))), np.concatenate(wanted))
    owners = [number for number, rows in enumerate(wanted) for _ in rows]
    assert kept.documents(np.arange(len(kept))).tolist() == owners
    assert kept.manifest.parents["leakage"] == manifest.hash
    assert "leakage" not in every.manifest.parents


def ids_of(record):
    return np.arange(record.first_chunk, record.first_chunk + record.chunks)


def test_is_the_same_after_a_kill_and_over_processes(tmp_path, documents, monkeypatch):
    class Killed(BaseException):
        pass

    find(tmp_path, documents)
    write, written = Stage.write_file, []

    def killed(self, name, *rest):
        if len(written) == 2:
            raise Killed
        written.append(name)
        return write(self, name, *rest)

    monkeypatch.setattr(Stage, "write_file", killed)
    with pytest.raises(Killed):
        find(tmp_path, documents, name="again")
    monkeypatch.undo()
    assert not (tmp_path / "again" / "manifest.json").exists()
    monkeypatch.setattr(near_documents, "_write_table", None)  # it is there already
    find(tmp_path, documents, name="again", runner=LocalProcesses(1))
    assert tree(tmp_path / "again") == tree(tmp_path / "leakage")


def test_other_thresholds_are_refused_and_nothing_is_made_twice(tmp_path, documents, monkeypatch):
    manifest = find(tmp_path, documents)
    with pytest.raises(UserError, match=r"other settings: threshold: 0\.8 -> 0\.9; expected"):
        find(tmp_path, documents, threshold=0.9)
    monkeypatch.setattr(near_documents, "_write_table", None)
    assert find(tmp_path, documents) == manifest
    assert str(tmp_path) not in json.dumps(manifest.facts)


def test_a_split_without_documents_is_compared_with(tmp_path):
    documents = planted.write(tmp_path, {"train": TRAINING})
    manifest = find(tmp_path, documents)
    assert (manifest.fact("withdrawn"), manifest.fact("held_out")) == (0, 0)
    assert manifest.fact("duplicates") == 1


@pytest.mark.parametrize("part", [1, 3, 100])
def test_duplicates_are_counted_in_parts(tmp_path, monkeypatch, part):
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, 1 << 64, 20, np.uint64) for _ in range(3)]
    texts[2][:7], texts[1][3] = texts[0][:7], texts[1][4]
    monkeypatch.setattr(near_documents, "_RANGE", part)
    for i, some in enumerate(texts):
        near_documents._write_texts(tmp_path, i, some.tolist())
    assert near_documents._count_duplicates(tmp_path, 3) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, "LeakageConfig.threshold is 0.0: expected above 0 and at most 1"),
        ({"threshold": 1.5}, "LeakageConfig.threshold is 1.5: expected above 0 and at most 1"),
        ({"permutations": 0}, "LeakageConfig.permutations is 0: expected a positive number"),
        ({"threshold": 0.1}, "LeakageConfig.permutations is 128: expected more, to miss less than"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        LeakageConfig(**settings)
