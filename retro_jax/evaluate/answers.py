"""Answers to questions against the right ones: exact match and F1, as SQuAD defines them.

Both compare normalised texts: small letters, without punctuation and the articles a, an and the, words
between single spaces. A question with several right answers counts the one that scores best.
"""

import collections
import re
import string
from collections.abc import Sequence

import numpy as np

from retro_jax.evaluate.bootstrap import Interval, intervals, resampled_sums

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SAMPLES = 1000


def normalised(answer: str) -> str:
    """An answer as it is compared."""
    plain = answer.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones, normalised."""
    return normalised(answer) in {normalised(each) for each in right}


def f1(answer: str, right: Sequence[str]) -> float:
    """The F1 of an answer's words and those of a right answer: the best of them, 0 to 1.

    Repeated words count as often as they occur in both. Two texts without words agree.
    """
    return max(_f1(normalised(answer).split(), normalised(each).split()) for each in right)


def mean_with_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The mean over questions, with the 95% interval of a bootstrap over them."""
    column = np.asarray(values, np.float64)[:, None]
    drawn = resampled_sums(column, samples=_SAMPLES, seed=0) / len(column)
    return intervals(column.mean(axis=0), drawn)[0]


def _f1(answer: list[str], right: list[str]) -> float:
    """As `f1`, of words."""
    if not answer or not right:
        return float(answer == right)
    shared = sum((collections.Counter(answer) & collections.Counter(right)).values())
    return 2 * shared / (len(answer) + len(right))
