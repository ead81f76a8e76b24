"""Two processes train as one does: same rows, same curve, checkpoints that either can read.

Every assertion has to hold for whatever order the processes end in, on a machine of any speed.
"""

import json
import os
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from retro_jax.sharding import make_mesh
from retro_jax.train.checkpoint import find_damage, latest_step
from retro_jax.train.curves import read_curve, without_clock
from retro_jax.train.parameter_names import named_leaves
from tests.distributed import worker
from tests.ports import free_port
from tests.train.small import host_batch, one_device_state


def _start(directory, steps: int, *accident: object):
    """Starts two processes that train together on four devices."""
    words = ["2", str(free_port()), str(directory), str(steps), "-1,2,1", *map(str, accident)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", str(i), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for i in range(2)
    ]


def _finish(directory, processes: list[subprocess.Popen]) -> list[list[int]]:
    """Waits for all; the rows that each of them held, whose content is checked."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    held = []
    for index in range(len(processes)):
        start, rows = json.loads((directory / f"rows-{index}.json").read_text())
        expected = worker.checksums(host_batch(start))
        assert all(expected[int(row)] == sums for row, sums in rows.items())
        held.append([int(row) for row in rows])
    return held


@pytest.fixture(name="two", scope="module")
def _two(tmp_path_factory):
    """Where two processes made 8 steps, and the rows that each of them made."""
    directory = tmp_path_factory.mktemp("processes") / "two"
    return directory, _finish(directory, _start(directory, steps=8))


def test_two_processes_equal_one(two, tmp_path):
    directory, rows = two
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]  # each makes only what its devices hold
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "make_mesh", lambda c: make_mesh(c, jax.devices()[:4]))
        assert worker.main(tmp_path / "one", 8) == (0, worker.checksums(host_batch(0)))
    curves = [read_curve(path / "metrics.jsonl") for path in (directory, tmp_path / "one")]
    for a, b in zip(*curves, strict=True):
        assert a["step"] == b["step"]
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    checkpoint = directory / "checkpoints" / "8"
    sealed = json.loads((checkpoint / "sealed.json").read_text())["files"]
    assert {name.split("/")[1] for name in sealed} > {"ocdbt.process_0", "ocdbt.process_1"}
    assert find_damage(checkpoint) is None and not list(checkpoint.glob("hashed-*"))
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
    assert processes[victim].returncode == -signal.SIGKILL, printed
    # Its collective fails, or the coordination service ends it first.
    assert processes[1 - victim].returncode in (76, -signal.SIGABRT), printed
    if processes[1 - victim].returncode == 76:
        error = printed[1 - victim][1]
        assert f"process {1 - victim} of 2: a collective failed (" in error, error
    reached = latest_step(tmp_path / "checkpoints") or 0
    assert reached in (step - step % 2, step - step % 2 - 2)  # or the write was cut short

    assert _finish(tmp_path, _start(tmp_path, steps=8)) == two[1]
    again, whole = _leaves(tmp_path), _leaves(two[0])
    for name, leaf in whole.items():
        assert np.asarray(leaf).tobytes() == np.asarray(again[name]).tobytes(), name
    curves = [read_curve(path / "metrics.jsonl") for path in (tmp_path, two[0])]
    assert [without_clock(line) for line in curves[0]] == [
        without_clock(line) for line in curves[1]
    ]


def test_a_process_that_hangs_is_named(tmp_path):
    processes = _start(tmp_path, 8, "hang", 1, 5)
    printed = [process.communicate(timeout=300) for process in processes]
    # Both wait for equally long. Whoever asks first says who is behind; the other one may then
    # lose its collective, or the coordination service, before it asks.
    statuses = [process.returncode for process in processes]
    assert set(statuses) <= {76, -signal.SIGABRT}, printed
    errors = [error for status, (_, error) in zip(statuses, printed, strict=True) if status == 76]
    assert any("process 1 is behind, at step 6 (input)" in error for error in errors), printed
    assert not any(error.count("process 0 is") for error in errors)
    assert latest_step(tmp_path / "checkpoints") in (2, 4)  # what is asked for at 4 waits for 2
