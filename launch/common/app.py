"""Runs an entry point: flags, help, and errors of the user's in one line.

    from launch.common import app
    ...
    if __name__ == "__main__":
        app.run(main)

Exit statuses:

    0    done
    1    bad input (UserError) or a failing file system; a defect of this project, with its traceback
    2    bad flags
    75   asked to stop, saved: the same command resumes
    76   another process of the run was lost or hangs: start all of them again
    130  Ctrl-C
"""

import logging
import os
import re
import signal
import sys
import textwrap
import traceback
import types
from collections.abc import Callable

from absl import flags

from retro_jax.errors import LOST as LOST
from retro_jax.errors import SAVED as SAVED
from retro_jax.errors import LostPeerError, SharedError, UserError, describe

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the whole run, artefacts and models; of a trained run a bucket too, as gs://B/W.",
)
flags.DEFINE_bool("debug", False, "Show the traceback of every error.")

_afterwards: list[Callable[[], None]] = []  # what a command does when it has succeeded
_places: dict[str, str] = {}  # what folders of this host are called in errors
_who: list[str] = []  # this process's name, where several make one run

# Flags that every entry point may use. --help shows them, the module's own, and those of the
# modules that it names in HELP_ALSO. A command that is WITHOUT_SETTINGS knows none of gin's.
_SHARED_MODULES = ("launch.common.app", "launch.common.configurables")
_HELP = ("--help", "-help", "-h", "--helpshort", "--helpfull")


def run(main: Callable[[], None]) -> None:
    """Parses sys.argv, runs `main` and exits with one of the statuses above."""
    sys.exit(execute(main, sys.argv))


def execute(main: Callable[[], None], argv: list[str]) -> int:
    """Runs `main` under the flags of `argv` and returns the exit status.

    Flags have their previous values again afterwards, so a test can run entry points in its own
    process, one after the other.

    Args:
      main: the entry point's function, without arguments; it reads its own flags.
      argv: the program's name and its arguments.
    """
    if any(argument in _HELP for argument in argv[1:]):
        print(usage(main))
        return 0
    saved = {name: dict(flags.FLAGS[name].__dict__) for name in flags.FLAGS}
    try:
        return _guarded(main, argv)
    finally:
        _afterwards.clear()
        _places.clear()
        for name, values in saved.items():
            flags.FLAGS[name].__dict__.update(values)


def name_process(name: str) -> None:
    """Says which of several processes this is: its errors and warnings begin with it."""
    _who[:] = [f"{name}: "] if name else []
    _set_up_logging(debug=False)


def after(action: Callable[[], None]) -> None:
    """Runs an action after the command, if it succeeds."""
    _afterwards.append(action)


def calls(folder: object, place: str) -> None:
    """Names a folder of this host in errors by what it is a copy of."""
    _places[str(folder)] = place


def required(flag: flags.FlagHolder, expected: str) -> str:
    """The value of a flag that this entry point cannot do without.

    Raises:
      flags.Error: it was not given; reported as "--name is missing: expected ...".
    """
    if flag.value in (None, "", []):
        raise flags.Error(f"--{flag.name} is missing: expected {expected}")
    if flag is WORKDIR and "://" in flag.value:
        raise flags.Error(
            f"--workdir={flag.value}: expected a directory; train, evaluate, compare, sample, answer, "
            "report and serve alone read buckets"
        )
    return flag.value


def usage(main: Callable[[], None]) -> str:
    """The help text: the entry point's docstring, then its own and the shared flags."""
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", "Flags:"]
    for name in _names(main):
        lines += _flag_help(flags.FLAGS[name])
    return "\n".join(lines)


def _names(main: Callable[[], None]) -> list[str]:
    """The flags that a command knows: its own, then the shared ones."""
    module = sys.modules[main.__module__]
    local, also = _held(module), getattr(module, "HELP_ALSO", ())
    by_module = flags.FLAGS.flags_by_module_dict()
    modules = _SHARED_MODULES[: 1 if getattr(module, "WITHOUT_SETTINGS", False) else 2]
    shared = {flag.name for name in modules for flag in by_module.get(name, [])}
    shared |= {flag for name in also for flag in _held(sys.modules[name])}
    return [*sorted(local), *sorted(shared - local)]


def _held(module: types.ModuleType) -> set[str]:
    """The flags that a module defines, or imports."""
    return {value.name for value in vars(module).values() if isinstance(value, flags.FlagHolder)}


def _parse(main: Callable[[], None], argv: list[str]) -> list[str]:
    """The arguments that are no flags; flags of other commands of this process are unknown ones.

    Raises:
      flags.Error: a flag that the command does not know, or a value that a flag does not take.
    """
    own = flags.FlagValues()
    for name in _names(main):
        own[name] = flags.FLAGS[name]
    rest = own(argv)
    for name in own:
        if own[name].value != own[name].value:  # absl takes NaN to be within any bounds
            raise flags.Error(f"--{name}=nan: expected a number")
    flags.FLAGS.mark_as_parsed()
    return rest


def _flag_help(flag: flags.Flag) -> list[str]:
    """Two or more lines about one flag."""
    head = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}=..."
    if isinstance(flag, flags.MultiFlag):
        head += " (may be repeated)"
    unsaid = flag.default is None or flag.default is False or flag.default == []
    default = "" if unsaid else f" Default: {flag.default}."
    text = flag.help.split(";\n", 1)[0]  # absl adds a line to those that may be repeated
    wrapped = textwrap.wrap(f"{text}{default}", width=92)
    return [head, *(f"      {line}" for line in wrapped)]


def _guarded(main: Callable[[], None], argv: list[str]) -> int:
    """Runs main, turning the user's errors into a line on standard error and a status."""
    try:
        rest = _parse(main, argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}: expected --flag=value only")
        _set_up_logging(debug="--debug" in argv)
        main()
        for action in _afterwards:
            action()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (flags.Error, UserError, OSError, KeyboardInterrupt) as error:
        if "--debug" in argv:
            raise
        status, message = _status_and_message(error)
        for folder, place in _places.items():
            message = re.sub(rf"(?<!kept in ){re.escape(folder)}(?![\w-])", place, message)
        tell(message)
        if _who and not isinstance(error, SharedError):
            leave(status)
        return status
    except Exception:  # a defect: by the usual end this process would wait for the others
        if not _who:
            raise
        print(f"{_who[0]}{traceback.format_exc()}", file=sys.stderr)
        leave(1)
    return 0


def tell(message: str) -> None:
    """Prints an error as one line on standard error."""
    print(f"{''.join(_who)}error: {' '.join(message.split())}", file=sys.stderr)


def leave(status: int) -> None:
    """Ends this process at once: by the usual way it would wait for the others, who wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _set_up_logging(debug: bool) -> None:
    """Warnings as lines on standard error; no second account of errors that main raises."""
    who = "".join(_who)
    form = f"{who}%(levelname)s: %(message)s"
    logging.basicConfig(format=form, level=logging.WARNING, force=bool(who))
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:  # absl makes one, in another form
            handler.setFormatter(logging.Formatter(form))
    # Orbax logs the traceback of every failed write, several times, and then raises it.
    logging.getLogger("absl").setLevel(logging.WARNING if debug else logging.CRITICAL)


def _status_and_message(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for an error of the user's."""
    if isinstance(error, flags.Error):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted: run the same command again to go on"
    if isinstance(error, LostPeerError):
        return LOST, str(error)
    return 1, describe(error)
