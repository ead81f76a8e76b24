"""launch/common/app.py: what the user sees of flags, help and errors."""

import errno
import os
import subprocess
import sys

import pytest
from absl import flags

from launch import compare, doctor, export, report
from launch.common import app
from retro_jax.errors import UserError

_COUNT = flags.DEFINE_integer("app_test_count", 3, "How many.")
_SHARE = flags.DEFINE_float("app_test_share", None, "How much.", lower_bound=0, upper_bound=1)
_NAMES = flags.DEFINE_multi_string("app_test_names", [], "Which.")


def _raises(error: BaseException) -> int:
    """The exit status of a main that raises."""

    def main() -> None:
        raise error

    return app.execute(main, ["program"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("the thing\n is wrong"), 1, "error: the thing is wrong\n"),
        (OSError(errno.ENOSPC, "No space left", "/a/b"), 1, "error: /a/b: No space left\n"),
        (OSError("no errno"), 1, "error: no errno\n"),
        (
            OSError(errno.EMFILE, "Too many open files", "/a"),
            1,
            "error: /a: Too many open files, expected a higher limit (ulimit -n)\n",
        ),
        (flags.Error("--x is missing"), 2, "error: --x is missing\n"),
        (KeyboardInterrupt(), 130, "error: interrupted: run the same command again to go on\n"),
    ],
)
def test_errors_of_the_user_are_one_line(error, status, line, capsys):
    assert _raises(error) == status
    assert capsys.readouterr().err == line


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        _raises(ZeroDivisionError())


def test_debug_shows_every_traceback():
    def main() -> None:
        raise UserError("wrong")

    with pytest.raises(UserError):
        app.execute(main, ["program", "--debug"])


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "--app_test_cuont=1",
            "Unknown command line flag 'app_test_cuont'. Did you mean: app_test_count ?",
        ),
        ("--app_test_count=x", "app_test_count"),
        ("stray", "unexpected argument 'stray'"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(argument, expected, capsys):
    assert app.execute(lambda: pytest.fail("main ran"), ["program", argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert expected in error
    assert error.count("\n") == 1


def test_flags_of_other_commands_are_unknown(capsys):
    """Whatever else this process has imported, as one command may another."""
    from launch import prepare

    flag = f"--{prepare.SKIP_BAD.name}"
    assert app.execute(lambda: pytest.fail("main ran"), ["program", flag]) == 2
    assert capsys.readouterr().err == "error: Unknown command line flag 'skip_bad_documents'\n"
    assert app.execute(lambda: pytest.fail("main ran"), ["program", "--skip_bad_document"]) == 2
    assert "Did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [compare, doctor, export, report])
@pytest.mark.parametrize(
    "argument", ["--gin_file=x.gin", "--gin_bindings=a.b = 1", "--print_config"]
)
def test_settings_that_a_command_would_ignore_are_unknown(command, argument, capsys):
    assert app.execute(command.main, ["command", argument]) == 2
    flag = argument.partition("=")[0].lstrip("-")
    assert capsys.readouterr().err == f"error: Unknown command line flag '{flag}'\n"


def test_flags_are_themselves_again_after_a_run():
    seen = []

    def main() -> None:
        seen.append((_COUNT.value, _NAMES.value))

    for _ in range(2):
        app.execute(main, ["program", "--app_test_count=7", "--app_test_names=a"])
    app.execute(main, ["program"])
    assert seen == [(7, ["a"]), (7, ["a"]), (3, [])]


def test_required_names_the_flag():
    def main() -> None:
        app.required(app.WORKDIR, "a directory")

    assert app.execute(main, ["program"]) == 2


def test_help_is_the_docstring_and_few_flags(capsys):
    def main() -> None:
        pytest.fail("main ran")

    assert app.execute(main, ["program", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(__doc__)
    assert "--app_test_count=..." in text
    assert "How many. Default: 3." in text
    assert "--app_test_names=... (may be repeated)" in text
    assert "--workdir=..." in text
    assert text.count("\n") < 40
    assert "verbosity" not in text


def test_warnings_are_lines_and_absl_is_quiet():
    program = "import logging\nlogging.basicConfig()\nfrom absl import logging as absl_logging\nfrom launch.common import app\n"
    program += (
        "def main(): logging.warning('look here'); absl_logging.error('noise')\napp.run(main)"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "WARNING: look here\n")


def test_a_program_exits_with_the_status():
    program = "from launch.common import app\nfrom retro_jax.errors import UserError\n"
    program += "def main(): raise UserError('bad thing')\napp.run(main)"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: bad thing\n")


def test_a_number_that_is_none_is_refused_whatever_the_bounds(capsys):
    assert app.execute(lambda: None, ["program", "--app_test_share=nan"]) == 2
    assert capsys.readouterr().err == "error: --app_test_share=nan: expected a number\n"
    assert app.execute(lambda: None, ["program", "--app_test_share=0.5"]) == 0
