"""Llama (also SmolLM2, Mistral without a window) and models with a few other fields: Qwen 2, Qwen 3."""

from collections.abc import Callable
from typing import Any

from retro_jax.retrofit.architectures.architecture import (
    ACTIVATION_NAMES,
    SPECIAL_IDS,
    Architecture,
    GgufNames,
    written_ids,
)
from retro_jax.retrofit.config import BaseConfig
from retro_jax.retrofit.fields import Fields
from retro_jax.retrofit.layout import FileTensor, flat, linear, same
from retro_jax.retrofit.rope import read_rope, write_rope


def _read_config(fields: Fields) -> dict[str, Any]:
    """The settings that all three state in the same fields."""
    d_model, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if heads < 1:
        raise fields.error("num_attention_heads", "a positive integer")
    head_dim = fields.integer("head_dim", d_model // heads)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": d_model,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "d_ff": fields.integer("intermediate_size"),
        "context_length": fields.integer("max_position_embeddings"),
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "activation": fields.one_of("hidden_act", ACTIVATION_NAMES, "silu"),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        **read_rope(fields, head_dim, theta="rope_theta", share="partial_rotary_factor", default=1),
        **fields.special_ids(SPECIAL_IDS),
    }


def _read_llama(fields: Fields) -> dict[str, Any]:
    """Llama's two flags about biases; Mistral's windows are refused."""
    fields.only("sliding_window", None)
    _refuse_windows(fields)
    bias = fields.flag("attention_bias", False)
    mlp_bias = fields.flag("mlp_bias", False)
    return {**_read_config(fields), "qkv_bias": bias, "out_bias": bias, "mlp_bias": mlp_bias}


def _read_qwen2(fields: Fields) -> dict[str, Any]:
    """Qwen 2 has biases of queries, keys and values, always."""
    _refuse_windows(fields)
    return {**_read_config(fields), "qkv_bias": True}


def _read_qwen3(fields: Fields) -> dict[str, Any]:
    """Qwen 3 has norms of queries and keys."""
    _refuse_windows(fields)
    bias = fields.flag("attention_bias", False)
    return {**_read_config(fields), "qk_norm": True, "qkv_bias": bias, "out_bias": bias}


def _refuse_windows(fields: Fields) -> None:
    """Sliding windows, off in the published models of Qwen, are not read."""
    fields.only("use_sliding_window", False)
    types = fields.values.get("layer_types") or []
    if not isinstance(types, list) or any(each != "full_attention" for each in types):
        raise fields.error("layer_types", "full_attention in every layer")


def _write_config(config: BaseConfig) -> dict[str, Any]:
    """config.json's fields; those that an architecture does not know are ignored by it."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **write_rope(config, theta="rope_theta"),
        **written_ids(config),
    }


def _tensors(config: BaseConfig) -> list[FileTensor]:
    """The tensors of LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM."""
    width, vocabulary = (config.d_model,), (config.vocab_size, config.d_model)
    tensors = [same("model.embed_tokens.weight", "embedding", vocabulary)]
    for i in range(config.num_layers):
        tensors += _layer_tensors(config, f"model.layers.{i}.", f"layers.{i}.")
    tensors.append(same("model.norm.weight", "norm.scale", width))
    if not config.tie_embeddings:
        tensors.append(same("lm_head.weight", "read_out", vocabulary))
    return tensors


def _layer_tensors(config: BaseConfig, theirs: str, ours: str) -> list[FileTensor]:
    """One layer; `theirs` and `ours` are the prefixes of its names."""
    width, wide = (config.d_model,), (config.d_ff,)
    query_shape, key_shape = (
        (config.num_heads, config.head_dim),
        (config.num_kv_heads, config.head_dim),
    )
    attention, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
    projections = {
        "q_proj": ("query", query_shape),
        "k_proj": ("key", key_shape),
        "v_proj": ("value", key_shape),
    }
    tensors = [same(f"{theirs}input_layernorm.weight", f"{ours}attention_norm.scale", width)]
    for file_name, (name, heads) in projections.items():
        tensors.append(linear(f"{attention}{file_name}.weight", f"{ours}{name}", width, heads))
        if config.qkv_bias:
            tensors.append(flat(f"{attention}{file_name}.bias", f"{ours}{name}_bias", heads))
    if config.qk_norm:
        for file_name, name in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            head = (config.head_dim,)
            tensors.append(same(f"{attention}{file_name}.weight", f"{ours}{name}", head))
    tensors.append(linear(f"{attention}o_proj.weight", f"{ours}output", query_shape, width))
    if config.out_bias:
        tensors.append(same(f"{attention}o_proj.bias", f"{ours}output_bias", width))
    tensors.append(same(f"{theirs}post_attention_layernorm.weight", f"{ours}mlp_norm.scale", width))
    for file_name, inputs, outputs in (
        ("gate", width, wide),
        ("up", width, wide),
        ("down", wide, width),
    ):
        tensors.append(
            linear(f"{mlp}{file_name}_proj.weight", f"{ours}{file_name}", inputs, outputs)
        )
        if config.mlp_bias:
            tensors.append(same(f"{mlp}{file_name}_proj.bias", f"{ours}{file_name}_bias", outputs))
    return tensors


def _of_llama_kind(
    name: str,
    model_type: str,
    reader: Callable[[Fields], dict[str, Any]],
    permuted: bool = False,
    others: tuple[str, ...] = (),
) -> Architecture:
    """An architecture that differs from Llama in its settings alone."""
    return Architecture(
        name=name,
        model_type=model_type,
        other_types=others,
        prefix="model.",
        read_config=reader,
        write_config=_write_config,
        tensors=_tensors,
        ignored=r".*rotary_emb\.inv_freq",
        gguf=GgufNames(model_type, {}, permuted=permuted),
    )


LLAMA = _of_llama_kind("LlamaForCausalLM", "llama", _read_llama, permuted=True, others=("mistral",))
QWEN2 = _of_llama_kind("Qwen2ForCausalLM", "qwen2", _read_qwen2)
QWEN3 = _of_llama_kind("Qwen3ForCausalLM", "qwen3", _read_qwen3)
