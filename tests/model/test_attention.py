"""Attention's parts: the shift of distances, rotary turns, masks, and the blocks of queries."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import POSITIONS, ExecutionConfig
from retro_jax.model import attention as ops
from retro_jax.model import positions as kinds
from retro_jax.model.attention import Attention, Widths
from retro_jax.model.causal_attention import causal_attention
from retro_jax.model.layers import Layout
from retro_jax.model.positions import (
    NoPositions,
    Positions,
    distances,
    positions_of,
    rotate,
    shift,
    shift_by_slices,
    sinusoids,
)
from retro_jax.sharding import Shardings
from tests.model.tiny import TINY, assert_close
from tests.reference import retro_numpy


@pytest.mark.parametrize("shift", [shift, shift_by_slices])
@pytest.mark.parametrize("offset", [0, 3, -2])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 5), (5, 1), (3, 4), (4, 3), (6, 6), (12, 7)]
)
def test_shift_moves_each_distance_to_its_key(queries, keys, offset, shift):
    """Columns hold their own distance: after the shift, entry (i, j) is i - j + offset."""
    columns = distances(queries, keys, offset)
    assert columns.shape == (queries + keys - 1,)
    by_distance = jnp.broadcast_to(columns, (2, queries, queries + keys - 1))
    shifted = shift(by_distance, keys)
    expected = np.arange(queries)[:, None] - np.arange(keys) + offset
    np.testing.assert_array_equal(shifted, np.broadcast_to(expected, (2, queries, keys)))


@pytest.mark.parametrize("shift", [shift, shift_by_slices])
def test_shift_keeps_rows_apart(shift):
    """A row reads its own values only: row i, distance d holds 100 i + d."""
    table = 100 * np.arange(3)[:, None] + np.asarray(distances(3, 4))
    expected = 100 * np.arange(3)[:, None] + np.arange(3)[:, None] - np.arange(4)
    np.testing.assert_array_equal(shift(jnp.asarray(table), 4), expected)


def test_a_tpu_is_given_slices(monkeypatch):
    """libtpu takes hours over the reshape: a program for it has none of a row's whole width."""
    monkeypatch.setattr(kinds, "target_platform", lambda: "tpu")
    program = jax.jit(lambda x: shift(x, 7)).lower(jnp.zeros((12, 18))).as_text()
    assert "slice" in program
    assert f"tensor<{12 * 18}xf32>" not in program


def test_sinusoids_are_the_references():
    distances = [-130, -1, 0, 1, 63, 2047]
    expected = np.stack([retro_numpy.sinusoid(d, 12) for d in distances])
    assert_close(np.asarray(sinusoids(jnp.asarray(distances), 12)), expected, 1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_rotary_is_the_references_and_relative(platform, monkeypatch):
    """Equal to the reference, and a product of turned vectors depends on the distance alone."""
    monkeypatch.setattr(kinds, "target_platform", lambda: platform)
    x = np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float32)
    positions = np.array([0, 1, 2, 40, 100])
    turned = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions)))
    for t, position in enumerate(positions):
        for head in range(2):
            wanted = retro_numpy.rotate(x[t, head], position)
            np.testing.assert_allclose(turned[t, head], wanted, atol=1e-5)
    moved = np.asarray(rotate(jnp.asarray(x), jnp.asarray(positions + 17)))
    before = np.einsum("thk,shk->hts", turned, turned)
    np.testing.assert_allclose(np.einsum("thk,shk->hts", moved, moved), before, atol=1e-4)


def _qkv(queries: int, keys: int) -> list[jax.Array]:
    """Random query [T, 2, 4], key and value [S, 2, 4]."""
    rng = np.random.default_rng(0)
    sizes = (queries, keys, keys)
    return [jnp.asarray(rng.normal(size=(size, 2, 4)), jnp.float32) for size in sizes]


def test_a_query_without_keys_gets_zero_and_passes_no_gradient():
    """No NaN either: the row that may read nothing is zero and so are its gradients."""
    query, key, value = _qkv(3, 4)
    mask = jnp.asarray([[True] * 4, [False] * 4, [True, False, False, False]])[None]

    def total(args: Any) -> tuple[jax.Array, jax.Array]:
        query, key, value = args
        out = ops.attend(query, key, value, mask)
        return jnp.sum(out**2), out

    (_, out), gradient = jax.value_and_grad(total, has_aux=True)((query, key, value))
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_allclose(out[2], value[0], rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(gradient[0][1], 0)
    assert np.abs(gradient[0][0]).max() > 0


def test_large_logits_do_not_overflow():
    query, key, value = _qkv(2, 3)
    out = ops.attend(query * 1e4, key * 1e4, value, jnp.ones((1, 1, 3), bool))
    winner = np.argmax(np.einsum("thk,shk->hts", query, key), axis=-1)
    expected = np.stack([[value[winner[h, t], h] for h in range(2)] for t in range(2)])
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def _self_attention(positions: Positions, execution: ExecutionConfig) -> Any:
    """ATTN of one layer with random weights: a function of (x, documents)."""
    config = TINY
    layout = Layout(execution, Shardings())
    widths = Widths(config.d_model, config.d_model, config.num_heads, config.head_dim)

    def make() -> Attention:
        return Attention(
            config, widths, positions=positions, cross=False, layout=layout, rngs=nnx.Rngs(0)
        )

    graph, shapes = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    weights = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    module = nnx.merge(graph, weights)
    return jax.jit(lambda x, documents: causal_attention(module, x, documents, chunk_length=4))


@pytest.mark.parametrize("positions", [*map(positions_of, POSITIONS), NoPositions()], ids=str)
@pytest.mark.parametrize("block", [1, 2, 5, 12, 100])
def test_any_block_of_queries_gives_the_same(positions, block):
    """Blocks that divide the sequence of 12, that do not, of one query, and longer than it."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 12, TINY.d_model)), jnp.float32)
    documents = jnp.asarray([[0, 0, 1], [0, 1, 1]])
    plain = _self_attention(positions, ExecutionConfig(attention="plain"))
    blocked = ExecutionConfig(attention="chunked", attention_block=block)
    wanted = np.asarray(plain(x, documents))
    assert_close(np.asarray(_self_attention(positions, blocked)(x, documents)), wanted)
    alone = np.asarray(plain(x[:, 4:8], jnp.zeros((2, 1), int)))
    assert_close(wanted[1, 4:8], alone[1])  # a document's first chunk: as if the row began there
