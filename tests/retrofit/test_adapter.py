"""Adapters: the same logits again, and one line for files that are not those that were exported."""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.retrofit import open_base
from retro_jax.retrofit.adapter import FORMAT_VERSION, export_adapter, load_adapter, open_adapter
from retro_jax.retrofit.decoder import load_decoder
from tests.retrofit.base_files import FOLDER
from tests.retrofit.test_fitting import batch_of, config_of, logits, with_gates


def fitted(layers=(1,)) -> Retro:
    """A model whose gates and queries of CCA are not the base's."""
    model = with_gates(load_decoder(open_base(FOLDER / "llama"), config_of("llama", layers)))
    model.cca.attention.query[...] = model.cca.attention.query[...] + 0.3
    return model


@pytest.fixture(name="exported", scope="module")
def _exported(tmp_path_factory):
    """A folder with the adapters of CCA in layer 1 and in layer 2, and the first one's model."""
    folder, model = tmp_path_factory.mktemp("adapters"), fitted()
    export_adapter(folder / "1", open_base(FOLDER / "llama"), model)
    export_adapter(folder / "2", open_base(FOLDER / "llama"), fitted((2,)))
    return folder, model


# Fitted by experiments/fit_smollm2_gates.gin; the base is not here.
SHARED = pathlib.Path(__file__).parents[2] / "experiments" / "adapters" / "smollm2_gates"


def refused(folder, message, base=FOLDER / "llama"):
    """The adapter is refused in one line."""
    with pytest.raises(UserError, match=message) as raised:
        load_adapter(folder, open_base(base))
    assert "\n" not in str(raised.value)


def edited(folder, change):
    """Applies a function to adapter.json."""
    path = folder / "adapter.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def test_an_adapter_gives_the_fitted_model_again(exported):
    folder, model = exported
    again, batch = load_adapter(folder / "1", open_base(FOLDER / "llama")), batch_of()
    assert again.config == model.config
    np.testing.assert_array_equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format_version=2), "has format 2: expected 1"),
        (
            lambda s: s.update(retro={"widths": 3}),
            "has other settings .*widths.*: expected an adap",
        ),
        (lambda s: s.update(retro=[1]), r"other settings \(retro in retro\): expected an adapter"),
        (lambda s: s["retro"].pop("pad_id"), r"other settings \(pad_id in retro\): expected an ad"),
        (lambda s: s["retro"].update(form=None), r"\(retro.form in retro.form\): expected an adap"),
        (lambda s: s["retro"]["form"].pop("shared_softmax"), r"\(shared_softmax in retro.form\)"),
        (
            lambda s: s["retro"]["form"].update(shared_softmax="False"),
            "retro.form.shared_softmax is 'False': expected a value of type bool",
        ),
        (
            lambda s: s["retro"]["form"].update(sink_id=2.5),
            "sink_id is 2.5: expected a value of type",
        ),
        (
            lambda s: s["retro"]["form"].update(sink_id=96),
            "adapter.json: .*sink_id is 96: expected",
        ),
        (lambda s: s["retro"].update(cca_layers=[1.0]), r"is \[1.0\]: expected a list of integers"),
        (
            lambda s: s["retro"].update(chunk_length=0),
            "adapter.json: .*chunk_length is 0: expected",
        ),
        (lambda s: s["decoder"].update(form=[1]), "with norm None: expected that, found 'rms'"),
        (lambda s: s.update(decoder=3), "with vocab_size None: expected that, found 96"),
        (lambda s: s.update(tensors_sha256="0" * 64), "safetensors is not that of adapter.json be"),
    ],
)
def test_edited_settings_are_refused(exported, tmp_path, change, message):
    shutil.copytree(exported[0] / "1", tmp_path / "a")
    edited(tmp_path / "a", change)
    refused(tmp_path / "a", message)


@pytest.mark.parametrize(
    "change",
    [
        lambda path, other: shutil.copy(other, path),
        lambda path, _: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
        lambda path, _: save_file({"cca.gate": load_file(path)["cca.gate"]}, path),
    ],
)
def test_tensors_of_other_settings_are_refused(exported, tmp_path, change):
    """Those of another adapter of the same base, a flipped bit, fewer of them."""
    shutil.copytree(exported[0] / "1", tmp_path / "a")
    change(tmp_path / "a" / "adapter.safetensors", exported[0] / "2" / "adapter.safetensors")
    refused(
        tmp_path / "a", "adapter.safetensors is not that of adapter.json beside it: expected SHA"
    )


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"cca.gate": (2, 3)}, r"cca.gate has shape \(2, 3\): expected \(1, 4\)"),
        ({"norm.scale": (32,)}, "norm.scale has shape .*: expected"),
        ({}, "adapter.safetensors has no tensor cca.gate: expected one, as adapters have"),
        (None, "adapter.safetensors: cca.gate has values that are not finite: expected numbers"),
    ],
)
def test_bad_tensors_are_refused(exported, tmp_path, tensors, message):
    """Also where the settings are of the first adapters, without a hash."""
    shutil.copytree(exported[0] / "1", tmp_path / "a")
    edited(tmp_path / "a", lambda s: (s.pop("tensors_sha256"), s.pop("decoder")))
    path = tmp_path / "a" / "adapter.safetensors"
    arrays = {name: np.zeros(shape, np.float32) for name, shape in (tensors or {}).items()}
    if tensors is None:
        arrays = load_file(path)
        arrays["cca.gate"][0, 0] = np.nan
    save_file(arrays, path)
    refused(tmp_path / "a", message)


def test_an_adapter_of_an_earlier_version_lacks_what_came_later(exported, tmp_path):
    shutil.copytree(exported[0] / "1", tmp_path / "a")
    edited(tmp_path / "a", lambda s: s["retro"]["form"].pop("neighbour_distance"))
    edited(tmp_path / "a", lambda s: s["retro"].pop("min_shared_tokens"))
    again = load_adapter(tmp_path / "a", open_base(FOLDER / "llama"))
    assert again.config == exported[1].config and not again.config.form.neighbour_distance


def test_which_neighbours_are_read_is_not_bound_to_the_adapter(exported):
    """Another least share may be chosen; what its tensors were made for may not."""
    adapter = open_adapter(exported[0] / "1", open_base(FOLDER / "llama"))
    adapter.check_config(dataclasses.replace(adapter.config, min_shared_tokens=0.4))
    with pytest.raises(UserError, match=r"RetroConfig\.chunk_length is 2: expected 4, that of"):
        adapter.check_config(dataclasses.replace(adapter.config, chunk_length=2))


@pytest.mark.parametrize("file", ["adapter.json", "adapter.safetensors"])
def test_a_missing_or_damaged_file_is_refused(exported, tmp_path, file):
    shutil.copytree(exported[0] / "1", tmp_path / "a")
    (tmp_path / "a" / file).write_bytes(b"")
    refused(tmp_path / "a", f"{re.escape(file)} .*(: expected a|not valid JSON)")
    (tmp_path / "a" / file).unlink()
    refused(tmp_path / "a", f"{re.escape(file)} is missing: expected that of an adapter")


def test_half_precision_is_read_as_the_parameter(exported, tmp_path):
    shutil.copytree(exported[0] / "1", tmp_path / "a")
    edited(tmp_path / "a", lambda s: s.pop("tensors_sha256"))
    path = tmp_path / "a" / "adapter.safetensors"
    save_file({n: a.astype(np.float16) for n, a in load_file(path).items()}, path)
    again = load_adapter(tmp_path / "a", open_base(FOLDER / "llama"))
    assert again.cca.attention.query[...].dtype == np.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rms_norm_eps": 0.1},
            "was fitted to .* with norm_epsilon 1e-05: expected that, found 0.1",
        ),
        ({"hidden_act": "gelu"}, "with activation 'silu': expected that, found 'gelu_exact'"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            "with rotary_base .*: expected that, found 7.0",
        ),
    ],
)
def test_a_base_of_other_settings_is_refused(exported, tmp_path, settings, message):
    """Its weights are the same, so the fingerprint is."""
    shutil.copytree(FOLDER / "llama", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    refused(exported[0] / "1", message, tmp_path / "base")


def test_parameters_that_are_not_finite_are_not_exported(tmp_path):
    model = fitted()
    gates = model.cca.gate[...]
    model.cca.gate[...] = jax.device_put(np.full(gates.shape, np.nan, np.float32), gates.sharding)
    with pytest.raises(
        UserError, match=r"cca\.gate has values that are not finite: expected numbers"
    ):
        export_adapter(tmp_path / "a", open_base(FOLDER / "llama"), model)
    assert not (tmp_path / "a").exists()


def test_the_adapter_of_this_repository_is_whole_and_has_gates_alone():
    settings = json.loads((SHARED / "adapter.json").read_text())
    data = (SHARED / "adapter.safetensors").read_bytes()
    assert settings["format_version"] == FORMAT_VERSION
    assert settings["tensors_sha256"] == hashlib.sha256(data).hexdigest()
    assert settings["retro"]["form"]["neighbour_distance"] == 192
    tensors = load_file(SHARED / "adapter.safetensors")
    assert set(tensors) == {"cca.gate"}
    layers = settings["retro"]["cca_layers"]
    assert tensors["cca.gate"].shape == (len(layers), settings["decoder"]["num_heads"]) == (30, 9)
    assert np.isfinite(tensors["cca.gate"]).all()
