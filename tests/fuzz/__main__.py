"""Mutates real files for some time, and counts what was read and what was refused.

    python -m tests.fuzz --seconds=600

Each round gives every kind of file some new changes. It stops at the first failure, which hypothesis
makes as small as it can; the seed in the last line brings it back.
"""

import argparse
import collections
import json
import logging
import pathlib
import random
import tempfile
import time

from tests.fuzz import configurations, readers
from tests.fuzz.target import fuzz

_EXAMPLES = 50


def main() -> None:
    """Runs rounds until the time is over, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="how long")
    parser.add_argument("--seed", type=int, default=None, help="of the first round")
    parser.add_argument("--only", default="", help="kinds of files whose name has this")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    every = [*readers.targets(), *configurations.targets()]
    targets = [target for target in every if arguments.only in target.name]
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    end = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            for number, target in enumerate(targets):
                if time.monotonic() > end and counts[target.name]:
                    continue
                try:
                    place = pathlib.Path(folder, str(number))
                    counts[target.name] += fuzz(target, place, _EXAMPLES, seed)
                except BaseException:
                    print(f"{target.name!r} failed: --seed={seed}", flush=True)
                    raise
            seed += 1
    for name, each in counts.items():
        print(f"{name:40} {each['read']:8,} read {each['refused']:8,} refused")
    total = sum(counts.values(), collections.Counter())
    print(json.dumps({"files": sum(total.values()), **total, "next_seed": seed}))


if __name__ == "__main__":
    main()
