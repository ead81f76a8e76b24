"""launch/retro.py: each command by its name, as `python -m` runs it."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from launch import retro

LAUNCH = pathlib.Path(retro.__file__).parent
# Files of launch/ that are no commands of their own.
OTHERS = {"__init__", "retro"}


def _call(*arguments: str) -> int:
    """The exit status of `retro ARGUMENTS` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["retro", *arguments])
        try:
            retro.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def test_the_table_is_the_folder():
    modules = {f"launch.{path.stem}" for path in LAUNCH.glob("*.py") if path.stem not in OTHERS}
    assert {retro.module(name) for name in retro.available()} == modules


def test_every_command_is_there_and_generate_is_sample():
    assert retro.available() == list(retro.COMMANDS)
    assert retro.module("generate") == retro.module("sample") == "launch.sample"


def test_help_has_a_line_for_each_command(capsys):
    assert _call("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :]]
    assert listed == retro.available()
    assert "train" in listed and max(map(len, lines)) <= 110


def test_a_command_without_its_module_is_not_offered(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "launch.tune" else find(name)
    )
    assert "tune" not in retro.available() and "train" in retro.available()
    assert _call("tune") == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'tune': expected one of ")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evalute"], r"error: unknown command 'evalute': did you mean 'evaluate'\?\n"),
        (["compile_check"], r"error: unknown command .*: did you mean 'compile-check'\?\n"),
        (["xyz"], r"error: unknown command 'xyz': expected one of .*prepare, .*, cluster\n"),
        (["--workdir=W"], r"error: unknown command '--workdir=W': expected one of .*\n"),
        ([], r"error: no command: expected one of .*\n"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, line, capsys):
    assert _call(*arguments) == 2
    assert re.fullmatch(line, capsys.readouterr().err)


def test_flags_and_status_are_those_of_the_command():
    by_name = [sys.executable, "-m", "launch.retro", "cluster"]
    by_module = [sys.executable, "-m", "launch.cluster"]
    runs = [_run([*command, "--help"]) for command in (by_name, by_module)]
    assert runs[0].returncode == 0 and "--dry_run" in runs[0].stdout
    assert runs[0].stdout == runs[1].stdout
    wrong = _run([*by_name, "--nmae=retro"])
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: Unknown command line flag 'nmae'. Did you mean: name")


def test_a_reader_that_has_gone_is_no_error(monkeypatch):
    def gone(*values, **options) -> None:
        raise BrokenPipeError

    closed: list[int] = []
    monkeypatch.setattr("builtins.print", gone)
    monkeypatch.setattr("os.dup2", lambda old, new: closed.append(new))
    assert _call("--help") == 0
    assert len(closed) == 1


def _run(command: list[str]) -> subprocess.CompletedProcess:
    """A finished process with what it wrote."""
    return subprocess.run(command, capture_output=True, text=True, check=False)
