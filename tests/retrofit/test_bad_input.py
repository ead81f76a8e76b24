"""Bad base models are refused in one line that names the file, the thing and what was expected."""

import dataclasses
import json
import re
import shutil
import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from retro_jax.errors import UserError
from retro_jax.retrofit import smollm2
from retro_jax.retrofit.base_model import open_base, read_config
from retro_jax.retrofit.config import BaseConfig, RopeScaling
from retro_jax.retrofit.saving import save_hugging_face
from tests.retrofit.base_files import FOLDER, file_tensors, write_gguf

CONFIG = BaseConfig("LlamaForCausalLM", 96, 32, 2, 4, 2, 8, 40, 64, rotary_dim=8)


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(FOLDER / "qwen2", tmp_path / "base")
    return tmp_path / "base"


def _refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        open_base(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def _edit(folder, **changes):
    """Changes fields of config.json; None takes one out."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))


def _edit_tensors(folder, **changes):
    """Changes tensors, by names with _ for dots in the last part; None takes one out."""
    tensors = file_tensors(folder) | changes
    save_file({n: t for n, t in tensors.items() if t is not None}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"]},
            r"architectures is \['T5.*one of \['GPT2",
        ),
        ({"architectures": None}, "architectures is None: expected one of"),
        ({"hidden_size": ...}, "config.json has no hidden_size: expected an integer"),
        ({"hidden_size": "32"}, "hidden_size is '32': expected an integer"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5: expected an integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: expected a positive integer"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3: expected a divisor of 4 heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small': expected a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1: expected true or false"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish': expected one of"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>': expected a token id, or several"),
        ({"bos_token_id": 96}, "bos_id is 96: expected None or an id below vocab_size = 96"),
        ({"eos_token_id": [2, 99]}, r"eos_ids is \(2, 99\): expected ids below vocab_size = 96"),
        ({"use_sliding_window": True}, "use_sliding_window is True: expected False"),
        ({"layer_types": ["sliding_attention"]}, "layer_types is .*: expected full_attention in"),
        ({"layer_types": 2}, "layer_types is 2: expected full_attention in every layer"),
        (
            {"num_hidden_layers": 10**30},
            "base has .* tensors: expected those of 1000.* layers, which",
        ),
        ({"rope_parameters": 7}, "rope_parameters is 7: expected an object"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters is .*: expected one set of values for all layers",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_parameters: rope_type is 'yarn': expected one of \['default', 'linear', 'llama3'\]",
        ),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_scaling: type is 'dynamic': expected one of",
        ),
        (
            {"rope_parameters": ..., "rope_scaling": {"type": "linear"}},
            "rope_scaling has no factor: expected a number",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling is .*: expected that of rope_parameters",
        ),
        (
            {"rope_parameters": {}, "rope_scaling": {"factor": 8.0}},
            "rope_scaling has no type: expected linear or llama3, as there is a factor",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 2}},
            "rope_type is 'default': expected linear or llama3, as there is a factor",
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "type": "yarn", "factor": 2}},
            "rope_parameters: type is 'yarn': expected that of rope_type",
        ),
        ({"rope_theta": 7.0}, "rope_theta is 7.0: expected that of rope_parameters, 10000.0"),
        ({"model_type": "llama"}, "model_type is 'llama': expected 'qwen2' with Qwen2ForCausalLM"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*: expected a number"),
    ],
)
def test_bad_configurations(folder, changes, message):
    _edit(folder, **changes)
    _refused(folder, message)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False: expected True"),
        ("llama", {"sliding_window": 16}, "sliding_window is 16: expected None"),
        (
            "llama",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is .*: expected full_attention in every layer",
        ),
        (
            "llama",
            {"model_type": "granite"},
            "is 'granite': expected 'llama' or 'mistral' with Lla",
        ),
        ("gpt2", {"n_head": 5}, "n_head is 5: expected a divisor of n_embd = 32"),
        ("pythia", {"num_attention_heads": 5}, "is 5: expected a divisor of hidden_size = 32"),
        (
            "pythia",
            {"rope_parameters": {"partial_rotary_factor": 0.2}},
            "rotary_dim is 3: expected",
        ),
    ],
)
def test_bad_configurations_of_other_architectures(tmp_path, name, changes, message):
    shutil.copytree(FOLDER / name, tmp_path / "base")
    _edit(tmp_path / "base", **changes)
    _refused(tmp_path / "base", message)


def test_older_fields_of_rotary_positions_are_read(folder):
    _edit(folder, rope_parameters=..., rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2})
    config = read_config(folder)
    assert (config.rotary_base, config.rope_scaling) == (1e6, RopeScaling("linear", 2.0))


def test_bad_folders(tmp_path, folder):
    _refused(tmp_path / "none", "none is no base model: expected a Hugging Face folder or a .gguf")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "config.json is missing: expected that of a Hugging Face folder")
    (folder / "config.json").write_text("{'vocab_size': 96}")
    _refused(folder, "config.json is not valid JSON")
    (folder / "config.json").write_text("[]")
    _refused(folder, "config.json holds a list: expected a JSON object")


def test_bad_weights(folder):
    up, bias = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias"
    _edit_tensors(folder, **{up: None})
    _refused(folder, rf"has no tensor {up}: expected one of shape \(40, 32\)")
    _edit_tensors(folder, **{up: np.zeros((32, 40), ml_dtypes.bfloat16)})
    _refused(folder, rf"{up} has shape \(32, 40\): expected \(40, 32\)")
    _edit_tensors(folder, **{up: np.zeros((40, 32), np.int8)})
    _refused(folder, rf"tensor {up} has dtype I8: expected one of \['BF16', 'F16', 'F32', 'F64'\]")
    zeros = np.zeros((40, 32), ml_dtypes.bfloat16)
    _edit_tensors(folder, **{up: zeros, "model.layers.0.self_attn.q_norm.weight": zeros[0]})
    _refused(folder, "has a tensor model.layers.0.self_attn.q_norm.weight: expected none of this")
    shutil.copytree(FOLDER / "qwen2", folder, dirs_exist_ok=True)
    _edit(folder, architectures=["LlamaForCausalLM"], model_type="llama")
    _refused(folder, rf"has a tensor {bias}: expected none of this name in its architecture")
    (folder / "model.safetensors").unlink()
    _refused(folder, "model.safetensors is missing: expected model.safetensors, or shards with")


@pytest.mark.parametrize("size", [0, 5, 100, 3000, -1])
def test_truncated_safetensors(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    _refused(
        folder, r"model.safetensors cannot be read \(.*\): expected a safetensors file, not trun"
    )


def test_bad_shards(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(FOLDER / "llama", folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    _refused(folder, "model-00002-of-00003.safetensors is missing: expected")
    index = folder / "model.safetensors.index.json"
    for name in ("sub/model.safetensors", "../model.safetensors", "/model.safetensors", ".", ""):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        _refused(folder, rf"index.json names a file '{re.escape(name)}': expected one beside it")
    index.write_text("{}")
    _refused(folder, "index.json has no weight_map: expected tensor names with their files")


def test_a_tensor_or_a_model_that_is_there_twice(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(FOLDER / "llama", folder)
    path = folder / "model-00003-of-00003.safetensors"
    other = load_file(folder / "model-00001-of-00003.safetensors")
    name = min(other)
    save_file(load_file(path) | {name: other[name] + 1}, path)
    _refused(
        folder, f"{path.name} has a tensor {name}, which another file has too: expected it once"
    )
    save_file(file_tensors(folder), folder / "model.safetensors")
    _refused(
        folder, r"base has model.safetensors and model.safetensors.index.json: expected one of"
    )


def test_a_read_out_of_its_own_in_a_tied_model(tmp_path):
    """A copy of the embedding is read, and saved with it; another matrix would be ignored."""
    folder = tmp_path / "base"
    shutil.copytree(FOLDER / "llama_tied", folder)
    stored = file_tensors(folder)
    embedding = stored["model.embed_tokens.weight"]
    _edit_tensors(folder, **{"lm_head.weight": embedding})
    base = open_base(folder)
    save_hugging_face(base, tmp_path / "out", {"embedding": base.read("embedding") * 2})
    saved = file_tensors(tmp_path / "out")
    np.testing.assert_array_equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])
    assert (saved["lm_head.weight"] != embedding).any()
    for other in (embedding * 2, embedding[:-1], embedding.astype(np.float64)):
        _edit_tensors(folder, **{"lm_head.weight": other})
        _refused(
            folder, "tensor lm_head.weight is not model.embed_tokens.weight: expected a copy of"
        )


def _with_setting(data, name, value):
    """GGUF bytes with an unsigned setting replaced."""
    at = data.index(name.encode()) + len(name) + 4
    return data[:at] + value.to_bytes(4, "little") + data[at + 4 :]


def _with_type(data, name, kind):
    """GGUF bytes with the type of a matrix replaced."""
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8
    return data[:at] + kind.to_bytes(4, "little") + data[at + 4 :]


def test_bad_gguf_files(tmp_path):
    write_gguf("llama_tied", tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "m.gguf"
    for changed, message in (
        (data[:4] + b"\x09" + data[5:], r"m.gguf has GGUF version 9: expected one of \(2, 3\)"),
        (
            data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"),
            "'mamba': expected one",
        ),
        (
            data.replace(b"\x06\0\0\0\0\0\0\0linear", b"\x06\0\0\0\0\0\0\0my_own"),
            "type is 'my_own': exp",
        ),
        (
            data.replace(b"blk.1.ffn_up.w", b"blk.1.ffn_ap.w"),
            "no tensor blk.1.ffn_up.weight: expected",
        ),
        (
            data.replace(b"token_embd", b"tokem_embd"),
            "has no tensor token_embd.weight: expected the",
        ),
        (_with_setting(data, "llama.attention.head_count", 3), "head_count|num_kv_heads|shape"),
        (
            _with_setting(data, "llama.feed_forward_length", 41),
            r"ffn_gate.weight has shape \(40, 32\)",
        ),
        (
            _with_type(data, "blk.0.ffn_up.weight", gguf.GGMLQuantizationType.I8),
            "m.gguf: GGUF tensor type I8: expected one of those that the package gguf dequantises",
        ),
        (
            _with_setting(data, "llama.block_count", 2**32 - 1),
            "tensors: expected those of 4294967295 l",
        ),
        (_with_setting(data, "llama.rope.dimension_count", 4), "is 4: expected head_dim = 8"),
    ):
        assert changed != data
        path.write_bytes(changed)
        _refused(path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_ff": 0}, "d_ff is 0: expected a positive integer"),
        ({"norm": "batch"}, "norm is 'batch': expected one of"),
        ({"positions": "alibi"}, "positions is 'alibi': expected one of"),
        ({"feed_forward": "moe"}, "feed_forward is 'moe': expected one of"),
        ({"activation": "tanh"}, "activation is 'tanh': expected one of"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0: expected a positive number"),
        ({"rotary_base": -1.0}, "rotary_base is -1.0: expected a positive number"),
        ({"rotary_dim": 10}, "rotary_dim is 10: expected an even number up to head_dim = 8"),
        ({"pad_id": 96}, "pad_id is 96: expected None or an id below vocab_size = 96"),
        (
            {"rope_scaling": RopeScaling("factors", factors=(1.0,))},
            "rope_scaling .*: expected 4 fac",
        ),
    ],
)
def test_errors_of_base_config(changes, message):
    with pytest.raises(UserError, match=f"BaseConfig.{message}"):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "yarn"}, "kind is 'yarn': expected one of"),
        ({"factor": 0.0}, "factor is 0.0: expected a positive number"),
        ({"low_factor": 0.0}, "low_factor is 0.0: expected a positive number"),
        ({"high_factor": 1.0}, "high_factor is 1.0: expected more than low_factor = 1.0"),
        ({"original_context": 0}, "original_context is 0: expected a positive integer"),
        ({"factors": (1.0, 0.0)}, r"factors is \(1.0, 0.0\): expected positive numbers"),
        ({"kind": "factors"}, r"factors is \(\): expected positive numbers with kind 'factors'"),
    ],
)
def test_errors_of_rope_scaling(changes, message):
    with pytest.raises(UserError, match=f"RopeScaling.{message}"):
        RopeScaling(**({"kind": "llama3", "factor": 8.0} | changes))


def test_gguf_without_its_package(tmp_path, monkeypatch):
    write_gguf("llama", tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    _refused(tmp_path / "m.gguf", r"gguf is not installed: expected `pip install retro-jax\[fit\]`")


def test_the_packaged_model(tmp_path, monkeypatch):
    """The package is found by its metadata, and never imported."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-example")
    with pytest.raises(
        UserError, match="llm-example is not installed: expected `pip install --no-dep"
    ):
        smollm2.smollm2_path()
    info = tmp_path / "llm_example-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-example\nVersion: 0.1\n")
    (info / "RECORD").write_text("llm_example/__init__.py,,\n")
    with pytest.raises(
        UserError, match=r"llm-example 0.1 has no .gguf file: expected version 0.1.2"
    ):
        smollm2.smollm2_path()
    (info / "RECORD").write_text("llm_example/__init__.py,,\nllm_example/m.gguf,,\n")
    (tmp_path / "llm_example").mkdir()
    (tmp_path / "llm_example" / "m.gguf").touch()  # Python 3.12 and later list files that are there
    assert smollm2.smollm2_path() == tmp_path / "llm_example" / "m.gguf"
