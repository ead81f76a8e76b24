"""What the frozen base computes is computed once, kept in few bits, and read instead."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from retro_jax.config import ExecutionConfig
from retro_jax.errors import UserError
from retro_jax.evaluate.k_sweep import sweep_losses
from retro_jax.model import Retro
from retro_jax.packed import pack
from retro_jax.retrofit.kept_states import KeptStates, StateFolder, state_bytes
from retro_jax.train.checkpoint import CHECKPOINTS, saved_arrays
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.plan import make_plan
from retro_jax.train.run import Run
from retro_jax.train.warm_start import StartConfig
from tests.retrofit.base_files import FOLDER
from tests.retrofit.test_fitting import (
    batch_of,
    config_of,
    digests,
    loaded,
    settings_of,
    with_gates,
)
from tests.train.test_run import DATA

BASE = str(FOLDER / "llama")
ERRORS = {"float16": 1e-3, "int8": 1e-2}  # of a state, as a share of its block's largest number


def kept_in(folder, config, form):
    """The kept states of the tiny base."""
    return KeptStates(folder, BASE, config, form)


@pytest.mark.parametrize("form", list(ERRORS))
def test_packed_numbers_are_near_the_numbers(form):
    x = np.random.default_rng(0).normal(size=(5, 3, 70)).astype(np.float32)
    x[..., 7] *= 1000  # a wide dimension costs its own block only
    x[0, 0] = 0
    packed = pack(jax.numpy.asarray(x), form)
    found = np.asarray(packed.unpacked())
    assert packed.nbytes < x.nbytes * (0.51 if form == "float16" else 0.35)
    for block in (slice(0, 32), slice(32, 64), slice(64, 70)):
        largest = np.abs(x[..., block]).max(axis=-1, keepdims=True)
        assert (np.abs(found - x)[..., block] <= ERRORS[form] * largest).all()


@pytest.mark.parametrize(("form", "one"), [("float16", 0), ("int8", 2)])
def test_batches_with_kept_states_have_the_same_losses(tmp_path, form, one):
    """Within the rounding; a later process reads what this one wrote; OFF reads none of it."""
    config, batch = config_of("llama", (2,), neighbour_layer=one), batch_of(k=2)
    kept = kept_in(tmp_path, config, form)
    with_states = kept.attach(batch)
    kept.flush()
    again = kept_in(tmp_path, config, form)
    assert len(again.neighbours) == len(kept.neighbours) == 13 and len(again.texts) == 2
    assert "13 neighbours" in again.summary()
    assert again.neighbours.nbytes == 13 * state_bytes(config, form)
    read = kept_in(tmp_path, config, form).attach(batch)
    for one_leaf, other in zip(jax.tree.leaves(with_states), jax.tree.leaves(read), strict=True):
        np.testing.assert_array_equal(one_leaf, other)
    model = with_gates(loaded(config, "llama"))
    losses = jax.jit(Retro.token_losses)
    wanted, found = losses(model, batch), losses(model, read)
    off = losses(model, batch.without_neighbours())
    assert np.abs(off - wanted).max() > 1
    np.testing.assert_allclose(found, wanted, atol=2 * ERRORS[form])
    np.testing.assert_array_equal(losses(model, read.without_neighbours()), off)
    np.testing.assert_allclose(jax.jit(sweep_losses([1, 2]))(model, read)[1], found, atol=1e-5)


def test_damaged_or_other_states_are_refused(tmp_path):
    config = config_of("llama", (2,))
    kept = kept_in(tmp_path, config, "int8")
    kept.attach(batch_of())
    kept.flush()
    folder = kept.neighbours.directory
    (manifest := folder / "manifest.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match=r"has states of .*'format': 0.*: expected"):
        kept_in(tmp_path, config, "int8")
    manifest.unlink()
    path = next(folder.glob("*-values.npy"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"-keys.npy is damaged .*: move .* away"):
        kept_in(tmp_path, config, "int8")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("values", lambda a: a[..., :-1], "values are int8 of shape .*"),
        ("values", lambda a: a.astype(np.float16), "values are float16"),
        ("scales", lambda a: a[:-1], "scales have shape"),
        ("scales", None, "scales are missing"),
    ],
)
def test_arrays_of_another_shape_are_damaged(tmp_path, name, change, message):
    config = config_of("llama", (2,))
    kept = kept_in(tmp_path, config, "int8")
    kept.attach(batch_of())
    kept.flush()
    path = next(kept.neighbours.directory.glob(f"*-{name}.npy"))
    if change is None:
        path.unlink()
    else:
        np.save(path, change(np.load(path)))
    with pytest.raises(UserError, match=rf"-keys.npy is damaged \({message}.*\): move .* away"):
        kept_in(tmp_path, config, "int8")


def test_a_base_of_other_settings_has_states_of_its_own(tmp_path):
    """The weights, and so the fingerprint, are the same."""
    shutil.copytree(FOLDER / "llama", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    config = config_of("llama", (2,))
    other = dataclasses.replace(config, norm_epsilon=0.5)
    kept = kept_in(tmp_path / "states", config, "int8")
    kept.attach(batch_of())
    kept.flush()
    edited = KeptStates(tmp_path / "states", str(tmp_path / "base"), other, "int8")
    assert len(kept.neighbours) == 13 and len(edited.neighbours) == len(edited.texts) == 0
    assert edited.neighbours.directory != kept.neighbours.directory


@pytest.mark.parametrize("form", list(ERRORS))
def test_numbers_that_do_not_fit_are_refused(tmp_path, form):
    """65,504 is float16's largest; a scale is a 127th of its block's largest number."""
    folder = StateFolder(tmp_path, {"packed": form})
    folder.add(b"0" * 16, jax.device_get(pack(jax.numpy.full((3, 32), 60_000.0), form)))
    with pytest.raises(UserError, match=f"base are not finite as {form}: expected Exec"):
        folder.add(b"1" * 16, jax.device_get(pack(jax.numpy.full((3, 32), 1e7), form)))
    assert len(folder) == 1


def with_kept(settings, form="int8"):
    """The same settings with kept states."""
    return dataclasses.replace(settings, execution=ExecutionConfig(kept_states=form))


def test_a_run_trains_on_kept_states_and_saves_no_base(tmp_path):
    """Nearly the same losses; gradients, moments and checkpoints of what is trained alone; it resumes."""
    settings = settings_of("llama", ("cca.*",), gate_factor=2.0)
    settings = dataclasses.replace(settings, retro=config_of("llama", (2,)))
    curves = {}
    for name, each in (("plain", settings), ("kept", with_kept(settings))):
        run = Run(tmp_path / name / "retro", make_plan(each, BatchShape.of(DATA.batches)), DATA)
        lines = curves.setdefault(name, [])
        run.on_metrics(lambda step, line, lines=lines: lines.append(line.get("loss", 0.0)))
        assert run.train() == 20
    np.testing.assert_allclose(curves["kept"], curves["plain"], atol=0.05)
    checkpoints = tmp_path / "kept" / "retro" / CHECKPOINTS
    names = saved_arrays(checkpoints, 20)
    assert all("cca." in name for name in names if name.startswith("params."))
    assert "params.cca.gate" in names and not any("layers." in name for name in names)
    trained = digests(nnx.state(run.model()))
    begun = digests(nnx.state(loaded(settings.retro, "llama")))
    changed = {name for name in begun if begun[name] != trained[name]}
    assert "cca.gate" in changed and all(name.startswith("cca.") for name in changed)
    (checkpoints / "20").rename(tmp_path / "away")
    again = Run(tmp_path / "kept" / "retro", run.plan, DATA)
    again.train()
    assert digests(nnx.state(again.model())) == trained

    start = StartConfig(run=str(run.directory), trained=("cca.gate",))
    more = make_plan(dataclasses.replace(settings, start=start), BatchShape.of(DATA.batches))
    tuned = Run(tmp_path / "more" / "retro", more, DATA)
    tuned.train()
    found = digests(nnx.state(tuned.model()))
    assert {name for name in found if found[name] != trained[name]} == {"cca.gate"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": ("*",)}, "kept_states is 'int8': expected '', or a StartConfig.base of which"),
        ({"fresh": ("layers.*",)}, "StartConfig.fresh leave all but"),
        ({"cca_layers": ()}, "expected '' without RetroConfig.cca_layers"),
        ({"dropout": 0.1}, "RetroConfig.dropout is 0.1: expected 0 with kept states"),
        ({"gated_cca": False}, "expected '' without DecoderForm.gated_cca"),
    ],
)
def test_states_that_training_changes_are_not_kept(changes, message):
    trained, fresh = changes.pop("trained", ("cca.*",)), changes.pop("fresh", ())
    retro = config_of("llama", (2,))
    form = dataclasses.replace(retro.form, gated_cca=changes.pop("gated_cca", True))
    retro = dataclasses.replace(retro, form=form, **changes)
    settings = with_kept(settings_of("llama", trained, retro=retro))
    settings = dataclasses.replace(settings, start=dataclasses.replace(settings.start, fresh=fresh))
    with pytest.raises(UserError, match=message):
        make_plan(settings, BatchShape.of(DATA.batches))
