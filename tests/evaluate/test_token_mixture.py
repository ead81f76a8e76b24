"""The mixture of a model with votes: its sum, its optimum, and its caution."""

import json
import os

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.evaluate.token_mixture import (
    Votes,
    mixed_nll,
    num_classes,
    summary,
    tune_weights,
    tuned_weights,
)


def _votes(rng: np.random.Generator, n: int, shares: np.ndarray) -> Votes:
    lengths = rng.integers(0, 40, n)
    counts = np.where(lengths > 0, rng.integers(1, 9, n), 0)
    agreements = np.where(counts > 0, np.maximum(rng.random(n), shares), 0)
    return Votes(lengths, counts, agreements, np.where(counts > 0, shares, 0))


def test_probabilities_sum_to_one():
    """Over a vocabulary of 50, for every class of tokens at once."""
    rng = np.random.default_rng(0)
    model = rng.dirichlet(np.ones(50), 2000)
    memory = rng.dirichlet(np.ones(50) * 0.1, 2000)
    weights = rng.random(num_classes())
    weights[0] = 0
    one = _votes(rng, 2000, memory[:, 0])
    lengths, counts, agreements = one.lengths, one.counts, one.agreements
    total = np.zeros(2000)
    for token in range(50):
        shares = np.where(counts > 0, memory[:, token], 0)
        votes = Votes(lengths, counts, agreements, shares)
        total += np.exp(-mixed_nll(-np.log(model[:, token]), votes, weights))
    np.testing.assert_allclose(total, 1, rtol=1e-9)


def test_tuned_weights_are_the_best_of_a_grid():
    rng = np.random.default_rng(1)
    n = 4000
    shares = (rng.random(n) < 0.7).astype(float)
    model_nll = rng.exponential(2, n)
    votes = Votes(np.full(n, 5), np.full(n, 3), np.ones(n), shares)
    weights = tune_weights(model_nll, votes)
    chosen = int(votes.classes()[0])

    def loss(weight: float) -> float:
        return float(mixed_nll(model_nll, votes, np.full(num_classes(), weight)).mean())

    best = min(np.linspace(0.01, 0.99, 99), key=loss)
    assert abs(weights[chosen] - best) < 0.02
    assert loss(weights[chosen]) < model_nll.mean()


def test_useless_votes_cost_next_to_nothing_on_another_text():
    """A memory that is never right loses less than 0.1% on a text that did not tune it."""
    rng = np.random.default_rng(2)
    n = 20_000
    tuning, other = (_votes(rng, n, np.zeros(n)) for _ in range(2))
    weights = tune_weights(rng.exponential(2, n), tuning)
    model_nll = rng.exponential(2, n)
    assert mixed_nll(model_nll, other, weights).mean() < model_nll.mean() * 1.001


def test_few_tokens_of_a_class_do_not_decide():
    votes = Votes(np.array([32]), np.array([1]), np.array([1.0]), np.array([1.0]))
    weights = tune_weights(np.array([5.0]), votes)
    assert weights.max() < 0.1


def test_tokens_without_votes_keep_their_loss():
    none = np.zeros(3)
    votes = Votes(none, none, none, none)
    nll = np.array([0.5, 1.0, 30.0])
    np.testing.assert_allclose(mixed_nll(nll, votes, tune_weights(nll, votes)), nll, rtol=1e-12)
    assert summary(nll, votes, tune_weights(nll, votes))[0]["tokens"] == 3


def test_weights_of_another_version_are_refused():
    none = np.zeros(1)
    with pytest.raises(UserError, match="has 3 weights: expected"):
        mixed_nll(none, Votes(none, none, none, none), np.zeros(3))


def test_weights_are_those_of_the_database_then_of_k_then_the_newest(tmp_path, caplog):
    model = {"run": "retro", "step": 6}

    def write(
        name: str, weight: float, database: str, k: int, time: int, of=model, alone=None
    ) -> None:
        tokens = {
            "condition": "tokens",
            "model": of,
            "manifests": {"token_memory": database},
            "settings": {"neighbours": k},
        }
        tokens["tokens"] = {"weights": [weight]}
        path = tmp_path / f"{name}.json"
        together = {
            "on": {"condition": "on"},
            "tokens": tokens,
        }  # of all conditions, or of it alone
        path.write_text(json.dumps(together if alone is None else tokens | {"condition": alone}))
        os.utime(path, (time, time))

    def found(database: str, k: int) -> float:
        return float(tuned_weights(tmp_path, model, database, k)[0])

    (tmp_path / "test-tokens-000006-x.json").write_text(json.dumps({"tokens": {"weights": [9.0]}}))
    with pytest.raises(UserError, match="has no token mixture of this checkpoint"):
        found("new", 2)
    write("a", 0.1, "old", 2, time=50)
    write("b", 0.2, "new", 4, time=40)
    write("c", 0.3, "new", 2, time=20)
    write("d", 0.4, "new", 2, time=10)
    write("e", 0.5, "new", 2, time=60, of={"run": "baseline"})
    write("f", 0.6, "new", 8, time=30, alone="tokens")  # which a later evaluation left out
    write("g", 0.7, "new", 8, time=70, alone="context+tokens")
    assert found("new", 8) == 0.6
    assert (found("new", 2), found("new", 4), found("new", 7)) == (0.3, 0.2, 0.2)
    assert tuned_weights(tmp_path, model).tolist() == [0.1]
    assert not caplog.messages
    assert [found("newest", 2), found("newest", 2)] == [0.1, 0.1]
    assert len(caplog.messages) == 1 and "was tuned with another revision" in caplog.text
