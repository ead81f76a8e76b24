"""Exact match and F1 on cases worked by hand."""

import pytest

from retro_jax.evaluate.answers import exact_match, f1, mean_with_interval, normalised


def test_answers_are_compared_without_case_articles_punctuation_and_spaces():
    assert normalised("  The Cat's an  A-team!\n") == "cats ateam"
    assert normalised("theory of a thing") == "theory of thing"
    assert exact_match("the U.S.A.", ["France", "USA"])
    assert not exact_match("USA today", ["USA"])
    assert exact_match("the", ["a"]) and not exact_match("", ["x"])


@pytest.mark.parametrize(
    ("answer", "right", "value"),
    [
        ("Jane Austen", ["jane austen"], 1.0),
        ("it was Jane Austen", ["Jane Austen"], 2 * 2 / (4 + 2)),
        ("red red fish", ["a red fish", "blue"], 2 * 2 / (3 + 2)),
        ("red red", ["red red red"], 2 * 2 / (2 + 3)),
        ("", ["x"], 0.0),
        ("the", ["an"], 1.0),
        ("x", ["y", "z"], 0.0),
    ],
)
def test_f1_counts_shared_words(answer, right, value):
    assert f1(answer, right) == pytest.approx(value)


def test_a_mean_has_an_interval_around_it():
    interval = mean_with_interval([0.0, 1.0] * 50)
    assert interval.value == 0.5
    assert 0.38 < interval.low < 0.45 and 0.55 < interval.high < 0.62  # 0.5 +- 1.96 * 0.05
