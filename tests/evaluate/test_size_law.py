"""The size law: points of a law give it back, and a database that does not matter gains nothing."""

import dataclasses
import math

import numpy as np
import pytest

from retro_jax.evaluate.size_law import describe, fit_size_law, size_law
from tests.evaluate.test_scored_text import scored_text

SIZES = np.array([0.01, 0.1, 0.5, 1.0])


@pytest.mark.parametrize("law", [(0.5, 0.4, 0.3), (0.0, 1.0, 0.05), (0.9, 0.2, 1.0)])
def test_points_of_a_law_give_it_back(law):
    a, b, c = law
    ((level, slope, exponent),) = fit_size_law(SIZES, (a + b * SIZES**-c)[None])
    assert level + slope * SIZES**-exponent == pytest.approx(a + b * SIZES**-c, rel=0.01)
    assert exponent == pytest.approx(c, rel=0.1)


def test_more_text_of_no_use_promises_nothing():
    ((level, slope, _),) = fit_size_law(SIZES, np.array([[1.0, 1.1, 1.2, 1.3]]))
    assert slope == 0 and level == pytest.approx(1.15)


def of_sizes(bits):
    """A text of 40 documents that was scored with four sizes, at so many bits per byte."""
    scored, _ = scored_text()
    rng = np.random.default_rng(0)
    documents = 40
    base = rng.uniform(50, 150, documents) * math.log(2)
    names = ("database_0.01", "database_0.1", "database_0.5", "on")
    nats = {
        name: base * value * rng.uniform(0.97, 1.03, documents)
        for name, value in zip(names, bits, strict=True)
    }
    columns = {n: np.full(documents, 100) for n in ("bytes", "words", "tokens")}
    return dataclasses.replace(
        scored, nats=nats, corpora=np.array(["a"] * documents), overlap=None, **columns
    )


def test_the_gain_has_an_interval_over_documents():
    made = of_sizes(0.5 + 0.3 * SIZES**-0.2)
    law = size_law(made)
    assert law["sizes"] == SIZES.tolist()
    gain = law["gain"]
    assert 0 <= gain["low"] <= gain["value"] <= gain["high"] < 0.3
    assert "gain to expect of 10 times the text" in describe(law)
    assert "no forecast" not in describe(law)
    del made.nats["database_0.1"], made.nats["database_0.5"]
    assert size_law(made) is None


def test_a_law_that_misses_the_whole_database_is_no_forecast():
    law = size_law(of_sizes([0.99, 0.96, 0.90, 0.77]))  # falls faster the more there is
    assert 0.04 < law["miss"]["low"] < law["miss"]["high"] < 0.08
    assert describe(law).endswith("no forecast")
