"""A workdir with a RETRO and a baseline of a few steps on the prepared slice, once a test session.

Tests may evaluate, sample and report in it; W/evaluation/test.json is always that of `evaluated`.
"""

import json
import pathlib

import pytest


@pytest.fixture(scope="session")
def trained(prepared_workdir: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a workdir with a RETRO and a baseline, trained on the slice."""
    from launch import train
    from tests.launch.trained import TINY, call

    root = tmp_path_factory.mktemp("results")
    (root / "tiny.gin").write_text(TINY)
    where = [f"--workdir={root / 'W'}", f"--data={prepared_workdir}"]
    for more in ([], ["--baseline"]):
        assert call(train.main, *where, f"--gin_file={root / 'tiny.gin'}", *more) == 0
    return where


@pytest.fixture(scope="session")
def workdir(trained: list[str]) -> pathlib.Path:
    """Where they are."""
    return pathlib.Path(trained[0].partition("=")[2])


@pytest.fixture(scope="session")
def evaluated(trained: list[str], workdir: pathlib.Path) -> dict:
    """What launch.evaluate wrote of the test split."""
    from launch import evaluate
    from tests.launch.trained import call

    assert call(evaluate.main, *trained) == 0
    return json.loads((workdir / "evaluation" / "test.json").read_text())
