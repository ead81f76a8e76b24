"""model.safetensors and config.json: another library reads them, and the same model comes back."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from retro_jax.config import DecoderForm, ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.portable import open_portable, save_portable
from retro_jax.train.record import settings_text
from retro_jax.train.trained_model import TrainedModel

_CONFIG = RetroConfig(
    vocab_size=40,
    d_model=8,
    num_layers=2,
    num_heads=2,
    head_dim=4,
    d_ff=16,
    cca_layers=(2,),
    encoder_d_model=8,
    encoder_num_layers=1,
    encoder_num_heads=2,
    encoder_head_dim=4,
    encoder_d_ff=16,
    positions="rotary",
    form=DecoderForm(qk_norm=True),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model, saved, and its parameters."""
    place = tmp_path_factory.mktemp("portable") / "model"
    model = Retro(_CONFIG, ExecutionConfig(), rngs=nnx.Rngs(3))
    trained = TrainedModel("retro-7", model, settings_text([_CONFIG, ExecutionConfig()]), {}, {})
    count = save_portable(place, trained)
    leaves = named_leaves(nnx.split(model)[1])
    assert count == sum(leaf.size for leaf in leaves.values())
    return place, {name: np.asarray(leaf) for name, leaf in leaves.items()}


def test_other_libraries_read_it(folder):
    place, leaves = folder
    stored = load_file(place / "model.safetensors")
    assert set(stored) == set(leaves)
    for name, array in leaves.items():
        np.testing.assert_array_equal(stored[name], array)
    fields = json.loads((place / "config.json").read_text())
    assert fields["model_type"] == "retro_jax" and fields["d_model"] == 8
    assert fields["cca_layers"] == [2] and fields["form"]["qk_norm"] is True


def test_the_same_model_comes_back(folder):
    place, leaves = folder
    model = open_portable(place)
    assert model.config == _CONFIG
    again = named_leaves(nnx.split(model)[1])
    assert set(again) == set(leaves)
    for name, leaf in again.items():
        assert isinstance(leaf, jax.Array)
        np.testing.assert_array_equal(np.asarray(leaf), leaves[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, w: c.update(model_type="bert"), "model_type is 'bert': expected 'retro_jax'"),
        (lambda c, w: c.update(depth=3), r"has \['depth'\]: expected fields of RetroConfig"),
        (lambda c, w: c["form"].update(x=1), r"has \['x'\]: expected fields of DecoderForm"),
        (lambda c, w: c.update(d_model="8"), "d_model|not valid"),
        (lambda c, w: c.pop("vocab_size"), "vocab_size"),
        (lambda c, w: w.pop(min(w)), "lacks tensor"),
        (lambda c, w: w.update(more=np.zeros(1)), "has an unknown tensor more"),
        (lambda c, w: w.update({min(w): np.zeros(3)}), r"has shape \(3,\): expected"),
    ],
)
def test_what_does_not_fit_is_one_line(folder, tmp_path, change, message):
    place, leaves = folder
    config, weights = json.loads((place / "config.json").read_text()), dict(leaves)
    change(config, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_portable(tmp_path)


def test_missing_and_existing_files(folder, tmp_path):
    place, _ = folder
    with pytest.raises(UserError, match=r"config.json is missing"):
        open_portable(tmp_path)
    (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"model.safetensors is missing"):
        open_portable(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match=r"model.safetensors is not a readable safetensors file"):
        open_portable(tmp_path)
    with pytest.raises(UserError, match=r"config.json exists: expected a new folder|exists"):
        save_portable(place, TrainedModel("x", None, "", {}, {}))
