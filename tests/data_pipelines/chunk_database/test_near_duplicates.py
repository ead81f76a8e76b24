"""Near-duplicate chunks are counted as comparing every pair counts them."""

import numpy as np
import pytest

from data_pipelines.artefacts.stage import Stage
from data_pipelines.chunk_database.near_duplicates import prepare_duplicates
from data_pipelines.leakage.near_documents import LeakageConfig
from retro_jax.errors import UserError
from tests.data_pipelines.small import tree
from tests.data_pipelines.synthetic import write_database


def grams(row):
    """The 13-grams of a chunk by definition."""
    tokens = [token for token in row.tolist() if token]
    return {tuple(tokens[i : i + 13]) for i in range(len(tokens) - 12)}


def planted(rng, bases, count):
    """Chunks that are mostly one of a few with a run of changed tokens, some of them cut short."""
    rows = []
    for _ in range(count):
        row = bases[rng.integers(len(bases))].copy()
        start, length = rng.integers(64), int(rng.choice([0, 0, 1, 2, 40]))
        row[start : start + length] = rng.integers(3, 300, len(row[start : start + length]))
        row[int(rng.choice([64, 64, 64, 30, 12])) :] = 0
        rows.append(row)
    return np.array(rows, np.uint16)


def database(folder, rows, shards=1):
    """A chunk database that holds these rows, one a document."""
    made = write_database(folder, [1] * len(rows), shards=shards)
    for number, ids in enumerate(made.shards):
        np.save(folder / f"chunks-{number:05d}.npy", rows[ids.start : ids.stop])
    return folder


@pytest.fixture(scope="module")
def chunks(tmp_path_factory):
    """Rows and folder of each split."""
    folder, rng = tmp_path_factory.mktemp("duplicates"), np.random.default_rng(0)
    bases = rng.integers(3, 300, (12, 64))
    rows = {name: planted(rng, bases, n) for name, n in (("train", 300), ("validation", 40))}
    rows["test"] = planted(rng, bases[:2], 20)
    return {
        name: (some, database(folder / name, some, 3 if name == "train" else 1))
        for name, some in rows.items()
    }


def count(folder, chunks, threshold=0.8, **more):
    held_out = {name: chunks[name][1] for name in ("validation", "test")}
    config = LeakageConfig(threshold)
    return prepare_duplicates(folder, chunks["train"][1], held_out, config, **more)


def expected(chunks, threshold):
    """[training, held-out] whether a pair is near, and equal, for each held-out split."""
    result = {}
    for name in ("validation", "test"):
        own, other = ([grams(row) for row in chunks[n][0]] for n in ("train", name))
        near = [
            [bool(a and b) and len(a & b) / len(a | b) >= threshold for b in other] for a in own
        ]
        result[name] = np.array(near), (chunks["train"][0][:, None] == chunks[name][0]).all(2)
    return result


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_counts_are_those_of_every_pair(tmp_path, chunks, threshold):
    facts = count(tmp_path / "duplicates", chunks, threshold).facts
    pairs = expected(chunks, threshold)
    assert facts["chunks"] == sum(bool(grams(row)) for row in chunks["train"][0]) < 300
    for name, (near, equal) in pairs.items():
        assert facts["held_out"][name] == {
            "chunks": sum(bool(grams(row)) for row in chunks[name][0]),
            "near": near.any(0).sum(),
            "equal": (near & equal).any(0).sum(),
        }
    every = np.concatenate([near for near, _ in pairs.values()], axis=1)
    same = np.concatenate([near & equal for near, equal in pairs.values()], axis=1)
    assert (facts["near"], facts["equal"]) == (every.any(1).sum(), same.any(1).sum())
    assert 0 < facts["equal"] <= facts["near"] < facts["chunks"]
    assert (facts["equal"] < facts["near"]) == (threshold < 1)


def test_is_the_same_after_a_kill_and_refuses_another_threshold(tmp_path, chunks, monkeypatch):
    class Killed(BaseException):
        pass

    count(tmp_path / "once", chunks)
    write = Stage.write_array

    def killed(self, name, *rest):
        if name == "found-00001.npy":
            raise Killed
        return write(self, name, *rest)

    monkeypatch.setattr(Stage, "write_array", killed)
    with pytest.raises(Killed):
        count(tmp_path / "again", chunks)
    monkeypatch.undo()
    count(tmp_path / "again", chunks)
    assert tree(tmp_path / "again") == tree(tmp_path / "once")
    with pytest.raises(UserError, match=r"threshold: 0\.8 -> 0\.7"):
        count(tmp_path / "once", chunks, 0.7)
