"""Base models are read from both kinds of files, and compute what transformers computes with them."""

import dataclasses
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from retro_jax.retrofit.base_model import open_base
from retro_jax.retrofit.canonical import parameter_shapes, stacked_name, stacked_shapes
from retro_jax.retrofit.config import BaseConfig
from tests.reference.base_numpy import logits
from tests.retrofit.base_files import FOLDER, NAMES, file_tensors, many_layers


def _tensors(base, dtype=np.float64):
    return base.load(lambda name, array: array, dtype)


def _error(base, name, dtype):
    """The largest difference from the logits of transformers, as a share of the largest logit."""
    expected = np.load(FOLDER / name / "logits.npy")
    got = logits(base.config, _tensors(base, dtype), np.load(FOLDER / name / "tokens.npy"))
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_logits_are_those_of_transformers(name, dtype):
    assert _error(open_base(FOLDER / name), name, dtype) < 1e-5


def test_names_and_shapes():
    config = BaseConfig("LlamaForCausalLM", 96, 32, 3, 4, 2, 8, 40, 64, rotary_dim=8)
    shapes, stacked = parameter_shapes(config), stacked_shapes(config)
    assert shapes["layers.2.query"] == (32, 4, 8)
    assert stacked["layers.key"] == (3, 32, 2, 8)
    assert stacked["read_out"] == shapes["read_out"] == (96, 32)
    assert stacked_name("layers.12.mlp_norm.scale") == ("layers.mlp_norm.scale", 12)
    assert stacked_name("norm.scale") == ("norm.scale", None)
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert set(shapes) - set(parameter_shapes(tied)) == {"read_out"}


def test_one_tensor_is_read_at_a_time(tmp_path):
    """Above what `place` keeps, the memory has the largest tensor and a fifth of it at most."""
    many_layers(tmp_path)
    shapes = parameter_shapes(open_base(tmp_path).config)
    largest = 4 * max(np.prod(shape) for shape in shapes.values())
    sums = {}
    tracemalloc.start()
    try:
        for dtype in (np.float32, ml_dtypes.bfloat16):
            base = open_base(tmp_path)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            sums[dtype] = base.load(lambda name, array: float(array.ravel()[-1]), dtype)
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < 1.2 * largest * np.dtype(dtype).itemsize / 4
            assert peak > 0.9 * largest * np.dtype(dtype).itemsize / 4
    finally:
        tracemalloc.stop()
    assert len(sums[np.float32]) > 200


def test_fingerprints_depend_on_weights_alone(tmp_path):
    base = open_base(FOLDER / "llama")
    tensors = file_tensors(FOLDER / "llama")
    (tmp_path / "config.json").write_bytes((FOLDER / "llama" / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_base(tmp_path).fingerprint() == base.fingerprint()
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-6
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_base(tmp_path).fingerprint() != base.fingerprint()


def test_folders_of_the_model_without_its_head(tmp_path):
    """GPT-2 was published without "transformer." in its names, with masks beside the weights."""
    tensors = file_tensors(FOLDER / "gpt2")
    renamed = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    renamed["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((FOLDER / "gpt2" / "config.json").read_bytes())
    assert open_base(tmp_path).fingerprint() == open_base(FOLDER / "gpt2").fingerprint()
