"""The same changes, guided by the code that they reach: atheris chooses them, one kind of file at a time.

    pip install atheris                                   # nothing else needs it
    python -m tests.fuzz.guided --only="jsonl a.jsonl" --seconds=600

Hypothesis makes a change of the bytes that atheris gives. A failure ends the run with its traceback, and the
bytes are left in a file crash-*, which brings it back as an argument.
"""

import argparse
import logging
import pathlib
import sys
import tempfile
from typing import Any

import atheris
from hypothesis import HealthCheck, given, settings

with atheris.instrument_imports(include=["data_pipelines", "retro_jax"]):
    from tests.fuzz import configurations, readers
    from tests.fuzz.target import outcome


def main() -> None:
    """Fuzzes the first kind of file whose name matches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="how long")
    parser.add_argument("--only", required=True, help="the kind whose name has this")
    arguments, more = parser.parse_known_args()
    logging.disable(logging.CRITICAL)
    every = [*readers.targets(), *configurations.targets()]
    target = next((each for each in every if arguments.only in each.name), None)
    if target is None:
        parser.error(f"--only={arguments.only}: expected one of {[each.name for each in every]}")
    folder = pathlib.Path(tempfile.mkdtemp())

    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(target.changes)
    def one(change: Any) -> None:
        outcome(target, folder, change)

    options = [f"-max_total_time={arguments.seconds}", "-print_final_stats=1", *more]
    atheris.Setup([sys.argv[0], *options], one.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
