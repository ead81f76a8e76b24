"""What is mutated, what reads it, and what must be true of the outcome."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, given, settings

from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
      name: for counts. changes: a strategy of changes.
      write: puts the changed file into a folder. read: reads it there; an AssertionError if anything
        was lost.
    """

    name: str
    changes: Any
    write: Callable[[pathlib.Path, Any], object]
    read: Callable[[pathlib.Path], object]


def outcome(target: Target, folder: pathlib.Path, change: Any) -> str:
    """ "read" or "refused"; whatever else reading raises goes through."""
    target.write(folder, change)
    try:
        target.read(folder)
    except UserError as error:
        message = str(error)
        assert message and "Traceback" not in message, message
        return "refused"
    return "read"


def fuzz(
    target: Target, folder: pathlib.Path, examples: int, seed: int | None = None
) -> collections.Counter[str]:
    """Tries so many changes; the same ones each time without a seed.

    Returns:
      How many were read and how many refused, in one line.
    """
    counts: collections.Counter[str] = collections.Counter()
    folder.mkdir(parents=True, exist_ok=True)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.changes)
    def one(change: Any) -> None:
        counts[outcome(target, folder, change)] += 1

    (one if seed is None else hypothesis.seed(seed)(one))()
    return counts
