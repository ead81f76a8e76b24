"""Weights reach a mesh stacked, sharded as asked, and with one tensor on the host."""

import tracemalloc

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.canonical import stacked_name, stacked_shapes
from retro_jax.retrofit.placing import load_stacked
from tests.retrofit.base_files import FOLDER, many_layers


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [np.float32, jax.numpy.bfloat16])
def test_stacked_tensors_are_those_of_the_layers(name, dtype):
    base = open_base(FOLDER / name)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding_of(stacked, shape):
        axis = 1 if stacked.startswith("layers.") else 0
        divisible = len(shape) > axis and shape[axis] % 4 == 0
        spec = [None] * axis + ["fsdp"] if divisible else []
        return NamedSharding(mesh, PartitionSpec(*spec))

    placed = load_stacked(base, sharding_of, dtype)
    assert {key: array.shape for key, array in placed.items()} == stacked_shapes(base.config)
    for key, array in base.stream(dtype):
        stacked, layer = stacked_name(key)
        found = placed[stacked] if layer is None else placed[stacked][layer]
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found), array, err_msg=key)
    for key, array in placed.items():
        assert array.sharding.is_equivalent_to(sharding_of(key, array.shape), array.ndim), key
    assert placed["embedding"].addressable_shards[0].data.shape == (24, 32)
    up = placed["layers.up"].addressable_shards[0].data.shape
    assert up == (base.config.num_layers, 8, base.config.d_ff)


def test_the_host_has_one_tensor_at_a_time(tmp_path):
    many_layers(tmp_path)
    base = open_base(tmp_path)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    load_stacked(base, lambda name, shape: device)  # compiles, which leaves memory behind
    tracemalloc.start()
    try:
        placed = load_stacked(base, lambda name, shape: device)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest, total = placed["embedding"].nbytes, sum(array.nbytes for array in placed.values())
    row = max(array.nbytes // 40 for name, array in placed.items() if name.startswith("layers."))
    assert 10 * (largest + 2 * row) < total
    # On a CPU the embedding's device array may be the host's own, and stay beside the rows after it.
    assert largest < peak < 1.2 * largest + 2 * row
    np.testing.assert_array_equal(placed["layers.output"][:, 1, 1, 1], np.arange(1, 41))
