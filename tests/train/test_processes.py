"""Two processes train as one does: same rows, same curve, checkpoints that either can read."""

import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from retro_jax.sharding import make_mesh
from retro_jax.train.checkpoint import find_damage, latest_step
from retro_jax.train.metrics import read_curve, without_clock
from retro_jax.train.trees import named_leaves
from tests.train import worker
from tests.train.small import one_device_state


def _free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _start(directory, steps: int, *accident: object) -> list[subprocess.Popen]:
    """Starts two processes of two devices each that train together."""
    port = str(_free_port())
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    worker_of_two = [sys.executable, "-m", "tests.train.worker"]
    return [
        subprocess.Popen(
            [*worker_of_two, str(i), "2", port, str(directory), str(steps), *map(str, accident)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]


def _finish(processes: list[subprocess.Popen]) -> list[list[int]]:
    """Waits for both; the rows that each of them made."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lasts = [out.splitlines()[-1] for out, _ in outputs]  # Gloo prints lines of its own
    return [[int(row) for row in last.split()] for last in lasts]


@pytest.fixture(name="two", scope="module")
def _two(tmp_path_factory):
    """Where two processes made 8 steps, and the rows that each of them made."""
    directory = tmp_path_factory.mktemp("processes") / "two"
    return directory, _finish(_start(directory, steps=8))


def test_two_processes_equal_one(two, tmp_path):
    directory, rows = two
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]  # each makes only what its devices hold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "make_mesh", lambda c: make_mesh(c, jax.devices()[:4]))
        assert worker.main(tmp_path / "one", 8) == list(range(8))
    curves = [read_curve(path / "metrics.jsonl") for path in (directory, tmp_path / "one")]
    for a, b in zip(*curves, strict=True):
        assert a["step"] == b["step"]
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert find_damage(directory / "checkpoints" / "8") is None
    named = [_leaves(directory), _leaves(tmp_path / "one")]
    for name, leaf in named[0].items():
        np.testing.assert_allclose(leaf, named[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


def _leaves(directory):
    """The state that a run ended with, by name, on one device."""
    return named_leaves(one_device_state(directory / "checkpoints"))


def test_a_process_that_is_killed_stops_the_other_and_both_go_on_to_the_same_bits(two, tmp_path):
    victim, step = random.randrange(2), random.randrange(3, 8)
    processes = _start(tmp_path, 8, "kill", victim, step)
    printed = [process.communicate(timeout=300) for process in processes]
    assert processes[victim].returncode == -signal.SIGKILL
    # Its collective fails, or it has waited too long, or the coordination service ends it first.
    assert processes[1 - victim].returncode in (76, -signal.SIGABRT), printed
    if processes[1 - victim].returncode == 76:
        error = printed[1 - victim][1]
        failed = f"process {1 - victim} of 2: a collective failed ("
        assert failed in error or f"process {victim} gave no sign of life" in error
    reached = latest_step(tmp_path / "checkpoints") or 0
    assert reached in (step - step % 2, step - step % 2 - 2)  # or the write was cut short

    assert _finish(_start(tmp_path, steps=8)) == two[1]
    again, whole = _leaves(tmp_path), _leaves(two[0])
    for name, leaf in whole.items():
        assert np.asarray(leaf).tobytes() == np.asarray(again[name]).tobytes(), name
    curves = [read_curve(path / "metrics.jsonl") for path in (tmp_path, two[0])]
    assert [without_clock(line) for line in curves[0]] == [
        without_clock(line) for line in curves[1]
    ]


def test_a_process_that_hangs_is_named_by_the_other(tmp_path):
    processes = _start(tmp_path, 8, "hang", 1, 5)
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [76, 76], printed
    for i, (_, error) in enumerate(printed):
        assert f"process {i} of 2: step " in error
        assert "process 1 is behind, at step 6 (input)" in error
    assert latest_step(tmp_path / "checkpoints") == 4


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    processes = _start(tmp_path, steps=10**6)
    deadline = time.monotonic() + 300
    while len(read_curve(tmp_path / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    _finish(processes)
    reached = latest_step(tmp_path / "checkpoints")
    assert reached == read_curve(tmp_path / "metrics.jsonl")[-1]["step"] < 10**6
    assert find_damage(tmp_path / "checkpoints" / str(reached)) is None
