"""train_step: its loss, its metrics, its randomness, and the same on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train.optimizer import OptimizerConfig
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.step import StepConfig, compile_train_step, drop_neighbours
from tests.train.small import CHUNKS, PAD, Trainer, host_batch


def _mesh(devices: int = 1):
    """A mesh with all devices on the data axis."""
    return make_mesh(MeshConfig(), jax.devices()[:devices])


def test_metrics_are_those_of_the_model():
    trainer = Trainer(_mesh())
    params = jax.device_get(trainer.state.params)
    batch = host_batch(0)
    losses = np.asarray(nnx.merge(trainer.graphdef, params).token_losses(batch), np.float64)
    present = batch.targets != PAD
    (metrics,) = trainer.run(range(1))
    assert metrics.tokens == present.sum() < present.size
    np.testing.assert_allclose(metrics.loss, losses[present].mean(), rtol=1e-6)
    for corpus in range(2):
        rows = present & (batch.corpus == corpus)[:, None]
        assert metrics.corpus_tokens[corpus] == rows.sum() > 0
        np.testing.assert_allclose(metrics.corpus_losses[corpus], losses[rows].sum(), rtol=1e-6)
    squares = sum(np.sum(np.square(p, dtype=np.float64)) for p in jax.tree.leaves(params))
    np.testing.assert_allclose(metrics.param_norm, np.sqrt(squares), rtol=1e-6)


def test_the_gradient_is_that_of_the_mean_loss():
    config = OptimizerConfig(
        max_learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=0.0, epsilon=1e8
    )  # with a huge epsilon, Adam's first update is -rate * gradient / epsilon
    trainer = Trainer(_mesh(), optimizer=config)
    before = jax.device_get(trainer.state.params)
    batch = host_batch(0)

    def mean(params):
        losses = nnx.merge(trainer.graphdef, params).token_losses(batch)
        return jnp.sum(losses * (batch.targets != PAD)) / np.sum(batch.targets != PAD)

    grads = named_leaves(jax.grad(mean)(before))
    (metrics,) = trainer.run(range(1))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    moments = {
        name.split(".mu.")[1]: leaf
        for name, leaf in named_leaves(trainer.state.opt_state).items()
        if ".mu." in name
    }
    for name, grad in grads.items():
        np.testing.assert_allclose(moments[name], 0.1 * grad, atol=1e-6, err_msg=name)


def test_training_lowers_the_loss_and_counts_steps():
    trainer = Trainer(_mesh())
    losses = [metrics.loss for metrics in trainer.run(range(40))]
    assert trainer.state.step == 40
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("neighbours", [True, False])
def test_eight_devices_equal_one(neighbours):
    one, eight = (Trainer(_mesh(devices), neighbour_dropout=0.4, dropout=0.1) for devices in (1, 8))
    for a, b in zip(*(t.run(range(10), neighbours=neighbours) for t in (one, eight)), strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
        np.testing.assert_array_equal(a.corpus_tokens, b.corpus_tokens)
        np.testing.assert_allclose(a.corpus_losses, b.corpus_losses, rtol=1e-5)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-4)
    assert eight.step._cache_size() == 1  # the new state lies as the old one did


def test_a_batch_of_padding_changes_no_number_to_nan():
    trainer = Trainer(_mesh())
    batch = dataclasses.replace(host_batch(0), targets=np.full_like(host_batch(0).targets, PAD))
    with jax.set_mesh(trainer.mesh):
        state, metrics = trainer.step(trainer.state, batch)
    assert metrics.loss == 0
    assert metrics.tokens == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_randomness_is_a_function_of_seed_and_step():
    def losses(seed: int, steps: range, start: int = 0):
        trainer = Trainer(_mesh(), dropout=0.5)
        trainer.state = dataclasses.replace(
            trainer.state, step=jax.device_put(np.int32(start), trainer.state.step.sharding)
        )
        trainer.step = compile_train_step(
            graphdef=trainer.graphdef, optimizer=trainer.optimizer, config=StepConfig(PAD, 2, seed)
        )
        return [float(metrics.loss) for metrics in trainer.run(steps)]

    first = losses(1, range(3))
    assert losses(1, range(3)) == first
    assert losses(2, range(1))[0] != first[0]
    # The same parameters and batch at another step: another mask.
    assert losses(1, range(1), start=5)[0] != first[0]


def test_neighbours_are_dropped_by_row_at_the_rate_asked_for():
    batch, key = host_batch(0, rows=2000), jax.random.key(3)
    dropped = drop_neighbours(batch, key, rate=0.3, pad_id=PAD).neighbours
    gone = np.all(np.asarray(dropped) == PAD, axis=(1, 2, 3))
    np.testing.assert_array_equal(dropped[~gone], batch.neighbours[~gone])
    assert 0.27 < gone.mean() < 0.33
    # A row's fate does not depend on how many rows there are: hosts make only theirs.
    few = dataclasses.replace(batch, **{k: v[:50] for k, v in vars(batch).items() if v is not None})
    again = drop_neighbours(few, key, rate=0.3, pad_id=PAD).neighbours
    np.testing.assert_array_equal(again, dropped[:50])
    assert again.shape[1] == CHUNKS


def test_frozen_parameters_stay_bitwise():
    def trainable(name):
        return name == "widen"

    trainer = Trainer(_mesh(), trainable=trainable)
    before = jax.device_get(named_leaves(trainer.state.params))
    trainer.run(range(3))
    for name, leaf in named_leaves(trainer.state.params).items():
        assert np.array_equal(leaf, before[name]) == (not trainable(name)), name


@pytest.mark.parametrize("devices", [1, 2])
def test_a_batch_in_parts_is_the_batch(devices):
    whole, parts = (Trainer(_mesh(devices), accumulate=count) for count in (1, 4))
    for a, b in zip(*(trainer.run(range(5)) for trainer in (whole, parts)), strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(a.corpus_losses, b.corpus_losses, rtol=1e-5)
        np.testing.assert_array_equal(a.corpus_tokens, b.corpus_tokens)


def test_the_average_follows_the_parameters():
    trainer = Trainer(_mesh(), average_decay=0.5)
    expected = np.float64(trainer.state.params["table"][...])
    for step, decay in enumerate(
        [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5]
    ):
        trainer.run(range(step, step + 1))
        expected = decay * expected + (1 - decay) * np.asarray(trainer.state.params["table"][...])
        average = trainer.state.average["table"][...]
        np.testing.assert_allclose(average, expected, rtol=1e-6 * (step + 2), atol=1e-7)
    assert trainer.step._cache_size() == 1


def test_a_bad_batch_leaves_everything_but_the_counts():
    trainer = Trainer(_mesh(), skip_bad_batches=True, loss_jump=0.5, average_decay=0.9)
    trainer.run(range(30))
    before = jax.device_get(named_leaves(trainer.state))
    table = before["params.table"]
    poisoned = dataclasses.replace(
        trainer.state,
        params=jax.tree.map(lambda leaf: leaf * np.float32(40), trainer.state.params),
    )
    kept = jax.device_get(named_leaves(poisoned))
    trainer.state = jax.tree.map(jnp.copy, poisoned)
    (metrics,) = trainer.run(range(30, 31))  # its loss is far above the mean of those before it
    assert metrics.bad
    assert metrics.loss > metrics.recent_loss + 0.5 > 0.5
    for name, leaf in named_leaves(trainer.state).items():
        counts = np.issubdtype(leaf.dtype, np.integer)
        assert np.array_equal(leaf, kept[name] + 1 if counts else kept[name]), name
    assert not np.array_equal(table, kept["params.table"])


def test_a_loss_is_not_judged_before_there_are_others():
    trainer = Trainer(_mesh(), loss_jump=1e-6)
    metrics = trainer.run(range(25))
    assert not any(step.bad for step in metrics[:20])
    losses = np.array([step.loss for step in metrics[:10]], np.float64)
    weights = 0.99 ** np.arange(9, -1, -1)
    np.testing.assert_allclose(
        metrics[10].recent_loss, (losses * weights).sum() / weights.sum(), rtol=1e-5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_corpora", 0),
        ("neighbour_dropout", 1.5),
        ("neighbour_dropout", -0.1),
        ("noise_target", "base"),
        ("accumulate", 0),
        ("loss_jump", -1.0),
        ("average_decay", 1.0),
    ],
)
def test_every_validation(field, value):
    with pytest.raises(UserError, match=rf"StepConfig\.{field} is {value!r}: expected"):
        StepConfig(**{"pad_id": 0, "num_corpora": 1, field: value})
