"""CCA alone: which token reads which chunk's neighbours, at every boundary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig
from retro_jax.model.chunked_cross_attention import ChunkedCrossAttention
from retro_jax.model.layers import Layout
from retro_jax.sharding import Shardings
from tests.model.tiny import TINY, assert_close

M, R, E = TINY.chunk_length, TINY.neighbour_length, TINY.encoder_d_model


def make_cca() -> Any:
    """A CCA with random weights: a compiled function of (h, encoded, present, documents)."""
    layout = Layout(ExecutionConfig(), Shardings())
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: ChunkedCrossAttention(TINY, layout=layout, rngs=nnx.Rngs(0)))
    )
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    return jax.jit(nnx.merge(graph, weights))


def inputs(chunks: int, k: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    """h [1, N, D], encoded [1, C, K, R, E], present [1, C, K, R]."""
    rng = np.random.default_rng(1)
    h = jnp.asarray(rng.normal(size=(1, chunks * M, TINY.d_model)), jnp.float32)
    encoded = jnp.asarray(rng.normal(size=(1, chunks, k, R, E)), jnp.float32)
    return h, encoded, jnp.ones((1, chunks, k, R), bool)


def readers(chunks: int, changed: int, documents: list[int] | None) -> list[int]:
    """The tokens whose output changes when E of one chunk does."""
    cca, (h, encoded, present) = make_cca(), inputs(chunks)
    owners = None if documents is None else jnp.asarray([documents])
    other = encoded.at[:, changed].multiply(-1.0)
    difference = np.abs(cca(h, encoded, present, owners) - cca(h, other, present, owners))
    return np.flatnonzero(difference[0].max(axis=-1)).tolist()


@pytest.mark.parametrize("documents", [None, [0, 0, 0]])
def test_the_last_token_and_the_next_three_read_a_chunk(documents):
    """The worked trace of the module's head: M = 4, C = 3."""
    assert readers(3, 0, documents) == [3, 4, 5, 6]
    assert readers(3, 1, documents) == [7, 8, 9, 10]
    assert readers(3, 2, documents) == [11]


def test_another_document_does_not_read_but_the_last_token_does():
    assert readers(3, 0, [0, 1, 1]) == [3]
    assert readers(3, 1, [0, 1, 1]) == [7, 8, 9, 10]
    assert readers(3, 1, [0, 0, -1]) == [7]
    assert readers(3, 2, [0, 0, -1]) == [11]  # a padding chunk reads its own, which is padding


def test_one_chunk_is_read_by_its_last_token():
    assert readers(1, 0, None) == [M - 1]


def test_no_retrieval_is_exactly_zero():
    """The first M - 1 tokens, and whoever finds only padding."""
    cca, (h, encoded, present) = make_cca(), inputs(3)
    out = np.asarray(cca(h, encoded, present.at[:, 1].set(False), None))[0]
    silent = [0, 1, 2, 7, 8, 9, 10]
    np.testing.assert_array_equal(out[silent], 0)
    assert (np.abs(np.delete(out, silent, axis=0)).max(axis=-1) > 0).all()


def test_one_softmax_over_all_neighbours():
    """A neighbour twice is the neighbour once: weights are shared among slots, not summed."""
    cca, (h, encoded, present) = make_cca(), inputs(2, k=1)
    twice = [jnp.concatenate([x, x], axis=2) for x in (encoded, present)]
    once = np.asarray(cca(h, encoded, present, None))
    assert_close(np.asarray(cca(h, *twice, None)), once)
    mixed = jnp.concatenate([encoded, -encoded], axis=2)
    assert np.abs(np.asarray(cca(h, mixed, twice[1], None)) - once).max() > 0.01
