"""Each process hashes what it wrote, and checks its share."""

import hashlib
import itertools

import jax
import pytest

from retro_jax.train import hashed_files
from retro_jax.train.checkpoint import Checkpoints

FILES = {
    "default/manifest.ocdbt": b"merged",
    "default/ocdbt.process_0/d/a": b"aa",
    "default/ocdbt.process_1/d/b": b"bbbb",
    "default/ocdbt.process_1/d/c": b"c",
}
ENTRIES = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in FILES.items()}


@pytest.fixture(name="written")
def _written(tmp_path):
    """A checkpoint that two processes have written, before its seal."""
    path = tmp_path / "-1.orbax-checkpoint-tmp-7"
    for name, data in {**FILES, "default/commit_success.txt": b"later"}.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


@pytest.fixture(name="hashed")
def _hashed(monkeypatch):
    """The names of files that are hashed, one list for each time."""
    calls, hash_files = [], hashed_files.hash_files

    def record(path, paths):
        calls.append(sorted(file.name for file in paths))
        return hash_files(path, paths)

    monkeypatch.setattr(hashed_files, "hash_files", record)
    return calls


def test_the_first_process_hashes_what_no_other_has(written, hashed, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "opened")  # opening removes what was being written
    checkpoints.directory = tmp_path
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        checkpoints._hash_and_meet(key="async_write_complete.7", timeout_ms=1)
        checkpoints._hash_and_meet(key="async_commit_complete.7", timeout_ms=1)
    assert hashed == [["a"], ["b", "c"]]
    assert hashed_files.collect(written) == ENTRIES
    assert hashed[2:] == [["manifest.ocdbt"]]
    assert not list(written.glob("hashed-*"))


def test_a_list_that_is_missing_or_old_is_made_good(written, hashed):
    hashed_files.write_list(written, 1)
    (written / "default/ocdbt.process_1/d/b").write_bytes(b"longer")
    entries = hashed_files.collect(written)
    assert hashed[1:] == [["a", "b", "manifest.ocdbt"]]
    assert entries["default/ocdbt.process_1/d/b"][0] == 6


def test_shares_check_every_file_once(written, hashed):
    for process in range(3):
        assert hashed_files.find_damage(written, ENTRIES, (process, 3)) is None
    assert sorted(itertools.chain(*hashed)) == ["a", "b", "c", "manifest.ocdbt"]
    (written / "default/ocdbt.process_1/d/c").write_bytes(b"x")
    found = [hashed_files.find_damage(written, ENTRIES, (process, 3)) for process in range(3)]
    problem = "default/ocdbt.process_1/d/c has other content than was written"
    assert sorted(filter(None, found)) == [problem]
