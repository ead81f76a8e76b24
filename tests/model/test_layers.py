"""Initialisation of the parameters and the plan of a scan over layers."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from retro_jax.config import PRESETS, RetroConfig
from retro_jax.model import Retro
from retro_jax.model.layer_stack import Run, plain_runs, runs_after
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


def test_the_plan_of_the_papers_sizes():
    """The docstring's example: layers 1..5, layer 6 alone, then groups of three."""
    config = PRESETS["172m"]
    assert plain_runs(5) == [Run(1, False, 5)]
    assert runs_after(config, 6) == [Run(3, True, 2)]
    config = PRESETS["7.5b"]
    assert runs_after(config, 6) == [Run(3, True, 8), Run(1, False, 2)]


@given(st.integers(1, 20), st.sets(st.integers(1, 20), min_size=1))
@settings(deadline=None)
def test_every_plan_runs_each_layer_once_and_cca_where_p_says(num_layers, chosen):
    cca_layers = tuple(sorted(p for p in chosen if p <= num_layers)) or (num_layers,)
    config: RetroConfig = dataclasses.replace(TINY, num_layers=num_layers, cca_layers=cca_layers)
    first = cca_layers[0]
    layer, crossed = first, [first]
    for run in runs_after(config, first):
        for _ in range(run.repeats):
            layer += run.size
            crossed += [layer] if run.cca else []
    assert layer == num_layers
    assert tuple(crossed) == cca_layers
