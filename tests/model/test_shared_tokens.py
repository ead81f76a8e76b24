"""Neighbours that share too little with their chunk are not read (RetroConfig.min_shared_tokens)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import DecoderForm, RetroConfig
from retro_jax.errors import UserError
from retro_jax.evaluate.k_sweep import sweep_losses
from retro_jax.model.shared_tokens import shared_tokens
from retro_jax.sharding import abstract_parameters
from retro_jax.train.loop import TrainConfig
from retro_jax.train.plan import Settings, model_maker
from tests.model.tiny import TINY, assert_close, logits, make_batch, make_model, with_neighbours

# Of a chunk of 4 tokens, of which a neighbour has 0 to 4.
LEAST = 0.5
ROTARY = dataclasses.replace(TINY, positions="rotary")
CONFIGS: dict[str, RetroConfig] = {
    "the paper's": TINY,
    "gated": dataclasses.replace(ROTARY, form=DecoderForm(gated_cca=True)),
    "one softmax": dataclasses.replace(
        ROTARY, form=DecoderForm(gated_cca=True, shared_softmax=True)
    ),
}


def share(chunk: Any, neighbour: Any, pad_id: int) -> float:
    """The same by sets."""
    own = set(np.asarray(chunk).tolist()) - {pad_id}
    return len(own & set(np.asarray(neighbour).tolist())) / len(own) if own else 0.0


def related_batch(config: RetroConfig) -> Any:
    """Sequences whose neighbours' chunks share some tokens, and their continuations all of them."""
    batch = make_batch(config, k=3, documents=True, padding=True)
    neighbours = np.array(batch.neighbours)
    chunks = np.asarray(batch.tokens).reshape(*neighbours.shape[:2], config.chunk_length)
    rng = np.random.default_rng(1)
    kept = rng.random(neighbours[..., : config.chunk_length].shape) < 0.4
    own = neighbours[..., : config.chunk_length]
    neighbours[..., : config.chunk_length] = np.where(kept, chunks[:, :, None], own)
    neighbours[..., config.chunk_length :] = chunks[:, :, None]
    return with_neighbours(batch, neighbours)


def shares(config: RetroConfig, batch: Any) -> np.ndarray:
    """[B, C, K] by sets, of the neighbours' chunks."""
    neighbours, length = np.asarray(batch.neighbours), config.chunk_length
    chunks = np.asarray(batch.tokens).reshape(*neighbours.shape[:2], length)
    found = np.zeros(neighbours.shape[:3])
    for place in np.ndindex(*found.shape):
        found[place] = share(chunks[place[:2]], neighbours[place][:length], config.pad_id)
    return found


def cut(config: RetroConfig, batch: Any) -> Any:
    """The batch with padding for every neighbour that shares less than LEAST."""
    read = shares(config, batch) >= LEAST
    assert 0.1 < read.mean() < 0.9
    neighbours = np.where(read[..., None], np.asarray(batch.neighbours), config.pad_id)
    return with_neighbours(batch, neighbours)


def test_shares_by_hand():
    """Tokens that a chunk repeats count once; padding is no token, and an empty chunk shares nothing."""
    chunks = jnp.array([[[5, 5, 7, 0], [0, 0, 0, 0], [1, 2, 3, 4]]])
    neighbours = jnp.array(
        [[[[7, 7, 9], [5, 7, 0]], [[0, 0, 0], [1, 2, 3]], [[4, 4, 2], [0, 0, 0]]]]
    )
    found = shared_tokens(chunks, neighbours, 0)
    np.testing.assert_array_equal(found, [[[0.5, 1.0], [0.0, 0.0], [0.5, 0.0]]])


def test_shares_are_those_of_sets():
    batch = related_batch(TINY)
    neighbours = np.asarray(batch.neighbours)[..., : TINY.chunk_length]
    chunks = np.asarray(batch.tokens).reshape(*neighbours.shape[:2], -1)
    found = shared_tokens(jnp.asarray(chunks), jnp.asarray(neighbours), TINY.pad_id)
    np.testing.assert_allclose(found, shares(TINY, batch), rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_others_are_as_if_they_were_absent(name):
    plain, batch = CONFIGS[name], related_batch(CONFIGS[name])
    model = make_model(dataclasses.replace(plain, min_shared_tokens=LEAST))
    expected = logits(make_model(plain), cut(plain, batch))
    assert_close(logits(model, batch), expected)
    assert np.abs(logits(make_model(plain), batch) - expected).max() > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sweep_leaves_them_out_too(name):
    plain, batch = CONFIGS[name], related_batch(CONFIGS[name])
    losses = nnx.jit(sweep_losses((1, 3)))
    found = losses(make_model(dataclasses.replace(plain, min_shared_tokens=LEAST)), batch)
    assert_close(found, losses(make_model(plain), cut(plain, batch)))


def test_without_a_chunk_there_is_nothing_to_compare():
    """Nor where a part of the chunk is left out: shares would be others."""
    for length in (TINY.chunk_length, 2 * TINY.chunk_length - 1):
        message = f"min_shared_tokens is 0.5: expected 0 where neighbour_length is {length}"
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TINY, neighbour_length=length, min_shared_tokens=0.5)
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"min_shared_tokens is .*: expected from 0 to 1"):
            dataclasses.replace(TINY, min_shared_tokens=value)


def test_training_reads_all():
    """The values that a model is read with are chosen after training."""
    strict = dataclasses.replace(TINY, min_shared_tokens=LEAST)
    make = model_maker(Settings(retro=strict, training=TrainConfig(steps=1)))
    model = nnx.merge(*abstract_parameters(make))
    assert model.config == TINY
