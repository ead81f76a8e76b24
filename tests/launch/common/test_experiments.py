"""launch/common/experiments.py: the project's gin files, wherever a command runs."""

import pathlib

import pytest

from launch.common import configurables, experiments
from retro_jax.errors import UserError


def test_a_path_into_experiments_is_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pathlib.Path(experiments.located("experiments/quickstart.gin")).is_file()
    configurables.load("experiments/ablations/chunk_only.gin")  # which includes another


def test_a_file_of_the_users_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "quickstart.gin").touch()
    assert experiments.located("experiments/quickstart.gin") == "experiments/quickstart.gin"


@pytest.mark.parametrize(
    "path", ["experiments/none.gin", "experiments/../setup.py", "quickstart.gin", "/x.gin"]
)
def test_other_paths_are_as_they_are(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiments.located(path) == path
    with pytest.raises(UserError, match=f"cannot read {path}"):
        configurables.load(path)
