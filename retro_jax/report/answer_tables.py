"""Figures of answers to questions, and their table."""

from collections.abc import Mapping, Sequence
from typing import Any

from retro_jax.evaluate.answers import exact_match, f1, mean_with_interval
from retro_jax.evaluate.uncertainty import plain
from retro_jax.report.tables import interval
from retro_jax.report.views import Table

_FIGURES = ("exact_match", "f1")


def scored(answers: Sequence[str], right: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Each answer with its exact match and F1.

    Args:
      answers: one for each question. right: the right answers of each.
    """
    return [
        {"answer": answer, "exact_match": exact_match(answer, each), "f1": f1(answer, each)}
        for answer, each in zip(answers, right, strict=True)
    ]


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of `scored` rows with 95% intervals."""
    return {name: plain(mean_with_interval([row[name] for row in rows])) for name in _FIGURES}


def answers_table(name: str, questions: int, conditions: Mapping[str, Any]) -> Table:
    """A row for each condition; conditions: its neighbours and `figures`."""
    rows = [
        [condition, str(each["neighbours"]), *(interval(each[f], digits=3) for f in _FIGURES)]
        for condition, each in conditions.items()
    ]
    header = ["retrieval", "neighbours", "exact match", "F1"]
    return Table(header, rows, f"Answers to {questions:,} questions of {name}")
