"""What was not touched is saved byte for byte; what was changed comes back changed."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from retro_jax.errors import UserError
from retro_jax.retrofit import saving
from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.saving import save_hugging_face
from tests.reference.base_numpy import logits
from tests.retrofit.base_files import FOLDER, NAMES, file_tensors, write_gguf


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", NAMES)
def test_an_untouched_model_is_equal_byte_for_byte(name, tmp_path):
    base = open_base(FOLDER / name)
    save_hugging_face(base, tmp_path / "out")
    assert _bytes(tmp_path / "out") == _bytes(FOLDER / name)
    same = base.load(lambda name, array: array)
    save_hugging_face(base, tmp_path / "again", same)
    assert _bytes(tmp_path / "again") == _bytes(FOLDER / name), "float32 rounds back to the dtype"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("name", NAMES)
def test_changed_tensors_come_back_and_others_keep_their_bytes(name, tmp_path):
    base = open_base(FOLDER / name)
    before = base.load(lambda name, array: array)
    touched = ["layers.1.key", "layers.0.down", "embedding", "norm.scale"]
    changed = {key: before[key] * 2 for key in touched}
    save_hugging_face(base, tmp_path / "out", changed)
    after = open_base(tmp_path / "out").load(lambda name, array: array)
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], changed.get(key, value), err_msg=key)
    old, new = file_tensors(FOLDER / name), file_tensors(tmp_path / "out")
    assert {k: v.dtype for k, v in old.items()} == {k: v.dtype for k, v in new.items()}
    different = [key for key in old if old[key].tobytes() != new[key].tobytes()]
    assert len(different) == len(touched)


@pytest.mark.parametrize("shard", [1 << 40, 20_000])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "neox_sequential"])
def test_a_gguf_file_becomes_a_folder(name, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_SHARD_BYTES", shard)
    write_gguf(name, tmp_path / "m.gguf")
    base = open_base(tmp_path / "m.gguf")
    if name == "llama":  # its frequencies are not those of a formula
        with pytest.raises(UserError, match="rope_scaling has factors of its own: expected"):
            save_hugging_face(base, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    save_hugging_face(base, tmp_path / "out", {"norm.scale": base.read("norm.scale") * 2})
    saved = open_base(tmp_path / "out")
    assert saved.config == base.config
    assert (tmp_path / "out" / "model.safetensors").is_file() == (shard > 20_000)
    tensors = saved.load(lambda name, array: array)
    np.testing.assert_array_equal(tensors["norm.scale"], base.read("norm.scale") * 2)
    tensors["norm.scale"] = base.read("norm.scale")
    got = logits(saved.config, tensors, np.load(FOLDER / name / "tokens.npy"))
    np.testing.assert_allclose(got, np.load(FOLDER / name / "logits.npy"), atol=1e-4)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]


def test_nothing_is_written_for_bad_input(tmp_path):
    base = open_base(FOLDER / "pythia")
    large = np.full((32, 48), 1e6, np.float32)
    for changed, message in (
        ({"layers.9.up": large}, "has no tensor layers.9.up: expected a canonical name"),
        ({"layers.1.up": large.T}, r"layers.1.up has shape \(48, 32\): expected \(32, 48\)"),
        ({"layers.1.up": large}, "layers.1.up has values too large for float16"),
    ):
        with pytest.raises(UserError, match=message):
            save_hugging_face(base, tmp_path / "out", changed)
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UserError, match="out is there already: expected no directory, or an empty"):
        save_hugging_face(base, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "changes"), [("qwen2", {"rotary_dim": 4}), ("gpt2", {"parallel_residual": True})]
)
def test_settings_that_config_json_does_not_state_are_refused(name, changes, tmp_path):
    """GGUF's metadata may state what the architecture's config.json cannot."""
    write_gguf(name, tmp_path / "m.gguf")
    base = open_base(tmp_path / "m.gguf")
    base.config = dataclasses.replace(base.config, **changes)
    with pytest.raises(
        UserError, match=r"m.gguf has settings that no config.json of .* states: exp"
    ):
        save_hugging_face(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0, r"norm.scale has shape \(\): expected \(32,\)"),
        ([1.0, 2.0], r"norm.scale has shape \(2,\): expected \(32,\)"),
        (["x"] * 32, "norm.scale has dtype <U1: expected numbers"),
    ],
)
def test_changes_that_are_no_arrays_of_numbers(value, message, tmp_path):
    base = open_base(FOLDER / "llama")
    with pytest.raises(UserError, match=message):
        save_hugging_face(base, tmp_path / "out", {"norm.scale": value})
    assert not (tmp_path / "out").exists()


def test_an_empty_tensor_that_is_ignored_is_saved_too(tmp_path):
    """It begins where the next tensor does."""
    folder = tmp_path / "base"
    shutil.copytree(FOLDER / "llama_tied", folder)
    empty = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(0, np.float32)}
    save_file(file_tensors(folder) | empty, folder / "model.safetensors")
    base = open_base(folder)
    names = ("embedding", "norm.scale", "layers.0.query", "layers.0.key")
    changed = {name: base.read(name) * 2 for name in names}
    save_hugging_face(base, tmp_path / "out", changed)
    saved = open_base(tmp_path / "out")
    for name, value in changed.items():
        np.testing.assert_array_equal(saved.read(name), value)
