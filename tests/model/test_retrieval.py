"""Properties of retrieval as a whole: padding, order, conditioning, and what the encoder sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.model.encoder import Encoder
from tests.model.tiny import TINY, assert_close, logits, make_batch, make_model, with_neighbours


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_the_order_of_neighbours_is_irrelevant(positions):
    config = dataclasses.replace(TINY, positions=positions)
    model, batch = make_model(config), make_batch(config, k=3, padding=True)
    permuted = with_neighbours(batch, np.asarray(batch.neighbours)[:, :, [2, 0, 1]])
    assert_close(logits(model, permuted), logits(model, batch))


def test_an_empty_slot_changes_nothing():
    """k neighbours and a slot of padding are k neighbours."""
    model, batch = make_model(TINY), make_batch(TINY, padding=True)
    neighbours = np.asarray(batch.neighbours)
    slot = np.full_like(neighbours[:, :, :1], TINY.pad_id)
    wider = with_neighbours(batch, np.concatenate([slot, neighbours], axis=2))
    assert_close(logits(model, wider), logits(model, batch))


def _baseline_with_decoder_of(model: Any) -> Any:
    """The model without retrieval that has the same decoder weights."""
    baseline = make_model(model.config.baseline(), seed=1)
    for name in ("embedding", "layers", "norm"):
        nnx.update(getattr(baseline, name), nnx.state(getattr(model, name)))
    return baseline


@pytest.mark.parametrize("pad_id", [0, TINY.vocab_size])
def test_nothing_retrieved_is_retrieval_off_is_the_baseline(pad_id):
    """All-padding neighbours == RETRO[OFF] == the same decoder without CCA; with text they differ."""
    config = dataclasses.replace(TINY, pad_id=pad_id)
    model, batch = make_model(config), make_batch(config, documents=True)
    off = logits(model, with_neighbours(batch, None))
    empty = with_neighbours(batch, np.full_like(batch.neighbours, pad_id))
    assert_close(logits(model, empty), off, tolerance=1e-6)
    baseline = _baseline_with_decoder_of(model)
    assert_close(logits(baseline, with_neighbours(batch, None)), off, tolerance=1e-6)
    assert_close(logits(baseline, batch), off, tolerance=1e-6)
    assert np.abs(logits(model, batch) - off).max() > 0.01 * np.abs(off).max()


def test_padding_in_neighbours_is_never_read():
    """The gradient by the padding's embedding is exactly zero, by every other token's it is not."""
    batch = make_batch(TINY, rows=4, padding=True)
    graph, params = nnx.split(make_model(dataclasses.replace(TINY, tie_embeddings=False)))

    @jax.jit
    def gradient(params: Any) -> jax.Array:
        def loss(params: Any) -> jax.Array:
            return nnx.merge(graph, params).token_losses(batch).sum()

        return jax.grad(loss)(params).encoder.embedding.table[...]

    by_row = np.abs(np.asarray(gradient(params))).max(axis=1)
    assert by_row[TINY.pad_id] == 0
    assert (np.delete(by_row, TINY.pad_id) > 0).all()


def _encoded(monkeypatch: pytest.MonkeyPatch, model: Any, batch: Any) -> Any:
    """A function of the parameters that gives E, taken where the model itself makes it."""
    graph, _ = nnx.split(model)
    original = Encoder.__call__

    def run(params: Any) -> jax.Array:
        made: list[jax.Array] = []

        def record(self: Encoder, *args: Any, **kwargs: Any) -> jax.Array:
            made.append(original(self, *args, **kwargs))
            return made[-1]

        with monkeypatch.context() as patch:
            patch.setattr(Encoder, "__call__", record)
            nnx.merge(graph, params).hidden_states(batch.tokens, batch.neighbours, batch.documents)
        (encoded,) = made
        return encoded

    return run


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize("first", [1, 2])
def test_the_encoder_is_conditioned_on_layer_min_p(monkeypatch, first, scan_layers):
    """E depends on all layers before min(P) and on the ATTN of min(P); on no FFW or CCA after it."""
    config = dataclasses.replace(TINY, cca_layers=(first, 3))
    model = make_model(config, ExecutionConfig(scan_layers=scan_layers))
    encoded = _encoded(monkeypatch, model, make_batch(config))
    params = nnx.state(model)
    shape = jax.eval_shape(encoded, params).shape
    weights = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(weights * encoded(params))))(params)

    def reached(part: Any) -> list[bool]:
        """For each layer of a stack, whether E depends on any of its parameters."""
        leaves = [np.abs(np.asarray(leaf)) for leaf in jax.tree.leaves(part)]
        return [any(leaf[layer].max() > 0 for leaf in leaves) for layer in range(len(leaves[0]))]

    layers = range(1, config.num_layers + 1)
    assert reached(gradient.layers.attention) == [p <= first for p in layers]
    assert reached(gradient.layers.feed_forward) == [p < first for p in layers]
    assert reached(gradient.cca) == [False, False]
    assert np.abs(np.asarray(gradient.embedding.table[...])).max() > 0


def test_a_neighbour_is_encoded_by_itself_and_with_its_own_chunk(monkeypatch):
    """Changing one neighbour changes its E alone; changing a chunk's last token changes no earlier E."""
    model, batch = make_model(TINY), make_batch(TINY, rows=1)
    state = nnx.state(model)

    def run(changed: Any) -> np.ndarray:
        return np.asarray(jax.jit(_encoded(monkeypatch, model, changed))(state))[0]

    base = run(batch)
    neighbours = np.array(batch.neighbours)
    neighbours[0, 1, 0, 3] += 1 if neighbours[0, 1, 0, 3] < TINY.vocab_size - 1 else -1
    changed = np.abs(run(with_neighbours(batch, neighbours)) - base).max(axis=(2, 3))
    np.testing.assert_array_equal(np.argwhere(changed > 0), [[1, 0]])

    tokens = np.array(batch.tokens)
    last = 2 * TINY.chunk_length - 1
    tokens[0, last] += 1 if tokens[0, last] < TINY.vocab_size - 1 else -1
    other: Any = dataclasses.replace(batch, tokens=jnp.asarray(tokens))
    changed = np.abs(run(other) - base).max(axis=(1, 2, 3))
    np.testing.assert_array_equal(changed > 0, [False, True, True, True])


def test_the_conditioning_can_be_switched_off(monkeypatch):
    """Without encoder_cca_layers (an ablation of the paper) E does not depend on the decoder."""
    config: RetroConfig = dataclasses.replace(TINY, encoder_cca_layers=())
    model = make_model(config)
    encoded = _encoded(monkeypatch, model, make_batch(config))
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(encoded(params) ** 3)))(nnx.state(model))
    assert np.abs(np.asarray(gradient.encoder.embedding.table[...])).max() > 0
    for part in (gradient.layers, gradient.embedding, gradient.cca):
        assert all(np.abs(np.asarray(leaf)).max() == 0 for leaf in jax.tree.leaves(part))
