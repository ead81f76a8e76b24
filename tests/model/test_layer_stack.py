"""The loop over a stack of layers: every layer once, extras where they belong, any carry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.config import PRESETS, ExecutionConfig
from retro_jax.model.layer_stack import (
    Extras,
    LayerGroup,
    layer_groups,
    run_layers,
    stack_layers,
)


def test_the_groups_of_the_papers_sizes():
    """Layers before layer min(P) = 6, and those after it: groups of three."""
    config = PRESETS["172m"]
    assert layer_groups(1, 5, ()) == [LayerGroup(1, False, 5)]
    assert layer_groups(7, config.num_layers, config.cca_layers) == [LayerGroup(3, True, 2)]
    config = PRESETS["7.5b"]
    groups = layer_groups(7, config.num_layers, config.cca_layers)
    assert groups == [LayerGroup(3, True, 8), LayerGroup(1, False, 2)]


def test_the_groups_of_the_modules_head():
    assert layer_groups(2, 9, (3, 6, 9)) == [LayerGroup(2, True, 1), LayerGroup(3, True, 2)]


@given(st.integers(1, 20), st.integers(1, 20), st.sets(st.integers(1, 20)))
@settings(deadline=None)
def test_every_layer_is_in_one_group_and_extras_are_where_they_belong(first, last, chosen):
    layer, extra_layers = first - 1, []
    for group in layer_groups(first, last, sorted(chosen)):
        for _ in range(group.repeats):
            layer += group.size
            extra_layers += [layer] if group.has_extra else []
    assert layer == max(last, first - 1)
    assert extra_layers == sorted(p for p in chosen if first <= p <= last)


class Affine(nnx.Module):
    """x -> a x + 1."""

    def __init__(self, rngs: nnx.Rngs):
        self.a = nnx.Param(jax.random.normal(rngs.params()))


def _record(layer, extra, carry, p, one):
    """Runs a layer, and writes its output into a cache of all layers."""
    x, cache = carry
    x = layer.a[...] * x + one
    if extra is not None:
        x = x - extra.a[...]
    return x, jax.lax.dynamic_update_slice(cache, x[None], (p - 1,))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_cache_travels_with_the_stream(scan_layers, remat):
    """Layers 3 to 7 of 8: each writes its own row, the others' rows stay as they were."""
    layers, stack = (stack_layers(Affine, n, nnx.Rngs(n)) for n in (8, 3))
    execution = dataclasses.replace(ExecutionConfig(), scan_layers=scan_layers, remat=remat)
    x, cache = run_layers(
        _record,
        (jnp.float32(0.5), jnp.full(8, -1.0)),
        (layers, Extras(stack, (2, 4, 6))),
        first=3,
        last=7,
        shared=jnp.float32(1.0),
        execution=execution,
    )
    wanted, value = np.full(8, -1.0, np.float32), np.float32(0.5)
    for p in range(3, 8):
        value = np.asarray(layers.a)[p - 1] * value + np.float32(1.0)
        if p in (4, 6):
            value = value - np.asarray(stack.a)[{4: 1, 6: 2}[p]]
        wanted[p - 1] = value
    np.testing.assert_allclose(cache, wanted, rtol=1e-6)
    np.testing.assert_allclose(x, wanted[6], rtol=1e-6)
