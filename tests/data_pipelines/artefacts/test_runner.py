"""The runner: same files for any number of processes, first failure told, no orphans."""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from data_pipelines.artefacts.ray_runner import RayCluster
from data_pipelines.artefacts.runner import InProcess, LocalProcesses
from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Write:
    """Writes a file that depends on the shard's name alone; bad names fail or die."""

    folder: str

    def __call__(self, name: str) -> int:
        if name == "bad":
            raise UserError("bad: expected a good shard")
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "killed once" and not pathlib.Path(self.folder, "killed").exists():
            pathlib.Path(self.folder, "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        data = hashlib.sha256(name.encode()).hexdigest()
        pathlib.Path(self.folder, name).write_text(data)
        return len(data)


RUNNERS = [InProcess(), LocalProcesses(2)]


@pytest.mark.parametrize("runner", RUNNERS)
def test_runs_every_shard_once_with_equal_bytes(tmp_path, runner):
    names = [f"shard-{i}" for i in range(5)]
    results = dict(runner.run(Write(str(tmp_path)), names))
    assert results == dict.fromkeys(names, 64)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


@dataclasses.dataclass(frozen=True)
class Opened:
    """Notes in a folder which process unpickled it, and returns who works."""

    folder: str

    def __call__(self, shard: int) -> int:
        return os.getpid()

    def __setstate__(self, fields: dict) -> None:
        """Called whenever it is unpickled."""
        self.__dict__.update(fields)
        with open(pathlib.Path(self.folder, str(os.getpid())), "a") as file:
            file.write("x")


def test_a_worker_unpickles_the_work_once_and_few_tasks_wait(tmp_path, monkeypatch):
    sizes, wait = [], concurrent.futures.wait

    def counting(pending, **options):
        sizes.append(len(pending))
        return wait(pending, **options)

    monkeypatch.setattr(concurrent.futures, "wait", counting)
    done = dict(LocalProcesses(2).run(Opened(str(tmp_path)), range(300)))
    assert sorted(done) == list(range(300))
    assert max(sizes) <= 16
    assert {path.read_text() for path in tmp_path.iterdir()} == {"x"}
    assert {path.name for path in tmp_path.iterdir()} >= set(map(str, done.values()))


@pytest.mark.parametrize("runner", RUNNERS)
def test_failure_keeps_its_message(tmp_path, runner):
    with pytest.raises(UserError, match=r"^bad: expected a good shard$"):
        list(runner.run(Write(str(tmp_path)), ["good", "bad"]))


class Gone:
    """Work that opens something when it is unpickled."""

    def __setstate__(self, fields: dict) -> None:
        raise UserError("shard.npy is missing: expected it")

    def __getstate__(self) -> dict:
        return {"shards": 1}

    def __call__(self, shard: int) -> None:
        raise NotImplementedError


def test_work_that_cannot_be_opened_keeps_its_message():
    with pytest.raises(UserError, match=r"^shard.npy is missing: expected it$"):
        list(LocalProcesses(2).run(Gone(), [1, 2]))


def test_a_worker_that_is_killed_again_and_again_is_one_line(tmp_path):
    with pytest.raises(UserError, match="worker processes were killed 2 times in a row"):
        list(LocalProcesses(2, retries=1).run(Write(str(tmp_path)), ["a", "killed", "b"]))


def test_shards_of_a_killed_worker_are_made_by_another(tmp_path):
    names = ["a", "killed once", "b", "c"]
    results = dict(LocalProcesses(2).run(Write(str(tmp_path)), names))
    assert results == dict.fromkeys(names, 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LocalProcesses(0), "LocalProcesses.processes is 0: expected a positive number"),
        (lambda: LocalProcesses(1, retries=-1), "LocalProcesses.retries is -1"),
        (lambda: RayCluster(cpus=0), "RayCluster.cpus is 0: expected a positive number"),
        (lambda: RayCluster(retries=-1), "RayCluster.retries is -1"),
        (lambda: RayCluster(accelerators="GPU:x"), "RayCluster.accelerators is 'GPU:x': expected"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(UserError, match=message):
        make()


SLEEPER = """
import os, pathlib, sys, time
from data_pipelines.artefacts.runner import LocalProcesses

def work(name):
    pathlib.Path(sys.argv[1], name).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    list(LocalProcesses(2).run(work, ["a", "b"]))
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER)
    pids = tmp_path / "pids"
    pids.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, script, pids], env=environment)
    deadline = time.monotonic() + 60
    while len([p for p in pids.iterdir() if p.read_text()]) < 2:
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers = [int(path.read_text()) for path in pids.iterdir()]
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, f"{workers} outlived their parent"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
