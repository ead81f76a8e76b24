"""The schedule and what weight decay and freezing act on."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.parameters import parameter
from retro_jax.sharding import FSDP, TENSOR, MeshConfig, make_mesh
from retro_jax.train.checkpoint import Checkpoints
from retro_jax.train.muon import is_matrix, scale_by_muon
from retro_jax.train.optimizer import OptimizerConfig, decay_mask, learning_rate, make_optimizer
from retro_jax.train.parameter_names import map_named, named_leaves
from tests.train.small import Trainer

_TINY = RetroConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_heads=2,
    head_dim=4,
    d_ff=24,
    cca_layers=(2,),
    chunk_length=4,
    neighbour_length=8,
    encoder_d_model=8,
    encoder_num_heads=2,
    encoder_head_dim=4,
    encoder_d_ff=16,
)
_CONFIG = OptimizerConfig(max_learning_rate=2e-4, warmup_steps=750)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-7),
        (1, 1e-7 + (2e-4 - 1e-7) / 750),
        (375, (2e-4 + 1e-7) / 2),
        (750, 2e-4),
        (3000, 2e-5 + 1.8e-4 * 0.5 * (1 + math.cos(math.pi * 2250 / 9250))),
        (5375, 1.1e-4),  # half way down: the mean of first and last
        (10_000, 2e-5),
        (12_000, 2e-5),
    ],
)
def test_learning_rate_is_the_papers(step, expected):
    schedule = learning_rate(_CONFIG, 10_000)
    assert float(schedule(jnp.int32(step))) == pytest.approx(expected, rel=1e-5)
    assert not isinstance(schedule(step), jax.Array)  # a number does not wait for the device
    assert schedule(step) == pytest.approx(expected, rel=1e-5)


def test_no_warmup_starts_at_the_maximum():
    schedule = learning_rate(OptimizerConfig(warmup_steps=0), 10)
    assert float(schedule(0)) == pytest.approx(2e-4)


def test_a_constant_schedule_stays_and_a_restart_begins_anew():
    constant = learning_rate(dataclasses.replace(_CONFIG, schedule="constant"), 10_000)
    once = learning_rate(_CONFIG, 2000)
    twice = learning_rate(dataclasses.replace(_CONFIG, restarts=(2000, 9999)), 5000)
    whole = learning_rate(_CONFIG, 3000)
    for step in (0, 375, 749, 750, 1999):
        assert twice(step) == once(step) == pytest.approx(float(twice(jnp.int32(step))), rel=1e-5)
        assert constant(step) == (once(step) if step < 750 else np.float32(2e-4))
    for step in (2000, 2100, 2750, 4999, 6000):
        assert (
            twice(step)
            == whole(step - 2000)
            == pytest.approx(float(twice(jnp.int32(step))), rel=1e-5)
        )
    with pytest.raises(UserError, match="fewer than the run's 500 steps from 2000 to 2500"):
        learning_rate(dataclasses.replace(_CONFIG, restarts=(2000,)), 2500)


@pytest.mark.parametrize(
    "config",
    [
        OptimizerConfig(algorithm="adafactor"),
        OptimizerConfig(moment_dtype="bfloat16"),
        OptimizerConfig(algorithm="muon"),
    ],
    ids=["adafactor", "moments in bfloat16", "muon"],
)
def test_other_optimisers_learn_with_less_state(config):
    config = dataclasses.replace(config, max_learning_rate=0.01, warmup_steps=2)
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    trainer, usual = Trainer(mesh, optimizer=config), Trainer(mesh)
    losses = [float(metrics.loss) for metrics in trainer.run(range(12))]
    assert np.mean(losses[-3:]) < losses[0] - 0.1
    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(one.state.opt_state))
        for one in (trainer, usual)
    ]
    assert sizes[0] < 0.85 * sizes[1]


# A layer's matrices: shape, spec, and how many axes are summed over and count matrices.
_MATRICES = {
    "query_key_value": ((16, 3, 2, 4), P(FSDP, None, TENSOR, None), (1, 1)),
    "output": ((2, 4, 16), P(TENSOR, None, FSDP), (2, 0)),
    "narrow": ((24, 16), P(TENSOR, FSDP), (1, 0)),
}


def test_muon_on_a_mesh_is_optaxs():
    muon, rng = scale_by_muon(0.95), np.random.default_rng(0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    values, grads = {}, {}
    for name, (shape, spec, _) in _MATRICES.items():
        values[name] = rng.standard_normal((2, *shape)).astype(np.float32)
        grads[name] = jax.device_put(values[name], NamedSharding(mesh, P(None, *spec)))
    with jax.set_mesh(mesh):
        state, update = jax.jit(muon.init)(grads), jax.jit(muon.update)
        for _ in range(2):
            found, state = update(grads, state)
    for name, (_, spec, (summed, batch)) in _MATRICES.items():
        assert found[name].sharding.spec == P(None, *spec)
        rows = tuple(range(1, 1 + summed))
        columns = tuple(range(1 + summed + batch, found[name].ndim))
        dims = optax.contrib.MuonDimensionNumbers(rows, columns)
        reference = optax.contrib.scale_by_muon(weight_dimension_numbers={"x": dims})
        held = reference.init({"x": values[name]})
        for _ in range(2):
            wanted, held = reference.update({"x": values[name]}, held)
        longest = max(math.prod(found[name].shape[a] for a in part) for part in (rows, columns))
        scaled = 0.2 * math.sqrt(longest) * np.asarray(wanted["x"])
        np.testing.assert_allclose(found[name], scaled, rtol=1e-3, atol=1e-4, err_msg=name)


def test_muon_trains_every_matrix_of_a_layer_and_nothing_else():
    model = nnx.eval_shape(lambda: Retro(_TINY, rngs=nnx.Rngs(0)))
    shapes = named_leaves(nnx.state(model))
    decaying = {n for n, keep in named_leaves(decay_mask(nnx.state(model))).items() if keep}
    tables = {name for name in shapes if name.endswith("table")}
    assert {name for name in shapes if is_matrix(name)} == decaying - tables
    assert is_matrix("layers.feed_forward.gate")
    assert not is_matrix("cca.gate") and not is_matrix("read_out")
    for name, (shape, _, _) in _MATRICES.items():  # and these are its shapes
        (real,) = (s for n, s in shapes.items() if n.startswith("layers.") and n.endswith(name))
        assert real.shape == (2, *shape)


def test_a_run_with_muon_goes_on_from_its_checkpoint(tmp_path):
    config = OptimizerConfig(algorithm="muon", max_learning_rate=0.01, warmup_steps=2)
    trainer = Trainer(make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]), optimizer=config)
    checkpoints, ends = Checkpoints(tmp_path), []
    trainer.run(range(2))
    checkpoints.save(trainer.state)
    checkpoints.wait()
    for _ in range(2):
        trainer.run(range(2, 4))
        ends.append({n: np.asarray(leaf) for n, leaf in named_leaves(trainer.state).items()})
        trainer.state = checkpoints.restore(trainer.abstract)
    checkpoints.close()
    assert any(".mu.widen" in name for name in ends[0])
    assert not any(".nu.widen" in name for name in ends[0])
    assert all(np.array_equal(leaf, ends[1][name]) for name, leaf in ends[0].items())


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps is 750: expected fewer than the run's 750"):
        learning_rate(_CONFIG, 750)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_learning_rate", 0.0),
        ("initial_learning_rate", 1.0),
        ("warmup_steps", -1),
        ("final_fraction", 1.1),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("clip_norm", -1.0),
        ("gate_factor", 0.0),
        ("algorithm", "sgd"),
        ("moment_beta", 1.0),
        ("moment_dtype", "float8"),
        ("schedule", "linear"),
        ("restarts", (0,)),
        ("restarts", (4, 4)),
    ],
)
def test_every_validation(field, value):
    with pytest.raises(
        UserError, match=rf"OptimizerConfig\.{field} is {re.escape(repr(value))}: expected"
    ):
        OptimizerConfig(**{field: value})


def _tiny_params(**overrides):
    """The parameters of a small RETRO, with layers stacked; all ones."""
    sizes = {"vocab_size": 16, "d_model": 8, "num_layers": 2, "num_heads": 2, "head_dim": 4}
    sizes |= {"d_ff": 16, "cca_layers": (2,), "chunk_length": 4, "neighbour_length": 8}
    sizes |= {"encoder_d_model": 8, "encoder_num_heads": 2, "encoder_head_dim": 4}
    config = RetroConfig(**{**sizes, "encoder_d_ff": 16, **overrides})
    _, shapes = nnx.split(nnx.eval_shape(lambda: Retro(config, rngs=nnx.Rngs(0))))
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


def test_weight_decay_spares_scales_and_biases_of_stacked_layers():
    params = _tiny_params(tie_embeddings=False)
    decayed = {name for name, acts in named_leaves(decay_mask(params)).items() if acts}
    spared = set(named_leaves(params)) - decayed

    def last(names):
        return {name.rsplit(".", 1)[-1] for name in names}

    assert last(spared) == {"scale", "content_bias", "position_bias"}
    assert last(decayed) == {"table", "read_out", "query_key_value", "query", "key_value"} | {
        "relative",
        "output",
        "widen",
        "narrow",
    }


def test_decay_is_decoupled_and_times_the_learning_rate():
    config = OptimizerConfig(warmup_steps=0, weight_decay=0.1, max_learning_rate=1e-2)
    three = jnp.full((2, 2), 3.0)
    params = {
        "table": parameter(three, P(None, None)),
        "scale": parameter(three, P(None), decays=False),
    }
    optimizer = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["table"][...], -1e-2 * 0.1 * 3.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["scale"][...], 0.0)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(warmup_steps=0, weight_decay=0.0, clip_norm=1.0, epsilon=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    optimizer = make_optimizer(config, 10)
    grads = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}  # norm 50: clipped to 0.6 and 0.8
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    for name, clipped in (("a", 0.6), ("b", 0.8)):
        expected = -2e-4 * clipped / (clipped + 1.0)  # Adam's first step, with epsilon 1
        np.testing.assert_allclose(updates[name], [expected], rtol=1e-5)


def test_gates_have_a_learning_rate_of_their_own():
    params = {"cca": {"gate": jnp.ones(2), "query": jnp.ones(2)}}
    found = []
    for factor in (1.0, 8.0):
        config = OptimizerConfig(warmup_steps=0, gate_factor=factor)
        optimizer = make_optimizer(config, 10, lambda name: name.startswith("cca."))
        found.append(optimizer.update(params, optimizer.init(params), params)[0]["cca"])
    np.testing.assert_allclose(found[1]["gate"], 8 * found[0]["gate"], rtol=1e-6)
    np.testing.assert_array_equal(found[1]["query"], found[0]["query"])


def test_frozen_parameters_have_no_moments_do_not_move_and_do_not_count_in_the_norm():
    def trainable(name):
        return name.startswith(("cca", "encoder"))

    params = _tiny_params()
    config = OptimizerConfig(warmup_steps=0, clip_norm=1.0)
    optimizer = make_optimizer(config, 10, trainable)
    moments = {
        name.split(".mu.")[1] for name in named_leaves(optimizer.init(params)) if ".mu." in name
    }
    assert moments == {name for name in named_leaves(params) if trainable(name)}

    update_once = jax.jit(optimizer.update)

    def update(frozen_gradient: float):
        grads = map_named(
            lambda name, p: np.full_like(p, 1e-3 if trainable(name) else frozen_gradient), params
        )
        return named_leaves(update_once(grads, optimizer.init(params), params)[0])

    small, large = update(0.0), update(1e6)
    for name, change in small.items():
        np.testing.assert_array_equal(change, large[name])
        assert bool(jnp.any(change != 0)) == trainable(name), name
