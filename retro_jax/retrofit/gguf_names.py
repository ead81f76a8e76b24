"""GGUF's names of a base model's tensors and settings: one scheme for all architectures."""

import dataclasses
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrofit.architectures import ARCHITECTURES, GgufNames
from retro_jax.retrofit.canonical import layer_shapes
from retro_jax.retrofit.config import BaseConfig, RopeScaling, rotary_frequencies
from retro_jax.retrofit.fields import Fields
from retro_jax.retrofit.layout import FileTensor, Part, flat, linear, same
from retro_jax.storage.gguf_file import GgufFile

ROPE_FACTORS = "rope_freqs.weight"
_SPECIAL_IDS = {
    "bos_id": "tokenizer.ggml.bos_token_id",
    "eos_ids": "tokenizer.ggml.eos_token_id",
    "pad_id": "tokenizer.ggml.padding_token_id",
}
_KERNELS = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_VECTORS = {
    "attention_norm.scale": "attn_norm.weight",
    "attention_norm.bias": "attn_norm.bias",
    "query_norm": "attn_q_norm.weight",
    "key_norm": "attn_k_norm.weight",
    "mlp_norm.scale": "ffn_norm.weight",
    "mlp_norm.bias": "ffn_norm.bias",
}
_FUSED = ("query", "key", "value")
# Settings that change what is computed, and their values of a model that is read here.
_NEUTRAL = {
    "attention.causal": True,
    "attention.scale": 0.0,
    "attn_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "final_logit_softcapping": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
}


def gguf_config(file: GgufFile) -> tuple[BaseConfig, GgufNames]:
    """The configuration of a GGUF file's model, and how its tensors are named.

    Raises:
      UserError: an architecture, scaling or value that is not read; it names the file.
    """
    fields = Fields(file.metadata, str(file.path))
    if fields.integer("split.count", 1) > 1:
        raise fields.error("split.count", "1, a whole model: join its files by gguf-split --merge")
    architectures = {each.gguf.architecture: each for each in ARCHITECTURES.values()}
    architecture = fields.one_of("general.architecture", architectures)
    names, tensors = architecture.gguf, file.tensors
    if "token_embd.weight" not in tensors:
        raise UserError(f"{file.path} has no tensor token_embd.weight: expected the embedding")
    prefix = f"{names.architecture}."
    for name, neutral in _NEUTRAL.items():
        fields.only(f"{prefix}{name}", neutral)
    heads = fields.integer(f"{prefix}attention.head_count")
    d_model = fields.integer(f"{prefix}embedding_length")
    if heads < 1:
        raise fields.error(f"{prefix}attention.head_count", "a positive integer")
    values: dict[str, Any] = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "d_model": d_model,
        "num_layers": fields.integer(f"{prefix}block_count"),
        "num_heads": heads,
        "num_kv_heads": fields.integer(f"{prefix}attention.head_count_kv", heads),
        "head_dim": fields.integer(f"{prefix}attention.key_length", d_model // heads),
        "d_ff": fields.integer(f"{prefix}feed_forward_length"),
        "context_length": fields.integer(f"{prefix}context_length"),
        "tie_embeddings": "output.weight" not in tensors,
        "qkv_bias": "blk.0.attn_q.bias" in tensors,
        "out_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "parallel_residual": _parallel_residual(fields, names),
        **names.traits,
    }
    norm = "layer_norm_epsilon" if names.traits.get("norm") == "layer" else "layer_norm_rms_epsilon"
    values["norm_epsilon"] = fields.number(f"{prefix}attention.{norm}")
    if names.traits.get("positions") != "learned":
        values |= _rotation(file, fields, prefix, values["head_dim"])
    values |= fields.special_ids(_SPECIAL_IDS)
    if names.permuted and values["rotary_dim"] != values["head_dim"]:
        raise fields.error(f"{prefix}rope.dimension_count", f"head_dim = {values['head_dim']}")
    window = fields.integer(f"{prefix}attention.sliding_window", 0)
    if 0 < window < values["context_length"]:
        raise fields.error(f"{prefix}attention.sliding_window", "none within the context")
    config = BaseConfig(architecture=architecture.name, **values)
    return _with_known_formula(config), names


def _parallel_residual(fields: Fields, names: GgufNames) -> bool:
    """GPT-NeoX's files must say which it is; the others are sequential."""
    name = f"{names.architecture}.use_parallel_residual"
    must = names.architecture == "gptneox"
    stated: bool = fields.flag(name) if must else fields.flag(name, False)
    return stated


def _rotation(file: GgufFile, fields: Fields, prefix: str, head_dim: int) -> dict[str, Any]:
    """BaseConfig's rotary fields."""
    values: dict[str, Any] = {
        "rotary_base": fields.number(f"{prefix}rope.freq_base", 10_000.0),
        "rotary_dim": fields.integer(f"{prefix}rope.dimension_count", head_dim),
    }
    kinds = {"none": None, "linear": "linear"}
    kind = fields.one_of(f"{prefix}rope.scaling.type", kinds, "linear")  # llama.cpp's default
    name = f"{prefix}rope.scaling.factor"
    if f"{prefix}rope.scaling.type" in fields.values and kind:
        factor = fields.number(name)
    else:
        factor = fields.number(name, fields.number(f"{prefix}rope.scale_linear", 1.0))
    if kind and factor not in (0, 1):
        values["rope_scaling"] = RopeScaling("linear", factor)
    if ROPE_FACTORS in file.tensors:
        divisors = file.tensors[ROPE_FACTORS]
        if values.get("rope_scaling"):
            raise fields.error(name, f"none beside the tensor {ROPE_FACTORS}")
        if len(divisors.shape) != 1:
            raise UserError(
                f"{file.path}: tensor {ROPE_FACTORS} has shape {divisors.shape}: expected one axis"
            )
        factors = tuple(float(f) for f in divisors.rows(0, divisors.shape[0]))
        values["rope_scaling"] = RopeScaling("factors", factors=factors)
    return values


def _with_known_formula(config: BaseConfig) -> BaseConfig:
    """The configuration with Llama 3's formula for GGUF's divisors, where they follow it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "factors":
        return config
    formula = RopeScaling("llama3", factor=max(scaling.factors))
    other = dataclasses.replace(config, rope_scaling=formula)
    close = np.allclose(rotary_frequencies(other), rotary_frequencies(config), rtol=1e-5, atol=0)
    return other if close else config


def gguf_tensors(config: BaseConfig, names: GgufNames) -> list[FileTensor]:
    """The tensors that a GGUF file of a configuration has."""
    width, vocabulary = (config.d_model,), (config.vocab_size, config.d_model)
    tensors = [same("token_embd.weight", "embedding", vocabulary)]
    if config.positions == "learned":
        context = (config.context_length, config.d_model)
        tensors.append(same("position_embd.weight", "positions", context))
    for i in range(config.num_layers):
        tensors += _layer_tensors(config, names, f"blk.{i}.", f"layers.{i}.")
    tensors.append(same("output_norm.weight", "norm.scale", width))
    if config.norm == "layer":
        tensors.append(same("output_norm.bias", "norm.bias", width))
    if not config.tie_embeddings:
        tensors.append(same("output.weight", "read_out", vocabulary))
    return tensors


def _layer_tensors(
    config: BaseConfig, names: GgufNames, theirs: str, ours: str
) -> list[FileTensor]:
    """One layer; `theirs` and `ours` are the prefixes of its names."""
    shapes, tensors = layer_shapes(config), []
    for name, shape in shapes.items():
        kernel = name.removesuffix("_bias")
        if names.fused and kernel in _FUSED:
            continue
        if name in _VECTORS:
            tensors.append(same(f"{theirs}{_VECTORS[name]}", f"{ours}{name}", shape))
        elif name in _KERNELS:
            inputs = 2 if name == "output" else 1
            file_name = f"{theirs}{_KERNELS[name]}.weight"
            tensor = linear(file_name, f"{ours}{name}", shape[:inputs], shape[inputs:])
            permuted = names.permuted and name in ("query", "key")
            tensors.append(_permuted(tensor) if permuted else tensor)
        else:
            tensor = flat(f"{theirs}{_KERNELS[kernel]}.bias", f"{ours}{name}", shape)
            permuted = names.permuted and kernel in ("query", "key")
            tensors.append(_permuted(tensor) if permuted else tensor)
    if names.fused:
        tensors += _fused(config, f"{theirs}attn_qkv", ours)
    return tensors


def _permuted(tensor: FileTensor) -> FileTensor:
    """Rows of a head as pairs (2i, 2i + 1), which the canonical form has as (i, i + K / 2)."""
    (part,) = tensor.parts
    heads, width, *inputs = part.split
    split = (heads, width // 2, 2, *inputs)
    order = (3, 0, 2, 1) if inputs else (0, 2, 1)
    return dataclasses.replace(tensor, parts=(dataclasses.replace(part, split=split, order=order),))


def _fused(config: BaseConfig, theirs: str, ours: str) -> list[FileTensor]:
    """Queries, keys and values in one tensor, one after the other."""
    d_model, heads = config.d_model, (config.num_heads, config.head_dim)
    rows = 3 * config.num_heads * config.head_dim
    kernels, biases = [], []
    for index, name in enumerate(_FUSED):
        split = (3, *heads, d_model)
        part = Part(f"{ours}{name}", (d_model, *heads), split, (2, 0, 1), (0, index))
        kernels.append(part)
        biases.append(Part(f"{ours}{name}_bias", heads, (3, *heads), (0, 1), (0, index)))
    tensors = [FileTensor(f"{theirs}.weight", (rows, d_model), tuple(kernels))]
    if config.qkv_bias:
        tensors.append(FileTensor(f"{theirs}.bias", (rows,), tuple(biases)))
    return tensors
