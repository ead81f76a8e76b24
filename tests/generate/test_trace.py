"""Traces: each figure equals another way to compute it, on the paper's and on fitted decoders."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.generate.trace import Trace, largest_effect, trace
from retro_jax.model import Retro
from retro_jax.model.layer_stack import take_layer
from tests.generate.cached import K, Texts, make_texts, uncached
from tests.model.test_config_fields import formed, opened
from tests.model.tiny import TINY, make_model

M, CHUNKS = TINY.chunk_length, 3
LENGTH = CHUNKS * M - 1  # the last chunk is not complete
FITTED = dataclasses.replace(
    formed(gated_cca=True, sink_id=7), chunk_length=M, neighbour_length=2 * M
)

SHARED = dataclasses.replace(FITTED, form=dataclasses.replace(FITTED.form, shared_softmax=True))


@pytest.fixture(scope="module")
def model() -> Retro:
    return make_model(TINY)


def text_of(config: RetroConfig) -> Texts:
    """One text of 3 chunks; its first chunk's second neighbour has no continuation."""
    texts = make_texts(config, 2, CHUNKS, retrieval=True)
    assert texts.neighbours is not None
    return Texts(texts.tokens[:1], texts.neighbours[:1])


def traced(model: Retro) -> Trace:
    """The trace of this text."""
    texts = text_of(model.config)
    assert texts.neighbours is not None
    return trace(model, texts.tokens[0, :LENGTH], texts.neighbours[0, :2], chunks=CHUNKS)


def expected(model: Retro, neighbours: np.ndarray | None, rows: int = 1) -> np.ndarray:
    """[rows, n] log-probabilities of the text's tokens by one plain forward pass, in float64."""
    tokens = np.repeat(text_of(model.config).tokens, rows, axis=0)
    logits = uncached(model, Texts(tokens, neighbours)).astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    of_next = np.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    return np.pad(of_next, ((0, 0), (1, 0)))[:, :LENGTH]


@pytest.mark.parametrize("config", [TINY, FITTED], ids=["paper", "fitted"])
def test_figures_are_those_of_plain_passes(config: RetroConfig):
    model = opened(config)
    result, neighbours = traced(model), text_of(config).neighbours
    assert neighbours is not None
    neighbours[0, 2] = config.pad_id  # the last chunk is not complete: nothing was retrieved
    cases = [(u, slot) for u in range(2) for slot in range(K)]
    inputs = np.repeat(neighbours, 1 + len(cases), axis=0)
    for row, (u, slot) in enumerate(cases, 1):
        inputs[row, u, 0] = neighbours[0, u, 1 - slot]  # the other one comes first, and is alone
        inputs[row, u, 1] = config.pad_id
    whole, *rest = expected(model, inputs, len(inputs))
    np.testing.assert_allclose(result.log_probabilities, whole, atol=1e-5)
    np.testing.assert_allclose(result.without, expected(model, None)[0], atol=1e-5)
    assert np.abs(result.changes[M:]).max() > 0.01
    assert not result.changes[:M].any()
    for (u, slot), less in zip(cases, rest, strict=True):
        readers, fall = slice((u + 1) * M, min((u + 2) * M, LENGTH)), whole - less
        np.testing.assert_allclose(result.effects[readers, slot], fall[readers], atol=2e-5)
        assert np.abs(fall[readers]).max() > 1e-3
    assert not result.effects[:M].any()


@pytest.mark.parametrize("config", [TINY, FITTED, SHARED], ids=["paper", "fitted", "shared"])
def test_attention_is_a_share_of_what_the_chunk_before_retrieved(config: RetroConfig):
    result = traced(opened(config))
    assert result.attention is not None
    assert result.attention.shape == (len(config.cca_layers), LENGTH, K, 2 * M)
    sums = result.attention.sum(axis=(2, 3))
    assert not sums[:, :M].any()
    if config.form.gated_cca:  # the sink has the rest, or the text
        assert (sums[:, M:] < 1).all()
        assert (sums[:, M:] > 0).all()
    else:
        np.testing.assert_allclose(sums[:, M:], 1, atol=1e-5)
    for u in range(2):
        absent = result.read_by(u + 1) == config.pad_id
        assert not result.attention[:, (u + 1) * M : (u + 2) * M][..., absent].any()
    assert result.read_by(0).shape == (0, 2 * M)


def test_attention_weights_make_the_output_of_their_layer():
    """With one head the mean over heads is the head's own."""
    config = dataclasses.replace(TINY, num_heads=1)
    cca = take_layer(make_model(config).cca, 0)
    draw = np.random.default_rng(0)
    h = jnp.asarray(draw.normal(size=(2, 3 * M, config.d_model)), jnp.float32)
    encoded = draw.normal(size=(2, 3, K, 2 * M, config.encoder_d_model))
    present = jnp.asarray(draw.random((2, 3, K, 2 * M)) < 0.8)
    inputs = (h, jnp.asarray(encoded, jnp.float32), present, None)
    weights = cca.weights(*inputs)
    values = cca.attention.project(h, inputs[1].reshape(2, 3, K * 2 * M, -1))[2]
    # Token t reads the neighbours of chunk (t + 1) // M - 1.
    reads = np.maximum((np.arange(3 * M) + 1) // M - 1, 0)
    heads = jnp.einsum("bns,bnshw->bnhw", weights, values[:, reads])
    np.testing.assert_allclose(cca.attention.read_out(heads), cca(*inputs), atol=1e-5)


def test_a_text_beyond_the_trained_length_is_read_through_a_moving_window(model: Retro):
    """As it was generated: from the second window on, the first chunk has never been there."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(3, TINY.vocab_size, 14).astype(np.int32)
    neighbours = draw.integers(3, TINY.vocab_size, (3, K, 2 * M)).astype(np.int32)
    result = trace(model, tokens, neighbours, chunks=2, prompt_length=3)
    assert result.prompt_length == 3
    for first, predicted in ((0, slice(0, 9)), (1, slice(9, 13)), (2, slice(13, 14))):
        start = first * M
        there = slice(start, min(start + 2 * M + 1, 14))
        part = trace(model, tokens[there], neighbours[first : first + 2], chunks=2)
        inside = slice(predicted.start - start, predicted.stop - start)
        for name in ("log_probabilities", "without", "effects"):
            found, wanted = getattr(result, name)[predicted], getattr(part, name)[inside]
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert result.attention is not None
        assert part.attention is not None
        found, wanted = result.attention[:, predicted], part.attention[:, inside]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert (np.abs(result.effects[M:]).max(axis=1) > 0).all()


def test_the_responsible_neighbour_has_the_largest_effect():
    effects = np.array([[0, 0], [0.5, -0.7], [0.009, 0], [0.3, 0.1]], np.float32)
    assert largest_effect(effects).tolist() == [-1, 1, -1, 0]
    assert largest_effect(effects, least=0.4).tolist() == [-1, 1, -1, -1]
    assert largest_effect(effects[:, :0]).tolist() == [-1] * 4


def test_without_retrieval_there_is_nothing_to_explain(model: Retro):
    tokens = text_of(TINY).tokens[0]
    result = trace(
        make_model(TINY.baseline()), tokens, np.zeros((1, K, 2 * M), np.int32), chunks=CHUNKS
    )
    assert result.neighbours is result.attention is None
    assert (result.log_probabilities[1:] < 0).all()
    assert not result.changes.any()
    assert result.responsible().tolist() == [-1] * len(tokens)
    short = trace(model, tokens[: M - 1], None, chunks=CHUNKS)
    assert short.effects.shape == (M - 1, 0)


def test_bad_inputs_are_named(model: Retro):
    tokens = np.arange(9)
    for bad in ((2, K, M), (3, K, 2 * M), (2, 0, 2 * M), (K, 2 * M)):
        with pytest.raises(UserError, match=r"neighbours have shape .*: expected \[C <= 2, K >= 1"):
            trace(model, tokens, np.zeros(bad, np.int32), chunks=CHUNKS)
    with pytest.raises(UserError, match=r"tokens have shape \(0,\): expected \[n\]"):
        trace(model, tokens[:0], None, chunks=CHUNKS)
