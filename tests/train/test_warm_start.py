"""Beginning with another run's parameters, and training only some."""

import jax
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train.checkpoint import Checkpoints
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.warm_start import StartConfig, begin, trainable
from tests.train.small import Trainer


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory):
    """Checkpoints of a run with averaged parameters, and its last state."""
    trainer = Trainer(make_mesh(MeshConfig(), jax.devices()[:2]), average_decay=0.5)
    checkpoints = Checkpoints(tmp_path_factory.mktemp("start"))
    trainer.run(range(3))
    checkpoints.save(trainer.state)
    state = jax.device_get(named_leaves(trainer.state))
    checkpoints.close()
    return checkpoints.directory, state


def test_fine_tuning_begins_with_the_parameters_and_a_new_schedule(saved):
    directory, states = saved
    fresh = Trainer(make_mesh(MeshConfig(fsdp=2), jax.devices()[:4]), seed=9, average_decay=0.9)
    before = jax.device_get(named_leaves(fresh.state))
    for averaged, source in ((False, "params."), (True, "average.")):
        config = StartConfig("W", averaged=averaged, fresh=("widen",))
        state = begin(config, fresh.state, directory)
        assert state.step == 0
        for name, leaf in named_leaves(state).items():
            part, _, short = name.partition(".")
            if part in ("params", "average") and short != "widen":
                expected = states[source + short]
            else:
                expected = before[name]
            np.testing.assert_array_equal(leaf, expected, err_msg=name)
    fresh.state = state
    assert np.isfinite(fresh.run(range(1))[0].loss)


def test_a_parameter_that_is_neither_there_nor_fresh_is_named(saved):
    directory, _ = saved
    trainer = Trainer(make_mesh(MeshConfig(), jax.devices()[:1]))
    trainer.state.params["more"] = trainer.state.params["scale"]
    with pytest.raises(UserError, match=r"lacks params\.more: expected float32\[2, 8\]"):
        begin(StartConfig("W"), trainer.state, directory)
    begin(StartConfig("W", fresh=("more",)), trainer.state, directory)
    with pytest.raises(UserError, match="no checkpoint of step 77"):
        begin(StartConfig("W", step=77, fresh=("more",)), trainer.state, directory)


def test_only_what_matches_is_trained():
    params = {"encoder": {"scale": np.zeros(1)}, "table": np.zeros(1)}
    assert trainable(StartConfig(), params) is None
    chosen = trainable(StartConfig(trained=("encoder.*",)), params)
    assert (chosen("encoder.scale"), chosen("table")) == (True, False)
    for field in ("trained", "fresh"):
        config = StartConfig("W", **{field: ("decoder.*",)})
        with pytest.raises(UserError, match=rf"StartConfig\.{field} has 'decoder\.\*', which no"):
            trainable(config, params)
    with pytest.raises(UserError, match=r"StartConfig\.gates is 1\.0: expected 0 without"):
        trainable(StartConfig(gates=1.0), params)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1),
        ("step", 4),
        ("averaged", True),
        ("fresh", ("*",)),
        ("trained", ()),
    ],
)
def test_every_validation(field, value):
    with pytest.raises(UserError, match=r"StartConfig\.\w+ is "):
        StartConfig(**{field: value})
    with pytest.raises(UserError, match=r"StartConfig\.base is 'B': expected ''"):
        StartConfig(run="W", base="B")
