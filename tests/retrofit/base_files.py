"""The tiny base models of tests/data/base_models, and the same as GGUF files."""

import pathlib

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from retro_jax.retrofit.architectures import ARCHITECTURES
from retro_jax.retrofit.base_model import read_config
from retro_jax.retrofit.config import BaseConfig, rotary_frequencies
from retro_jax.storage import files

FOLDER = pathlib.Path(__file__).parent.parent / "data" / "base_models"
NAMES = sorted(path.name for path in FOLDER.iterdir())
_GGUF = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}


def file_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face folder, as its files have it."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def write_gguf(
    name: str, path: pathlib.Path, quantise: gguf.GGMLQuantizationType | None = None
) -> None:
    """Writes a tiny model as llama.cpp's converter does, with the names of the package gguf.

    Args:
      name: of NAMES.
      path: the file to write.
      quantise: a type for the matrices whose rows fit its blocks; None for float32.
    """
    config = read_config(FOLDER / name)
    architecture = _GGUF[ARCHITECTURES[config.architecture].gguf.architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_settings(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    for key, stored in file_tensors(FOLDER / name).items():
        array = _converted(config, key, stored.astype(np.float32))
        renamed = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, key
        fits = quantise is not None and array.ndim == 2
        if fits and array.shape[1] % gguf.GGML_QUANT_SIZES[quantise][0] == 0:
            packed = gguf.quantize(array, quantise)
            writer.add_tensor(renamed, packed, raw_dtype=quantise)
        else:
            writer.add_tensor(renamed, array)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain = config.rotary_base ** (-2.0 * np.arange(config.rotary_dim // 2) / config.rotary_dim)
        divisors = plain / rotary_frequencies(config)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_settings(writer: gguf.GGUFWriter, config: BaseConfig) -> None:
    """The metadata of the architecture."""
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if config.norm == "layer":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.norm_epsilon)
    if config.positions == "rotary":
        writer.add_rope_freq_base(config.rotary_base)
        writer.add_rope_dimension_count(config.rotary_dim)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.architecture == "GPTNeoXForCausalLM":
        writer.add_parallel_residual(config.parallel_residual)


def _converted(config: BaseConfig, key: str, array: np.ndarray) -> np.ndarray:
    """A tensor as the converter writes it."""
    heads, width = config.num_heads, config.d_model
    if config.architecture == "LlamaForCausalLM":
        for projection, count in (("q_proj", heads), ("k_proj", config.num_kv_heads)):
            if f".{projection}." in key:
                half = len(array) // count // 2
                pairs = array.reshape(count, 2, half, *array.shape[1:]).swapaxes(1, 2)
                array = pairs.reshape(array.shape)
    elif key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        array = array.T
    elif "query_key_value" in key:
        split = array.reshape(heads, 3, config.head_dim, *array.shape[1:])
        array = np.concatenate([split[:, i].reshape(width, *array.shape[1:]) for i in range(3)])
    return np.ascontiguousarray(array)


def many_layers(folder: pathlib.Path) -> None:
    """Writes a Hugging Face folder of 40 layers in bfloat16; its embedding is the largest tensor."""
    fields = files.read_json(FOLDER / "llama_tied" / "config.json")
    wider = {"hidden_size": 512, "head_dim": 128, "num_hidden_layers": 40, "vocab_size": 3000}
    fields |= wider | {"attention_bias": False, "mlp_bias": False}
    (folder / "config.json").write_bytes(files.to_json(fields))
    tensors = {}
    for name, array in file_tensors(FOLDER / "llama_tied").items():
        if name.endswith(".bias") or ".layers.1." in name:
            continue
        shape = tuple({32: 512, 16: 256}.get(size, size) for size in array.shape)
        shape = (3000, 512) if "embed" in name else shape
        for layer in range(40 if ".layers.0." in name else 1):
            made = np.full(shape, layer + 1, ml_dtypes.bfloat16)
            tensors[name.replace(".layers.0.", f".layers.{layer}.")] = made
    save_file(tensors, folder / "model.safetensors")
