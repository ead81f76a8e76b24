"""Retrieval again after every s tokens, with the last M tokens as the query."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.evaluate.strided_score import strided_losses
from retro_jax.generate.decoder import Completed, Decoder
from retro_jax.generate.generator import Generator, GeneratorOptions
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.model.decoder import WholeSequences
from retro_jax.model.layer_stack import take_layer
from tests.generate.cached import Texts, uncached
from tests.model.tiny import TINY, make_model


def neighbours_of(chunks: np.ndarray) -> np.ndarray:
    """[n, 1, 8] that depend on the chunks [n, 4]."""
    draws = [np.random.default_rng(chunk.tolist()).integers(3, 30, (1, 8)) for chunk in chunks]
    return np.stack(draws).astype(np.int32)


def test_every_query_is_the_last_tokens():
    """At each multiple of the stride, in the prompt and after it, where there are M tokens."""
    asked: list[list[int]] = []

    def retrieve(chunks: np.ndarray) -> np.ndarray:
        asked.extend(chunks.tolist())
        return neighbours_of(chunks)

    generator = Generator(
        make_model(TINY),
        chunks=2,
        eos_id=99,
        retrieve=retrieve,
        options=GeneratorOptions(1, stride=2),
    )
    prompt = np.arange(3, 10, dtype=np.int32)
    (text,) = generator.generate([prompt], SamplingConfig(max_tokens=5, temperature=0))
    tokens = text.tokens.tolist()
    assert asked == [tokens[end - 4 : end] for end in (4, 6, 8, 10)]
    assert text.neighbours is not None and text.neighbours.shape == (5, 1, 8)
    np.testing.assert_array_equal(text.neighbours[2], neighbours_of(text.tokens[None, 2:6])[0])


def test_the_encoder_and_cca_read_the_last_tokens():
    """Against the parts of a model of one layer, applied to a query in the middle of two chunks."""
    model = make_model(dataclasses.replace(TINY, num_layers=1, cca_layers=(1,)))
    whole = WholeSequences(model.config)
    tokens = np.random.default_rng(0).integers(3, 30, 8).astype(np.int32)
    neighbours = neighbours_of(tokens[None, 2:6])[0]
    h = model.before_retrieval(model.embed(tokens[None], whole), whole)
    encoded = model.encode(neighbours[None, None], h[:, 2:6], tokens[None, 2:6], whole)
    # As a text that begins at token 2: its first chunk is the query.
    twice = (jnp.repeat(x, 2, axis=1) for x in (encoded.encoded, encoded.present))
    shifted = jnp.pad(h[:, 2:], ((0, 0), (0, 2), (0, 0)))
    shifted = shifted + take_layer(model.cca, 0)(shifted, *twice, None)
    wanted = model.read(model.norm(whole.feed_forward(take_layer(model.layers, 0), shifted, 1)))

    decoder, live = Decoder(model, chunks=2, stride=2), np.ones(1, bool)
    cache = decoder.empty(1, 8, 1)
    for start in (0, 2, 4):
        block, starts = tokens[None, start : start + 2], np.array([start])
        done = [Completed(0, tokens[2:6], neighbours)] if start == 4 else []
        logits, cache = decoder.step(cache, block, starts, live=live, completed=done)
    np.testing.assert_allclose(logits[0], wanted[0, 3], atol=1e-5)
    logits, _ = decoder.step(cache, tokens[None, 6:7], np.array([6]), live=live)
    np.testing.assert_allclose(logits[0], wanted[0, 4], atol=1e-5)


def test_a_stride_that_divides_no_chunk_is_refused():
    with pytest.raises(UserError, match="retrieval_stride is 3: expected a divisor of 4"):
        Decoder(make_model(TINY), chunks=2, stride=3)


def test_losses_with_the_stride_of_training_are_those_of_a_forward_pass():
    """Of texts of several lengths; and a smaller stride asks for more, and reads it."""
    model, draw = make_model(TINY), np.random.default_rng(3)
    texts = [draw.integers(3, 30, length).astype(np.int32) for length in (8, 5)]
    losses = strided_losses(Decoder(model, chunks=2), texts, neighbours_of)
    tokens = np.stack([np.pad(text, (0, 8 - len(text))) for text in texts])
    neighbours = np.stack([neighbours_of(row.reshape(2, 4)) for row in tokens])
    logits = uncached(model, Texts(tokens, neighbours)).astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for row, text in enumerate(texts):
        wanted = -scores[row, np.arange(len(text) - 1), text[1:]]
        np.testing.assert_allclose(losses[row], wanted, atol=1e-5)
    closer = strided_losses(Decoder(model, chunks=2, stride=2), texts, neighbours_of)
    np.testing.assert_allclose(closer[0][:5], losses[0][:5], atol=1e-5)
    assert np.abs(closer[0][5:] - losses[0][5:]).max() > 1e-4
    with pytest.raises(UserError, match="a text of 8 tokens: expected at most 4, one window"):
        strided_losses(Decoder(model, chunks=1), texts, None)
