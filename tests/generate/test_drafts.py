"""Drafts change no text: greedy ones are the same, sampled ones have the model's distribution."""

import dataclasses
import itertools

import numpy as np
import pytest

from retro_jax.generate import drafts as drafting
from retro_jax.generate.drafts import (
    Acceptance,
    Draft,
    block_costs,
    block_size,
    find_draft,
    longest_ending,
)
from retro_jax.generate.generator import Generator, GeneratorOptions
from retro_jax.generate.sampling import SamplingConfig
from tests.generate.cached import Texts, uncached
from tests.model.tiny import TINY, make_model


def test_the_longest_ending_is_found():
    text = np.array([5, 6, 7, 9, 1, 6, 7, 8])
    assert longest_ending(np.array([5, 6, 7]), text) == (3, 2)
    assert longest_ending(np.array([4, 6, 7]), text) == (2, 6)  # the last of two
    assert longest_ending(np.array([7, 6]), text) == (1, 5)
    assert longest_ending(np.array([3]), text) == (0, -1)


def test_a_draft_follows_the_longest_ending():
    def look_up(ending, most):
        assert ending.tolist() == [5, 6, 7, 6, 7]
        return 5, np.array([1, 2, 0, 3])[:most]

    text, neighbours = (
        [5, 6, 7, 6, 7],
        np.array([[4, 7, 6, 7, 8, 9, 0, 0], [2, 6, 7, 3, 3, 3, 3, 3]]),
    )
    of_neighbours = find_draft(text, neighbours, most=4, pad_id=0)
    assert of_neighbours is not None
    assert (of_neighbours.tokens.tolist(), of_neighbours.ending) == ([8, 9], 3)  # up to padding
    of_text = find_draft(text, None, most=4, pad_id=0)
    assert of_text is not None and (of_text.tokens.tolist(), of_text.ending) == ([6, 7], 2)
    of_database = find_draft(text, neighbours, most=4, pad_id=0, look_up=look_up)
    assert of_database is not None
    assert (of_database.tokens.tolist(), of_database.ending) == ([1, 2], 5)
    assert find_draft([5, 6], None, most=4, pad_id=0) is None
    assert find_draft(text, neighbours, most=0, pad_id=0) is None


def test_drafts_that_fail_are_not_read_until_they_would_have_stayed():
    costs, acceptance = block_costs(), Acceptance()

    def size() -> int:
        return block_size([(7, acceptance.share(9))], 8, costs)

    assert size() > 1
    while acceptance.share(9) > 0.1:
        acceptance.observe(9, 0, lost=True)
    assert size() == 1
    for _ in range(40):
        acceptance.observe(9, 1, lost=False)
    assert size() == 8
    assert block_size([(7, 0.99)], 5, costs) == 4  # a block ends before its chunk
    # Most texts have nothing to gain, and wait longer.
    assert block_size([(7, 0.9)] + [(0, 0.0)] * 30, 8, costs) == 1


@pytest.fixture(name="model", scope="module")
def _model():
    """A random model whose chunks have 64 tokens."""
    return make_model(dataclasses.replace(TINY, chunk_length=64, neighbour_length=128))


def test_texts_are_the_same_with_and_without(model, monkeypatch):
    """Greedy and drawn ones, of several lengths, in one batch, past a chunk's end; some drafts stay."""
    monkeypatch.setattr(drafting, "block_costs", lambda: {1: 1.0, 4: 1.2, 8: 9.0})
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 30, length).astype(np.int32) for length in (20, 50)]
    prompts += [np.tile(prompts[0], 2)]  # repeats itself
    settings = [
        SamplingConfig(max_tokens=60, temperature=temperature, top_k=top_k, seed=2)
        for temperature, top_k in ((0, 0), (0.3, 3), (0, 0))
    ]
    neighbours = draw.integers(3, 30, (1, 2, 128)).astype(np.int32)

    def retrieve(chunks):
        return np.repeat(neighbours, len(chunks), axis=0)

    def made(**drafts):
        generator = Generator(
            model, chunks=4, eos_id=99, retrieve=retrieve, options=GeneratorOptions(2, **drafts)
        )
        return generator.generate(prompts, settings), generator

    (plain, without), (drafted, by_drafts) = made(), made(drafts=True)
    for a, b in zip(plain, drafted, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, atol=1e-4)
    assert without.blocks == 59 and without.drafter is None
    assert by_drafts.drafter.kept_tokens > 10 and by_drafts.blocks < without.blocks


def test_drawn_texts_have_the_models_distribution(monkeypatch):
    """Chi-square of 10,000 texts of three tokens out of three, two of which a draft proposes."""
    model, allowed = make_model(TINY), (4, 7, 11)
    draft = Draft(np.array([7, 11], np.int32), 9)
    monkeypatch.setattr(drafting, "find_draft", lambda *_, most, **__: draft)
    monkeypatch.setattr(drafting, "block_size", lambda *_: 2)
    sampling = SamplingConfig(max_tokens=3, temperature=1.5, allowed_tokens=allowed, seed=1)
    generator = Generator(model, chunks=2, eos_id=99, options=GeneratorOptions(drafts=True))
    prompt = np.array([1, 5, 9, 3], np.int32)
    texts = generator.generate([prompt] * 10_000, sampling)
    assert generator.drafter is not None
    assert generator.drafter.drafted >= 9_900 and generator.drafter.kept_tokens > 1_000
    found = np.zeros((3, 3, 3))
    for text in texts:
        found[tuple(allowed.index(token) for token in text.tokens[4:].tolist())] += 1
    sequences = list(itertools.product(allowed, repeat=3))
    tokens = np.array([[*prompt, *sequence, 0] for sequence in sequences], np.int32)
    logits = uncached(model, Texts(tokens, None))[:, 3:6, allowed] / 1.5
    shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    places = np.array([[allowed.index(token) for token in sequence] for sequence in sequences])
    expected = 10_000 * np.take_along_axis(shares, places[..., None], axis=-1)[..., 0].prod(axis=1)
    statistic = ((found.reshape(-1) - expected) ** 2 / expected).sum()
    assert expected.min() > 5
    assert statistic < 54.05  # of 26 degrees of freedom, once in a thousand seeds
