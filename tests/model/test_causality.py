"""What may influence what, by gradient: exactly zero where nothing may pass, non-zero where it must.

Every token of the sequence and of the neighbours has an id of its own, and decoder, encoder and
read-out have tables of their own, so the gradient of an output by a row of a table is its gradient
by one input position.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import POSITIONS, ExecutionConfig, RetroConfig
from tests.model.tiny import TINY, make_model

CHUNKS, NEIGHBOURS = 4, 2
M, R = TINY.chunk_length, TINY.neighbour_length
N = CHUNKS * M
CONFIG = dataclasses.replace(TINY, vocab_size=1 + N + CHUNKS * NEIGHBOURS * R)


class Influence(NamedTuple):
    """Largest absolute gradient of output n by an input: tokens [N, N], neighbours [N, C, K, R]."""

    tokens: np.ndarray
    neighbours: np.ndarray


def influence_of(
    config: RetroConfig, documents: list[int], execution: ExecutionConfig = ExecutionConfig()
) -> Influence:
    """The Jacobian of all outputs by all inputs, reduced to magnitudes."""
    graph, params = nnx.split(make_model(config, execution))
    tokens = jnp.arange(1, N + 1)[None]
    neighbours = jnp.arange(N + 1, config.vocab_size).reshape(1, CHUNKS, NEIGHBOURS, R)
    projection = jnp.asarray(np.random.default_rng(0).normal(size=config.d_model), jnp.float32)

    def outputs(tables: tuple[jax.Array, jax.Array]) -> jax.Array:
        model = nnx.merge(graph, jax.tree.map(jnp.asarray, params))  # variables of this trace
        model.embedding.table[...] = tables[0]
        model.encoder.embedding.table[...] = tables[1]
        return model.hidden_states(tokens, neighbours, jnp.asarray([documents]))[0] @ projection

    tables = (params.embedding.table[...], params.encoder.embedding.table[...])
    by_token, by_neighbour = jax.jit(jax.jacrev(outputs))(tables)
    size = np.abs(np.asarray(by_token)).max(-1), np.abs(np.asarray(by_neighbour)).max(-1)
    assert np.isfinite(size[0]).all()
    assert np.isfinite(size[1]).all()
    return Influence(size[0][:, 1 : N + 1], size[1][:, N + 1 :].reshape(N, CHUNKS, NEIGHBOURS, R))


def assert_pattern(size: np.ndarray, expected: np.ndarray) -> None:
    """Exactly zero where nothing is expected, non-zero everywhere else."""
    np.testing.assert_array_equal(size > 0, expected)


def earlier(documents: list[int]) -> np.ndarray:
    """[N, N]: token i is not after token n and of the same document."""
    owner = np.repeat(documents, M)
    return (np.arange(N)[:, None] >= np.arange(N)) & (owner[:, None] == owner)


def boundary(chunk: int) -> int:
    """The last token of a chunk (from 0): the first that may know the chunk's neighbours."""
    return chunk * M + M - 1


@pytest.mark.parametrize(
    ("positions", "execution"),
    [
        *((positions, ExecutionConfig()) for positions in POSITIONS),
        ("relative", ExecutionConfig(scan_layers=False, attention="chunked", attention_block=5)),
    ],
)
def test_causality(positions, execution):
    """Tokens: nothing after the position. Neighbours of chunk u: nothing before its last token."""
    config = dataclasses.replace(CONFIG, positions=positions)
    influence = influence_of(config, [0] * CHUNKS, execution)
    assert_pattern(influence.tokens, earlier([0] * CHUNKS))
    expected = np.zeros(influence.neighbours.shape, bool)
    for chunk in range(CHUNKS):
        expected[boundary(chunk) :, chunk] = True
    assert_pattern(influence.neighbours, expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_single_cca_reads_one_chunk_of_neighbours(positions):
    """With CCA in the last layer alone, E_u reaches exactly the last token of u and the next M - 1."""
    config = dataclasses.replace(CONFIG, positions=positions, cca_layers=(CONFIG.num_layers,))
    influence = influence_of(config, [0] * CHUNKS)
    expected = np.zeros(influence.neighbours.shape, bool)
    for chunk in range(CHUNKS):
        expected[boundary(chunk) : boundary(chunk) + M, chunk] = True
    assert_pattern(influence.neighbours, expected)


@pytest.mark.parametrize("documents", [[0, 0, 1, 1], [3, 1, 1, -1]])
def test_documents_are_kept_apart(documents):
    """No token and no neighbour reaches another document; a chunk's last token reads its own."""
    influence = influence_of(CONFIG, documents)
    assert_pattern(influence.tokens, earlier(documents))
    expected = np.zeros(influence.neighbours.shape, bool)
    for chunk in range(CHUNKS):
        same = np.repeat(np.array(documents) == documents[chunk], M)
        expected[:, chunk] = (same & (np.arange(N) >= boundary(chunk)))[:, None, None]
    assert_pattern(influence.neighbours, expected)
