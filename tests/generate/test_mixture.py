"""The mixture that is drawn from is the one that launch.evaluate scores."""

import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.evaluate.token_mixture import Votes, mixed_nll, num_classes
from retro_jax.generate.generator import Generator, GeneratorOptions
from retro_jax.generate.mixture import Mixture, mixed
from retro_jax.generate.sampling import SamplingConfig
from tests.model.tiny import TINY, make_model

WEIGHTS = np.r_[0, np.random.default_rng(0).uniform(0.1, 0.9, num_classes() - 1)]
VOTES = {5: (3, [7, 7, 9, 7]), 6: (1, [2]), 8: (0, [])}


def ask(ending: np.ndarray) -> tuple[int, np.ndarray]:
    """Votes by the last token."""
    length, tokens = VOTES.get(int(ending[-1]), (0, []))
    return length, np.array(tokens, np.int64)


def test_probabilities_are_those_of_the_scored_mixture():
    logits = np.random.default_rng(1).normal(size=(3, 12)).astype(np.float32)
    model = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = np.asarray(mixed(logits, *Mixture(ask, WEIGHTS).votes([[1, 5], [6], [1, 8]])))
    for row, last in enumerate((5, 6, 8)):
        length, tokens = VOTES[last]
        shares = np.bincount(tokens, minlength=12) / max(len(tokens), 1)
        every = np.full(12, 1)
        votes = Votes(length * every, len(tokens) * every, shares.max() * every, shares)
        np.testing.assert_allclose(found[row], -mixed_nll(-model[row], votes, WEIGHTS), atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


def test_texts_are_drawn_from_the_mixture_with_drafts_too():
    """Votes that are sure decide greedy texts, and the log-probabilities are the mixture's."""
    sure = np.r_[0, np.full(num_classes() - 1, 0.99)]
    mixture = Mixture(lambda ending: (9, np.array([(ending[-1] + 1) % 29])), sure)
    prompt, sampling = np.array([1, 3], np.int32), SamplingConfig(max_tokens=9, temperature=0)
    for drafts in (False, True):
        options = GeneratorOptions(mixture=mixture, drafts=drafts)
        generator = Generator(make_model(TINY), chunks=4, eos_id=99, options=options)
        (text,) = generator.generate([prompt], sampling)
        assert text.tokens[2:].tolist() == list(range(4, 13))
        assert np.abs(text.log_probabilities).max() < 0.02


def test_weights_of_other_classes_are_refused():
    with pytest.raises(UserError, match="a token mixture has 3 weights: expected"):
        Mixture(ask, np.zeros(3))
