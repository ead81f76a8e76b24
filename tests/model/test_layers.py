"""Initialisation of the parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.config import ExecutionConfig
from retro_jax.model import Retro
from retro_jax.model.layers import Embedding, Layout
from retro_jax.parameters import parameter
from retro_jax.sharding import MESH_SHARDINGS, MeshConfig, Shardings, make_mesh
from tests.model.tiny import TINY


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    """Every parameter of a newly made model by its path."""
    return parameters(Retro(TINY, rngs=nnx.Rngs(0)))


def parameters(model: Retro) -> dict[str, Any]:
    """Path to array."""
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))[0]
    return {".".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def test_scales_are_one_biases_zero_and_weights_drawn_by_fan_in(fresh):
    inner = TINY.num_heads * TINY.head_dim
    narrow = 1 / math.sqrt(2 * TINY.num_layers * TINY.d_model)  # what writes to the residual stream
    deviations = {
        "embedding.table": TINY.d_model**-0.5,
        "layers.attention.query_key_value": TINY.d_model**-0.5,
        "layers.attention.output": narrow * inner**-0.5,
        "layers.feed_forward.widen": TINY.d_model**-0.5,
        "layers.feed_forward.narrow": narrow * TINY.d_ff**-0.5,
        "cca.attention.key_value": TINY.encoder_d_model**-0.5,
    }
    for path, value in fresh.items():
        assert value.dtype == np.float32
        if path.endswith("scale"):
            np.testing.assert_array_equal(value, 1)
        elif path.endswith("_bias"):
            np.testing.assert_array_equal(value, 0)
        else:
            assert np.abs(value.mean()) < 5 * value.std() / math.sqrt(value.size)
        if path in deviations:
            assert value.std() == pytest.approx(deviations[path], rel=0.15)


def test_no_two_weights_are_drawn_alike(fresh):
    """Neither two parameters nor two layers of a stack share their draw."""
    rows = []
    for path, value in fresh.items():
        if path.endswith("scale") or path.endswith("_bias"):
            continue
        stacked = path.startswith(("layers.", "cca.", "encoder.layers.", "encoder.cross"))
        rows += [layer.ravel()[:8] / value.std() for layer in (value if stacked else [value])]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert np.abs(row - other).max() > 1e-3


def test_the_seed_decides(fresh):
    again = parameters(Retro(TINY, rngs=nnx.Rngs(0)))
    other = parameters(Retro(TINY, rngs=nnx.Rngs(1)))
    for path, value in fresh.items():
        np.testing.assert_array_equal(again[path], value)
    assert any(np.abs(other[path] - value).max() > 0.01 for path, value in fresh.items())


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    layout = Layout(ExecutionConfig(activation_dtype="bfloat16"), Shardings())
    embedding = Embedding(3, 2, layout=layout, rngs=nnx.Rngs(0))
    graph, params = nnx.split(embedding)

    def total(params, tokens):
        rows = nnx.merge(graph, params)(tokens)
        assert rows.dtype == jax.numpy.bfloat16
        return rows.astype(np.float32).sum()

    gradient = jax.grad(total)(params, np.ones(4096, np.int32))["table"][...]
    np.testing.assert_array_equal(gradient, [[0, 0], [4096, 4096], [0, 0]])


@pytest.mark.parametrize(("summed", "wanted"), [(True, 263.0), (False, 264.0)])
def test_gradients_of_weights_are_summed_in_float32(summed, wanted):
    """Over devices: 256 and seven times 1, which bfloat16 rounds to 264."""
    execution = ExecutionConfig(activation_dtype="bfloat16", float32_gradients=summed)
    layout = Layout(execution, MESH_SHARDINGS)
    mesh = make_mesh(MeshConfig(fsdp=8))
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    values = jnp.where(jnp.arange(8) == 0, 256.0, 1.0).astype(jnp.bfloat16)
    x = jax.device_put(jnp.broadcast_to(values[:, None, None], (8, 1, 16)), rows)
    weight = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("fsdp", None)))

    def total(weight, added):
        param = parameter(weight, P("fsdp", None))
        y = layout.product(x, param, out_sharding=layout.shardings.rows(3))
        y = (y + layout.vector(parameter(added, P(None))) * x[..., :1]).astype(jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32))

    with jax.set_mesh(mesh):
        grads = jax.jit(jax.grad(total, (0, 1)))(weight, jnp.ones(4))
    for grad in grads:
        assert grad.dtype == jnp.float32
        np.testing.assert_array_equal(grad, wanted)
