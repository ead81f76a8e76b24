"""No field of ExecutionConfig changes the numbers beyond tolerance, and each does change the program."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig, RetroConfig
from tests.model.tiny import TINY, assert_close, logits, make_batch, make_model

DEEP = dataclasses.replace(TINY, num_layers=4, cca_layers=(1, 2, 3), encoder_num_layers=1)
ROTARY = dataclasses.replace(DEEP, positions="rotary")
PLAIN = ExecutionConfig(attention="plain", loss_block=0)

# field: for each case the configuration, what changes on both sides, and the two values compared
CASES: dict[str, list[tuple[RetroConfig, dict[str, Any], Any, Any]]] = {
    "activation_dtype": [(DEEP, {}, "float32", "bfloat16")],
    "scan_layers": [(DEEP, {}, True, False)],
    "float32_gradients": [(DEEP, {"activation_dtype": "bfloat16"}, False, True)],
    "kept_states": [],  # of a frozen base: tests/retrofit/test_kept_states.py
    "remat": [
        (DEEP, {}, "none", "dots"),
        (DEEP, {}, "none", "full"),
        (DEEP, {"scan_layers": False}, "none", "full"),
    ],
    "attention": [
        (DEEP, {"attention_block": 10}, "plain", "chunked"),
        (DEEP, {"attention_block": 10}, "plain", "auto"),
        (ROTARY, {"attention_block": 10}, "plain", "chunked"),
    ],
    "attention_block": [(DEEP, {"attention": "chunked"}, 10, 12)],
    "loss_block": [(DEEP, {}, 0, 6)],
    "vocab_block": [(DEEP, {"loss_block": 8}, 0, 8)],
}
FIELDS = [field.name for field in dataclasses.fields(ExecutionConfig)]


@functools.cache
def trace(config: RetroConfig, execution: ExecutionConfig) -> Any:
    """The traced program of (gradient of the summed token losses, token losses)."""
    graph, params = nnx.split(make_model(config, execution))
    batch = make_batch(config, documents=True, padding=True)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        losses = nnx.merge(graph, params).token_losses(batch)
        return losses.sum(), losses

    return jax.jit(jax.grad(loss, has_aux=True)).trace(params)


def program(config: RetroConfig, execution: ExecutionConfig) -> str:
    """The traced program as text."""
    return re.sub(r"0x[0-9a-f]+", "", str(trace(config, execution).jaxpr))


@functools.cache
def losses_and_gradient(config: RetroConfig, execution: ExecutionConfig) -> tuple[Any, Any]:
    """Token losses [B, N], and the gradient of their sum by every parameter."""
    compiled = trace(config, execution).lower().compile()
    gradient, losses = compiled(nnx.state(make_model(config, execution)))
    return np.asarray(losses), jax.tree.map(np.asarray, gradient)


def test_every_field_has_a_case():
    assert set(CASES) == set(FIELDS)


@pytest.mark.parametrize(
    ("field", "config", "both", "one", "other"),
    [(field, *case) for field in FIELDS for case in CASES.get(field, [])],
)
def test_numbers_do_not_depend_on(field, config, both, one, other):
    """Losses and gradients agree, of every parameter; the programs do differ."""
    first = dataclasses.replace(PLAIN, **both, **({} if field in both else {field: one}))
    second = dataclasses.replace(first, **{field: other})
    assert program(config, first) != program(config, second)
    losses, gradient = losses_and_gradient(config, second)
    wanted_losses, wanted_gradient = losses_and_gradient(config, first)
    pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True))
    if field in (
        "activation_dtype",
        "float32_gradients",
    ):  # rounding adds up: the gradient's direction as a whole
        assert_close(losses, wanted_losses, tolerance=0.05)
        error = sum(np.sum((a - w) ** 2) for a, w in pairs)
        assert error < 0.05**2 * sum(np.sum(w**2) for _, w in pairs)
        return
    assert_close(losses, wanted_losses)
    for actual, wanted in pairs:
        assert_close(actual, wanted)


def test_remat_recomputes_and_scan_scans():
    """What the program holds: recomputed products and loops only where they are asked for."""
    count = {}
    for remat in ("none", "dots", "full"):
        text = program(DEEP, dataclasses.replace(PLAIN, remat=remat))
        count[remat] = text.count("dot_general")
    assert count["none"] < count["dots"] < count["full"]
    assert "scan[" in program(DEEP, PLAIN)
    assert "scan[" not in program(DEEP, dataclasses.replace(PLAIN, scan_layers=False))


def test_blocks_never_hold_all_logits():
    """[H, N, N] and [B, N, V] exist in the plain program and in no part of the blocked one."""
    n, v = 4 * DEEP.chunk_length, DEEP.vocab_size
    shapes = [f"[2,{DEEP.num_heads},{n},{n}]", f"[2,{n},{v}]"]
    blocks: Any = dataclasses.replace(PLAIN, attention="chunked", attention_block=10, loss_block=6)
    for shape in shapes:
        assert shape in program(DEEP, PLAIN)
        assert shape not in program(DEEP, blocks)
    assert "remat2[" not in program(DEEP, PLAIN)
    for change in ({"loss_block": 0}, {"attention": "plain"}):  # each makes its own blocks again
        assert "remat2[" in program(DEEP, dataclasses.replace(blocks, **change))


def test_bfloat16_activations_are_close_to_float32():
    """Logits stay float32 and agree to bfloat16's precision."""
    batch = make_batch(DEEP, documents=True, padding=True)
    wanted = logits(make_model(DEEP, PLAIN), batch)
    half = dataclasses.replace(PLAIN, activation_dtype="bfloat16")
    actual = logits(make_model(DEEP, half), batch)
    assert actual.dtype == np.float32
    assert_close(actual, wanted, tolerance=0.05)
    error = np.sqrt(np.mean((actual - wanted) ** 2) / np.mean(wanted**2))
    assert 0 < error < 0.02
