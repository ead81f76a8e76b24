"""The console command `retro`: every command of this project by its name.

    retro COMMAND [--flag=value ...]
    retro COMMAND --help

`retro train ...` is `python -m launch.train ...`: flags, output and exit status are those of the
command.
"""

import difflib
import importlib.util
import os
import runpy
import sys

# The purpose of each command, in the order of use. One whose module is not installed is not offered.
COMMANDS = {
    "quickstart": "the whole path on two small corpora, from text to a report",
    "doctor": "what is installed here, the devices and limits, and what would fail",
    "prepare": "build a retrieval database from documents",
    "tune": "measure the settings of a database's index",
    "train": "train a RETRO, or its baseline",
    "retrofit": "give an existing language model a retrieval memory",
    "evaluate": "score a trained model with retrieval on and off",
    "compare": "compare two trained models",
    "sample": "continue a text, with retrieval",
    "answer": "answer questions, and count the right answers",
    "generate": "the same command as sample",
    "serve": "answer requests for texts over HTTP",
    "report": "write everything of a workdir on one page",
    "export": "write chunks, neighbours, scores or a model as Parquet or safetensors",
    "results": "the small-scale reproduction, with ablations",
    "compile-check": "predict a step's memory and cost on a TPU slice",
    "cluster": "start a run on TPU VMs, GKE or Slurm",
}
_ALIASES = {"generate": "sample"}
_HELP = ("--help", "-help", "-h", "help")


def main() -> None:
    """Runs the command that is the first argument; ends with its status, or with 2 if there is none."""
    name, *arguments = sys.argv[1:] or [""]
    if name in _HELP:
        _print(usage())
        return
    if name not in available():
        print(f"error: {_problem(name)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"retro {name}", *arguments]
    runpy.run_module(module(name), run_name="__main__", alter_sys=True)


def available() -> list[str]:
    """The commands whose modules are installed."""
    return [name for name in COMMANDS if importlib.util.find_spec(module(name)) is not None]


def module(name: str) -> str:
    """The module of a command, as `python -m` takes it."""
    return f"launch.{_ALIASES.get(name, name).replace('-', '_')}"


def usage() -> str:
    """The help text: the form of a call, and a line for each command."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {COMMANDS[name]}" for name in available()]
    return "\n".join([(__doc__ or "").strip(), "", "Commands:", *lines])


def _print(text: str) -> None:
    """Prints a text; nothing more where its reader has gone, as in `retro --help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _problem(name: str) -> str:
    """The message about a first argument that is no command."""
    expected = f"expected one of {', '.join(available())}"
    if not name:
        return f"no command: {expected}"
    nearest = difflib.get_close_matches(name.replace("_", "-"), available(), n=1)
    return f"unknown command {name!r}: {f'did you mean {nearest[0]!r}?' if nearest else expected}"


if __name__ == "__main__":
    main()
