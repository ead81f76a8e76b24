"""Dropout: on every residual branch and the embeddings, in training only, unbiased."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.model.layers import dropout
from tests.model.tiny import TINY, assert_close, make_batch, make_model, token_losses

CONFIG = dataclasses.replace(TINY, dropout=0.25)
KEY = jax.random.key(7)


def test_without_a_key_nothing_is_dropped():
    batch = make_batch(CONFIG)
    with_rate, without = make_model(CONFIG), make_model(TINY)
    np.testing.assert_array_equal(token_losses(with_rate, batch), token_losses(without, batch))


def test_with_a_key_losses_change_and_follow_the_key():
    model, batch = make_model(CONFIG), make_batch(CONFIG)
    evaluated = token_losses(model, batch)
    trained = token_losses(model, batch, KEY)
    assert np.abs(trained - evaluated).max() > 1e-2
    np.testing.assert_array_equal(token_losses(model, batch, KEY), trained)
    assert np.abs(token_losses(model, batch, jax.random.key(8)) - trained).max() > 1e-2


@pytest.mark.parametrize(
    "execution", [ExecutionConfig(scan_layers=False), ExecutionConfig(remat="full")]
)
def test_masks_do_not_depend_on_how_layers_run(execution):
    """The same key drops the same in a scan, unrolled and rematerialised."""
    batch = make_batch(CONFIG)
    wanted = token_losses(make_model(CONFIG), batch, KEY)
    assert_close(token_losses(make_model(CONFIG, execution), batch, KEY), wanted)


def test_kept_values_are_scaled_so_that_the_mean_stays():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 500)), jnp.float32)
    rate = 0.25
    dropped = np.asarray(dropout(x, rate, KEY))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], np.asarray(x)[kept] / (1 - rate), rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean() - (1 - rate)) < 5 * deviation
    assert abs(np.asarray(dropout(jnp.ones_like(x), rate, KEY)).mean() - 1) < 5 * deviation / 0.75
    np.testing.assert_array_equal(dropout(x, 0.0, KEY), x)
    np.testing.assert_array_equal(dropout(x, rate, None), x)


def _masks(monkeypatch: pytest.MonkeyPatch, config: RetroConfig) -> list[np.ndarray]:
    """Every mask that one training loss draws."""
    graph, params = nnx.split(make_model(config, ExecutionConfig(scan_layers=False)))
    batch = make_batch(config)
    draw = jax.random.bernoulli

    @jax.jit
    def loss(params: Any, key: jax.Array) -> list[jax.Array]:
        masks: list[jax.Array] = []

        def record(*args: Any, **kwargs: Any) -> jax.Array:
            masks.append(draw(*args, **kwargs))
            return masks[-1]

        with monkeypatch.context() as patch:
            patch.setattr(jax.random, "bernoulli", record)
            nnx.merge(graph, params).token_losses(batch, key)
        return masks

    return [np.asarray(mask) for mask in loss(params, KEY)]


def test_every_residual_branch_and_both_embeddings_are_dropped(monkeypatch):
    """One mask for each, of the stream's shape, and no two alike."""
    masks = _masks(monkeypatch, CONFIG)
    decoder = 1 + 2 * CONFIG.num_layers + len(CONFIG.cca_layers)
    encoder = 1 + 2 * CONFIG.encoder_num_layers + len(CONFIG.encoder_cca_layers)
    widths = [mask.shape[-1] for mask in masks]
    assert widths.count(CONFIG.d_model) == decoder
    assert widths.count(CONFIG.encoder_d_model) == encoder
    assert len(masks) == decoder + encoder
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    assert len(_masks(monkeypatch, CONFIG.baseline())) == 1 + 2 * CONFIG.num_layers
    assert not _masks(monkeypatch, TINY)
