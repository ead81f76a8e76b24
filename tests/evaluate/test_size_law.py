"""The size law: points of a law give it back, and a database that does not matter gains nothing."""

import dataclasses

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


def test_the_gain_has_an_interval_over_documents():
    scored, _ = scored_text()
    rng = np.random.default_rng(0)
    documents, nats = 40, {}
    base = rng.uniform(50, 150, documents)
    for name, size in (("database_0.01", 0.01), ("database_0.1", 0.1), ("on", 1.0)):
        nats[name] = base * (0.5 + 0.3 * size**-0.2) * rng.uniform(0.97, 1.03, documents)
    columns = {n: np.full(documents, 100) for n in ("bytes", "words", "tokens")}
    made = dataclasses.replace(
        scored, nats=nats, corpora=np.array(["a"] * documents), overlap=None, **columns
    )
    law = size_law(made)
    assert law["sizes"] == [0.01, 0.1, 1.0]
    gain = law["gain"]
    assert 0 <= gain["low"] <= gain["value"] <= gain["high"] < 0.3
    assert "gain to expect of 10 times the text" in describe(law)
    del nats["database_0.1"]
    assert size_law(made) is None
