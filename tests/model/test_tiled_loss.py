"""The loss by tiles on a mesh; tests/model/test_execution.py has it on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.config import ExecutionConfig
from retro_jax.model.layers import Layout
from retro_jax.model.loss import token_losses
from retro_jax.parameters import parameter
from retro_jax.sharding import FSDP, MESH_SHARDINGS, TENSOR, MeshConfig, Shardings, make_mesh
from tests.model.tiny import assert_close

SPEC = P(TENSOR, FSDP)
PAD = 0
TILES = ExecutionConfig(loss_block=4, vocab_block=6)  # 3 tiles of each half, the last one filled up


def gradients(execution, h, table, targets, shardings=Shardings()):
    """Losses, and the gradients of a weighted sum by activations and table."""
    layout = Layout(execution, shardings)

    def weighted(h, table):
        losses = token_losses(h, parameter(table, SPEC), targets, pad_id=PAD, layout=layout)
        weights = 1.0 + jnp.arange(targets.shape[1], dtype=jnp.float32)
        return jnp.sum(losses * weights), losses

    (_, losses), grads = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(h, table)
    return losses, *grads


def example():
    """Activations [8, 8, 12], a table of 32 ids, and targets with padding."""
    rng = np.random.default_rng(0)
    h, table = (rng.normal(size=size).astype(np.float32) for size in ((8, 8, 12), (32, 12)))
    targets = rng.integers(0, 32, (8, 8), np.int32)
    targets[0, :3] = PAD
    targets[1, :4] = 14, 15, 16, 31  # at the borders of tiles and devices
    return h, table, targets


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mesh_has_the_losses_and_gradients_of_one_block(dtype):
    h, table, targets = example()
    h = jnp.asarray(h, dtype)
    tiles = dataclasses.replace(TILES, activation_dtype=dtype)
    plain = dataclasses.replace(tiles, loss_block=0, vocab_block=0)
    wanted = gradients(plain, h, table, targets)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        placed = jax.device_put(table, NamedSharding(mesh, SPEC))
        found = gradients(
            tiles, jax.device_put(h, rows), placed, jax.device_put(targets, rows), MESH_SHARDINGS
        )
    assert found[2].dtype == jnp.float32 and found[2].sharding.spec == SPEC
    for actual, expected in zip(found, wanted, strict=True):
        assert actual.dtype == expected.dtype
        pair = (np.asarray(x, np.float32) for x in (actual, expected))
        assert_close(*pair, tolerance=1e-5 if dtype == "float32" else 2e-2)
