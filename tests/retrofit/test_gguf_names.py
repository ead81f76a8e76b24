"""GGUF files have the models that folders have, by llama.cpp's names and order of rows."""

import dataclasses
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from retro_jax.errors import UserError
from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.canonical import parameter_shapes
from retro_jax.retrofit.config import RopeScaling
from retro_jax.retrofit.gguf_names import gguf_config
from retro_jax.retrofit.layout import linear, read_part
from retro_jax.storage.gguf_file import open_gguf
from tests.reference.base_numpy import logits
from tests.retrofit import base_files
from tests.retrofit.base_files import FOLDER, NAMES, write_gguf


def _tensors(base, dtype=np.float64):
    return base.load(lambda name, array: array, dtype)


def _error(base, name, dtype):
    """The largest difference from the logits of transformers, as a share of the largest logit."""
    expected = np.load(FOLDER / name / "logits.npy")
    got = logits(base.config, _tensors(base, dtype), np.load(FOLDER / name / "tokens.npy"))
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", [n for n in NAMES if n != "neox_sequential"])
def test_gguf_files_have_the_same_model(name, tmp_path):
    write_gguf(name, tmp_path / "m.gguf")
    base, folder = open_base(tmp_path / "m.gguf"), open_base(FOLDER / name)
    expected, got = _tensors(folder), _tensors(base)
    assert list(got) == list(expected) == list(parameter_shapes(base.config))
    for key in expected:
        np.testing.assert_array_equal(got[key], expected[key], err_msg=key)
    assert _error(base, name, np.float32) < 1e-5
    scaling = folder.config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        assert base.config.rope_scaling.kind == "factors", "original_context is not the usual 8192"
    rest = dataclasses.replace(folder.config, rope_scaling=base.config.rope_scaling)
    assert base.config == dataclasses.replace(
        rest, norm_epsilon=base.config.norm_epsilon, rotary_base=base.config.rotary_base
    )
    np.testing.assert_allclose(base.config.norm_epsilon, rest.norm_epsilon, rtol=1e-6)
    np.testing.assert_allclose(base.config.rotary_base, rest.rotary_base, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [
        ("llama", "Q8_0", 0.01),
        ("llama", "Q4_1", 0.1),
        ("llama", "F16", 1e-3),
        ("llama", "BF16", 5e-3),
        ("gpt2", "Q8_0", 0.01),
        ("pythia", "Q8_0", 0.01),
        ("qwen3", "Q8_0", 0.01),
    ],
)
def test_gguf_tensors_are_dequantised(name, kind, tolerance, tmp_path):
    write_gguf(name, tmp_path / "m.gguf", getattr(gguf.GGMLQuantizationType, kind))
    base, expected = open_base(tmp_path / "m.gguf"), _tensors(open_base(FOLDER / name))
    errors = {key: np.abs(got - expected[key]).max() for key, got in _tensors(base).items()}
    assert 0 < max(errors.values()) < tolerance, errors
    assert errors["layers.0.query"] > 0
    assert errors["norm.scale"] == 0


def test_llama_3_in_gguf_has_its_formula(tmp_path, monkeypatch):
    config = base_files.read_config(FOLDER / "llama")
    usual = dataclasses.replace(config.rope_scaling, original_context=8192)
    config = dataclasses.replace(config, rope_scaling=usual)
    monkeypatch.setattr(base_files, "read_config", lambda folder: config)
    write_gguf("llama", tmp_path / "m.gguf")
    assert open_base(tmp_path / "m.gguf").config.rope_scaling == usual


def test_one_quantised_tensor_is_read_at_a_time(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "x")
    table = np.random.default_rng(0).normal(size=(8000, 512)).astype(np.float32)
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("token_embd.weight", gguf.quantize(table, q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = open_gguf(tmp_path / "m.gguf").tensors["token_embd.weight"]
    (part,) = linear("token_embd.weight", "x", (512,), (8000,)).parts
    tracemalloc.start()
    try:
        got = read_part(stored.rows, 8000, part, np.float32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert table.nbytes <= peak < 1.2 * table.nbytes
    np.testing.assert_allclose(got.T, table, atol=0.03)


def _with_metadata(name, path, change):
    """A tiny model's GGUF file opened with other metadata, as `gguf_config` sees it."""
    write_gguf(name, path)
    file = open_gguf(path)
    change(file)
    return gguf_config(file)[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", 2, "split.count is 2: expected 1, a whole model: join its files"),
        ("qwen2.attention.causal", False, "attention.causal is False: expected True"),
        ("qwen2.expert_count", 8, "expert_count is 8: expected 0"),
        ("qwen2.final_logit_softcapping", 30.0, "softcapping is 30.0: expected 0.0"),
        (
            "qwen2.attention.sliding_window",
            16,
            "sliding_window is 16: expected none within the con",
        ),
        ("qwen2.rope.scaling.attn_factor", 2.0, "attn_factor is 2.0: expected 1.0"),
        ("qwen2.rope.scaling.type", "yarn", "type is 'yarn': expected one of"),
        (
            "qwen2.rope.scaling.type",
            "linear",
            "has no qwen2.rope.scaling.factor: expected a number",
        ),
    ],
)
def test_settings_that_are_not_read_are_refused(key, value, message, tmp_path):
    with pytest.raises(UserError, match=message):
        _with_metadata("qwen2", tmp_path / "m.gguf", lambda f: f.metadata.update({key: value}))


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scale_linear": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 0.0}, None),
    ],
)
def test_scaling_is_linear_where_the_file_does_not_say(values, scaling, tmp_path):
    """As llama.cpp reads it, older files' scale_linear too."""
    prefixed = {f"qwen2.{key}": value for key, value in values.items()}
    config = _with_metadata("qwen2", tmp_path / "m.gguf", lambda f: f.metadata.update(prefixed))
    assert config.rope_scaling == scaling


def test_other_contradictions_of_gguf_files(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=r"scaling.factor is 4.0: expected none beside the tensor"):
        _with_metadata(
            "llama", path, lambda f: f.metadata.update({"llama.rope.scaling.factor": 4.0})
        )

    def two_axes(file):
        divisors = file.tensors["rope_freqs.weight"]
        shape = (2, divisors.shape[0] // 2)
        file.tensors["rope_freqs.weight"] = dataclasses.replace(divisors, shape=shape)

    with pytest.raises(UserError, match=r"rope_freqs.weight has shape \(2, 2\): expected one axis"):
        _with_metadata("llama", path, two_axes)
    with pytest.raises(
        UserError, match=r"has no gptneox\.use_parallel_residual: expected true or f"
    ):
        _with_metadata("pythia", path, lambda f: f.metadata.pop("gptneox.use_parallel_residual"))


def test_doubled_names_and_nested_arrays(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf("llama_tied", path)
    data = path.read_bytes()
    for old, new, message in (
        (b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight", "the tensor blk.0.ffn_up.weight twice"),
        (
            b"llama.attention.key_length",
            b"llama.attention.head_count",
            "the key llama.attent.* twice",
        ),
    ):
        assert old in data and len(old) == len(new)
        path.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match=f"m.gguf has {message}: expected a whole GGUF file"):
            open_base(path)
    nested = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    path.write_bytes(nested + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3000)
    with pytest.raises(
        UserError, match=r"m\.gguf has more than 16 arrays within each other: expected"
    ):
        open_base(path)
