"""The kernel over few keys, interpreted, against the plain form: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig
from retro_jax.model import few_keys, short_kernel
from retro_jax.model.attention import Attention, Widths
from retro_jax.model.few_keys import FewKeys, attend_few
from retro_jax.model.layers import Layout
from retro_jax.model.positions import NoPositions, positions_of
from retro_jax.sharding import (
    MESH_SHARDINGS,
    MeshConfig,
    Shardings,
    batch_sharding,
    make_mesh,
    parameter_shardings,
)
from tests.model.tiny import TINY, assert_close

ITEMS, QUERIES, KEYS = (4, 2), 32, 32
# Which keys are read; the first item of each row has none.
READABLE = np.arange(KEYS) < np.array([[0, KEYS], [0, 20], [KEYS, KEYS], [1, 7]])[..., None]
MAY_READ = np.arange(QUERIES) % 5 != np.array([[1, 2], [3, 4], [0, 9], [9, 9]])[..., None]
CASES = {
    "self": (None, FewKeys(jnp.asarray(READABLE))),
    "texts": (1, FewKeys(jnp.asarray(READABLE), texts=2)),
    "neighbours": (1, FewKeys(jnp.asarray(READABLE), jnp.asarray(MAY_READ), 15, neighbours=2)),
}


def make(positions, cross, dtype, shardings):
    """An attention with numbers in its biases, split into (graph, parameters)."""
    layout = Layout(ExecutionConfig(activation_dtype=dtype), shardings)
    kind = NoPositions() if positions == "none" else positions_of(positions)
    attention = Attention(
        TINY,
        Widths(12, 12, 2, 64),
        positions=kind,
        cross=cross,
        layout=layout,
        rngs=nnx.Rngs(0),
    )
    graph, params = nnx.split(attention)
    draw = np.random.default_rng(1)
    return graph, jax.tree.map(lambda x: x + 0.3 * draw.normal(size=x.shape).astype("f4"), params)


def output_and_gradients(graph, params, streams, few):
    """The output, and the gradients of a weighted sum by parameters and streams."""

    def weighted(params, x, context):
        out = attend_few(nnx.merge(graph, params), x, context, few)
        wave = jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return jnp.sum(out.astype(jnp.float32) * wave[:1]), out

    found = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True))(params, *streams)
    (_, out), gradients = found
    return [out, *jax.tree.leaves(gradients)]


def interpret(monkeypatch):
    """Has the kernel's path taken here."""
    sizes = short_kernel.Short
    monkeypatch.setattr(few_keys, "target_platform", lambda: "tpu")
    monkeypatch.setattr(short_kernel, "Short", lambda *counts: sizes(*counts, interpret=True))


@pytest.mark.parametrize(
    ("case", "positions"),
    [
        *((case, positions) for case in CASES for positions in ("relative", "rotary")),
        ("self", "none"),
    ],
)
def test_the_kernel_is_the_plain_form(case, positions, monkeypatch):
    cross, few = CASES[case]
    draw = np.random.default_rng(0)
    streams = [draw.normal(size=(*ITEMS, n, 12)).astype(np.float32) for n in (QUERIES, KEYS)]
    streams[1] = streams[1] if cross else None
    split = make(positions, bool(cross), "float32", Shardings())
    wanted = output_and_gradients(*split, streams, few)
    interpret(monkeypatch)
    found = output_and_gradients(*split, streams, few)
    for actual, expected in zip(found, wanted, strict=True):
        assert_close(np.asarray(actual), np.asarray(expected))
    reads = READABLE.any(axis=-1)[..., None] & (True if few.may_read is None else MAY_READ)
    assert not np.asarray(found[0])[~np.broadcast_to(reads, (*ITEMS, QUERIES))].any()


@pytest.mark.parametrize(("case", "positions"), [("self", "rotary"), ("neighbours", "relative")])
def test_a_mesh_splits_its_rows_and_heads_in_bfloat16(case, positions, monkeypatch):
    cross, few = CASES[case]
    draw = np.random.default_rng(0)
    streams = [jnp.asarray(draw.normal(size=(*ITEMS, n, 12)), "bfloat16") for n in (QUERIES, KEYS)]
    streams[1] = streams[1] if cross else None
    wanted = output_and_gradients(
        *make(positions, bool(cross), "bfloat16", Shardings()), streams, few
    )
    graph, params = make(positions, bool(cross), "bfloat16", MESH_SHARDINGS)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = jax.tree.map(jax.device_put, params, parameter_shardings(params, mesh))
    streams, few = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), (streams, few))
    interpret(monkeypatch)
    with jax.set_mesh(mesh):
        found = output_and_gradients(graph, params, streams, few)
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == expected.dtype
        pair = (np.asarray(x, np.float32) for x in (actual, expected))
        assert_close(*pair, tolerance=3e-2)
