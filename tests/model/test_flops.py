"""The count of operations against the products of the traced model, and against the paper's sizes."""

import dataclasses
import math

import jax
import pytest
from flax import nnx

from retro_jax.config import POSITIONS, PRESETS, ExecutionConfig
from retro_jax.model import Retro
from retro_jax.model.flops import forward_flops, training_flops
from retro_jax.model.positions import positions_of
from tests.model.tiny import TINY, make_batch

UNROLLED = ExecutionConfig(scan_layers=False, attention="plain", loss_block=0)
CONFIG = dataclasses.replace(TINY, encoder_cca_layers=(1, 2))
# Kinds of positions that say that they multiply nothing: an error of theirs shows in the program.
NO_PRODUCT = [name for name in POSITIONS if not positions_of(name).flops_per_distance]


def products(jaxpr) -> float:
    """Operations of every dot_general of a program without loops."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * depth * equation.outvars[0].aval.size
        assert equation.primitive.name not in ("scan", "while")
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += products(inner)
    return total


def traced(config, k: int) -> float:
    """Operations a token of the plain forward pass."""
    batch = make_batch(config, rows=2, chunks=4, k=max(k, 1))
    neighbours = batch.neighbours if k else None
    graph, params = nnx.split(nnx.eval_shape(lambda: Retro(config, UNROLLED, rngs=nnx.Rngs(0))))

    def forward(params, tokens, neighbours):
        return nnx.merge(graph, params)(tokens, neighbours)

    return products(jax.make_jaxpr(forward)(params, batch.tokens, neighbours)) / batch.tokens.size


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("positions", NO_PRODUCT)
def test_every_product_that_is_needed_is_counted(positions, k):
    """The plain program makes what is counted, and what is masked: half of attention, CCA's padding."""
    config = dataclasses.replace(CONFIG, positions=positions)
    n, m, inner = 16, config.chunk_length, config.num_heads * config.head_dim
    masked = config.num_layers * inner * (4 * n - 2 * (n + 1))
    query = 4 * config.d_model * inner + 4 * k * config.neighbour_length * inner
    padding = len(config.cca_layers) * query * (m - 1) / n if k else 0
    needed = forward_flops(config, n, k).total
    assert traced(config, k) == pytest.approx(needed + masked + padding, rel=1e-12)


def test_relative_adds_half_of_what_attention_costs():
    """q.R(d): one product a query and distance, where q.k and weight.v are two a query and key."""
    rotary = dataclasses.replace(CONFIG, positions="rotary")
    n, k, m, r = 16, 2, CONFIG.chunk_length, CONFIG.neighbour_length
    inner = CONFIG.num_heads * CONFIG.head_dim
    ours, theirs = (forward_flops(config, n, k) for config in (CONFIG, rotary))
    assert ours.decoder - theirs.decoder == CONFIG.num_layers * inner * (n + 1)
    reads = len(CONFIG.cca_layers) * (n - m + 1) / n
    assert ours.cca - theirs.cca == pytest.approx(reads * 2 * r * inner)
    encoder = CONFIG.encoder_num_heads * CONFIG.encoder_head_dim
    assert ours.encoder - theirs.encoder == k * r / m * 2 * 2 * encoder * (r + m)
    silent = forward_flops(dataclasses.replace(CONFIG, cca_positions=False), n, k)
    assert silent.cca == theirs.cca


@pytest.mark.parametrize("size", ["172m", "425m", "1.5b", "7.5b"])
def test_published_sizes_cost_two_operations_a_parameter_and_token(size):
    """Without retrieval, and but for attention; R is a parameter that no token passes through."""
    config = PRESETS[size].baseline()
    flops = forward_flops(config, 1, 2)
    one_pair = 6 * config.num_layers * config.num_heads * config.head_dim
    of_r = config.num_layers * config.d_model * config.num_heads * config.head_dim
    weights = config.num_parameters(embeddings=False) - of_r
    assert flops.decoder - one_pair == pytest.approx(2 * weights, rel=1e-3)
    assert flops.read_out == 2 * 128_000 * config.d_model
    assert flops.cca == flops.encoder == 0


def test_training_is_three_forward_passes():
    config = PRESETS["172m"]
    assert training_flops(config, 2048, 2) == 2048 * 3 * forward_flops(config, 2048, 2).total
    assert training_flops(config, 2048, 0) == training_flops(config.baseline(), 2048, 2)
