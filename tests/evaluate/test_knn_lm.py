"""kNN-LM: every prediction has its activation, the nearest are the nearest, mixtures are sums."""

import numpy as np
import pytest

from retro_jax.batch import RetroBatch
from retro_jax.errors import UserError
from retro_jax.evaluate import knn_lm
from retro_jax.evaluate.score import WindowConfig, score_chunks
from tests.evaluate.texts import PAD, chunked, documents_of

M = 4


def _states(batch: RetroBatch) -> np.ndarray:
    """A fake model whose activation is the token that it reads and the target."""
    return np.stack([batch.tokens, batch.targets], axis=-1).astype(np.float32)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_each_predicted_token_has_the_activation_before_it_once(stride: int):
    documents = documents_of([9, 3, 0, 21], vocab_size=50)
    text, table = chunked(documents, M)
    config = WindowConfig(chunks=3, stride=stride, batch_size=2)
    places, states = map(np.concatenate, zip(*knn_lm.activations(_states, text, config)))
    flat = table.ravel()
    assert (states[:, 1] == flat[places]).all()
    assert (states[:, 0] == flat[places - 1]).all()
    scored = score_chunks(lambda b: (b.targets != PAD).astype(np.float32), text, config)
    assert sorted(places) == np.flatnonzero(scored.ravel()).tolist()


def test_rows_are_gathered_and_none_is_lost():
    parts = [
        (np.arange(a, b), np.arange(a, b)[:, None]) for a, b in ((0, 3), (3, 4), (4, 9), (9, 10))
    ]
    found = list(knn_lm.batched(iter(parts), 4))
    assert [len(places) for places, _ in found] == [4, 5, 1]
    assert np.concatenate([p for p, _ in found]).tolist() == list(range(10))
    assert np.concatenate([s for _, s in found])[:, 0].tolist() == list(range(10))


def test_a_token_without_any_neighbour_is_the_models_alone():
    distances = np.array([[np.inf, np.inf], [0.5, np.inf]])
    values, targets = np.array([[4, 4], [4, 4]]), np.array([4, 4])
    nll = knn_lm.knn_nll(distances, values, targets, 0.1)
    assert nll.tolist() == [np.inf, 0.0]
    mixed = knn_lm.Found(np.full(2, 2.0), targets, distances, values).nll(
        knn_lm.KnnConfig(neighbours=2, weight=0.5), unit=1.0
    )
    assert mixed[0] == pytest.approx(2 + np.log(2)) and np.isfinite(mixed).all()


def test_the_mixture_is_the_weighted_sum():
    rng = np.random.default_rng(0)
    distances, values = rng.uniform(0, 3, (6, 4)), rng.integers(0, 3, (6, 4))
    targets, model = np.array([0, 1, 2, 0, 1, 9]), rng.uniform(0.1, 3, 6)
    found = knn_lm.Found(model, targets, distances, values)
    nll = found.nll(knn_lm.KnnConfig(neighbours=4, weight=0.3, temperature=0.5), unit=2.0)
    for i in range(6):
        weights = np.exp(-distances[i])
        knn = weights[values[i] == targets[i]].sum() / weights.sum()
        assert nll[i] == pytest.approx(-np.log(0.3 * knn + 0.7 * np.exp(-model[i])))
    assert nll[5] == pytest.approx(model[5] - np.log(0.7))  # no neighbour has it
    nearest_two = found.nll(knn_lm.KnnConfig(neighbours=2, weight=0.3, temperature=0.5), unit=2.0)
    assert not np.allclose(nll, nearest_two)


def test_tuning_takes_what_serves_the_text():
    targets = np.array([4, 5, 6])
    right = knn_lm.Found(np.full(3, 3.0), targets, np.zeros((3, 1)), targets[:, None])
    wrong = knn_lm.Found(np.full(3, 3.0), targets, np.zeros((3, 1)), targets[:, None] + 1)
    assert knn_lm.tune(right, 1.0, neighbours=1).weight == 0.9
    assert knn_lm.tune(wrong, 1.0, neighbours=1).weight == 0.0


@pytest.mark.parametrize("wrong", [{"neighbours": 0}, {"weight": 1.0}, {"temperature": 0.0}])
def test_bad_settings_are_refused(wrong: dict):
    (name,) = wrong
    with pytest.raises(UserError, match=rf"KnnConfig\.{name} is"):
        knn_lm.KnnConfig(**wrong)
