"""Checkpoints: exact, sealed, and honest about what is wrong with them."""

import dataclasses
import errno
import logging
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train import checkpoint
from retro_jax.train.checkpoint import Checkpoints, find_damage, latest_step, restore_params
from retro_jax.train.parameter_names import map_named, named_leaves
from tests.train.small import Trainer


@pytest.fixture(name="trainer", scope="module")
def _trainer():
    """A trainer on two devices."""
    return Trainer(make_mesh(MeshConfig(), jax.devices()[:2]))


@pytest.fixture(name="saved")
def _saved(trainer, tmp_path):
    """Checkpoints of steps 2 and 4, and the states at those steps."""
    states = {}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    start = int(trainer.state.step)
    for step in (start + 2, start + 4):
        trainer.run(range(step - 2, step))
        checkpoints.save(trainer.state)
        states[step] = jax.device_get(named_leaves(trainer.state))
        trainer.run(range(0))
    checkpoints.close()
    return tmp_path / "checkpoints", states


def _assert_equal(state, expected):
    for name, leaf in named_leaves(state).items():
        assert np.asarray(leaf).tobytes() == np.asarray(expected[name]).tobytes(), name


def test_restoring_is_bitwise_and_keeps_shardings(trainer, saved):
    directory, states = saved
    state = Checkpoints(directory).restore(trainer.abstract)
    assert int(state.step) == max(states) == latest_step(directory)
    _assert_equal(state, states[max(states)])
    for name, leaf in named_leaves(state).items():
        assert leaf.sharding == named_leaves(trainer.abstract)[name].sharding


def test_training_on_while_writing_does_not_change_what_is_written(trainer, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    before = {n: np.array(leaf) for n, leaf in named_leaves(trainer.state).items()}
    checkpoints.save(trainer.state)
    trainer.run(range(5))  # donates the arrays that are being written
    checkpoints.wait()
    _assert_equal(checkpoints.restore(trainer.abstract), before)


def test_a_path_may_have_any_characters_or_is_refused(trainer, tmp_path, monkeypatch):
    name = "".join(sorted(set(map(chr, [*range(1, 127), 0xFC, 0x4E2D, 0x202E])) - set("/*?[\\")))
    checkpoints = Checkpoints(tmp_path / name)
    checkpoints.save(trainer.state)
    checkpoints.close()
    state = Checkpoints(tmp_path / name).restore(trainer.abstract)
    _assert_equal(state, named_leaves(trainer.state))
    for character in "*?[\\":
        with pytest.raises(UserError, match="expected a path without " + re.escape(character)):
            Checkpoints(tmp_path / f"a{character}1]")
    assert not list(tmp_path.glob("a*"))
    # Whatever the cause: what could not be restored is not a checkpoint.
    monkeypatch.setattr(checkpoint, "check_path", lambda path: None)
    checkpoints = Checkpoints(tmp_path / "a[1]")
    checkpoints.save(trainer.state)
    with pytest.raises(OSError, match=r"expected manifest\.ocdbt"):
        checkpoints.wait()
    assert not list((tmp_path / "a[1]").iterdir())


def test_no_checkpoint_is_none(trainer, tmp_path):
    assert Checkpoints(tmp_path / "new").restore(trainer.abstract) is None
    assert latest_step(tmp_path / "new") is None


@pytest.mark.parametrize("harm", ["halved", "emptied", "gone", "one bit"])
def test_every_harm_to_every_file_is_found(saved, harm):
    directory, states = saved
    path = directory / str(max(states))
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and "commit_success" not in f.name]
    files = [f for f in files if f.name != "_CHECKPOINT_METADATA"]  # holds times only
    assert len(files) > 5
    assert find_damage(path) is None
    for file in files:
        data = file.read_bytes()
        if harm == "gone":
            file.unlink()
        elif harm == "one bit":
            flipped = bytearray(data)
            flipped[len(data) // 2] ^= 1
            file.write_bytes(bytes(flipped))
        else:
            file.write_bytes(data[: len(data) // 2] if harm == "halved" else b"")
        assert find_damage(path) is not None, file
        file.write_bytes(data)
    assert find_damage(path) is None


def test_a_damaged_newest_checkpoint_is_set_aside_loudly(trainer, saved, caplog):
    directory, states = saved
    older, newest = sorted(states)
    largest = max(
        (directory / str(newest)).rglob("*"), key=lambda f: f.stat().st_size * f.is_file()
    )
    os.truncate(largest, largest.stat().st_size // 2)

    with caplog.at_level(logging.WARNING):
        step, params = restore_params(directory, trainer.abstract.params)
        assert (step, latest_step(directory)) == (older, newest)  # reading renames nothing
        checkpoints = Checkpoints(directory)
        state = checkpoints.restore(trainer.abstract)
    assert f"{newest} is damaged" in caplog.text
    assert "using the one before it" in caplog.text
    _assert_equal(state, states[older])
    _assert_equal({"params": params}, states[older])
    assert (directory / f"{newest}.damaged").is_dir()
    assert checkpoints.steps() == [older]
    # Its step can be reached, and damaged, again.
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(newest)))
    checkpoints.close()
    (directory / str(newest) / "sealed.json").unlink()
    Checkpoints(directory).restore(trainer.abstract)
    assert (directory / f"{newest}.damaged-2").is_dir()


def test_what_a_killed_write_leaves_is_no_checkpoint(trainer, saved):
    directory, states = saved
    (directory / "99.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    state = Checkpoints(directory).restore(trainer.abstract)
    assert int(state.step) == max(states)
    assert not (directory / "99.orbax-checkpoint-tmp").exists()


def test_keep_newest_and_keep_every(trainer, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(dataclasses.replace(trainer.state, step=jnp.int32(step)))
    checkpoints.close()
    assert checkpoints.steps() == [4, 6, 7]


def test_other_arrays_are_refused_by_name(trainer, saved):
    directory, states = saved
    checkpoints, path = Checkpoints(directory), directory / str(max(states))

    def with_(change):
        return map_named(
            lambda n, leaf: change(leaf) if n == "params.scale" else leaf, trainer.abstract
        )

    other_shape = with_(lambda s: jax.ShapeDtypeStruct((3, 8), s.dtype, sharding=s.sharding))
    with pytest.raises(
        UserError, match=r"params\.scale is float32\[2, 8\], expected float32\[3, 8\]"
    ):
        checkpoints.restore(other_shape)
    other_type = with_(lambda s: jax.ShapeDtypeStruct(s.shape, np.float16, sharding=s.sharding))
    with pytest.raises(UserError, match=r"params\.scale is float32\[2, 8\], expected float16"):
        restore_params(directory, other_type.params)
    with pytest.raises(
        UserError, match=r"holds params\.content_bias, which this model does not have"
    ):
        restore_params(directory, {"table": trainer.abstract.params["table"]})
    extra = {"more": jax.ShapeDtypeStruct((1,), np.float32)}
    with pytest.raises(UserError, match=r"lacks params\.more: expected float32\[1\]"):
        restore_params(directory, {**dict(trainer.abstract.params), **extra})
    with pytest.raises(UserError, match=r"no checkpoint of step 7777, expected one of \["):
        restore_params(directory, trainer.abstract.params, step=7777)
    with pytest.raises(UserError, match="no undamaged checkpoint"):
        restore_params(directory / "nowhere", trainer.abstract.params)
    assert find_damage(path) is None


def test_another_format_is_refused_and_not_called_damage(trainer, saved):
    directory, states = saved
    seal = directory / str(max(states)) / "sealed.json"
    seal.write_text(seal.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="has format 9: expected 1"):
        Checkpoints(directory).restore(trainer.abstract)
    assert seal.exists()


def test_a_checkpoint_moves_between_meshes(saved):
    directory, states = saved
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    trainer = Trainer(mesh)
    state = Checkpoints(directory).restore(trainer.abstract)
    _assert_equal(state, states[max(states)])
    assert "fsdp" in str(named_leaves(state)["params.widen"].sharding.spec)


def test_a_state_of_4_by_2_devices_goes_to_2_by_2_and_to_1(tmp_path):
    first = Trainer(make_mesh(MeshConfig(data=4, fsdp=2), jax.devices()))
    checkpoints = Checkpoints(tmp_path)
    first.run(range(2))
    checkpoints.save(first.state)
    expected = jax.device_get(named_leaves(first.state))
    checkpoints.close()
    for config, devices in ((MeshConfig(fsdp=2), 4), (MeshConfig(), 1)):
        trainer = Trainer(make_mesh(config, jax.devices()[:devices]))
        trainer.state = Checkpoints(tmp_path).restore(trainer.abstract)
        _assert_equal(trainer.state, expected)
        (metrics,) = trainer.run(range(2, 3))
        assert np.isfinite(metrics.loss)


def test_recent_losses_may_be_begun_or_dropped_when_a_run_goes_on(trainer, saved):
    directory, _ = saved
    judged = Trainer(trainer.mesh, loss_jump=1.0)
    state = Checkpoints(directory).restore(judged.abstract)
    np.testing.assert_array_equal(state.recent_loss, [0, 0])
    checkpoints = Checkpoints(directory)
    checkpoints.save(dataclasses.replace(state, step=jnp.int32(50), recent_loss=jnp.ones(2)))
    checkpoints.close()
    assert Checkpoints(directory).restore(trainer.abstract).recent_loss is None
    np.testing.assert_array_equal(
        Checkpoints(directory).restore(judged.abstract).recent_loss, [1, 1]
    )


def test_a_write_that_fails_is_an_os_error(trainer, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)

    def fail(path: pathlib.Path, paths):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("retro_jax.train.hashed_files.hash_files", fail)
    checkpoints.save(trainer.state)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.wait()
    assert latest_step(tmp_path) is None
