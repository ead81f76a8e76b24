"""GPT-2: LayerNorm, learned positions, biases everywhere, fused projections stored [inputs, outputs]."""

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
from retro_jax.retrofit.layout import FileTensor, Part, conv1d, same

_TRAITS = {
    "norm": "layer",
    "positions": "learned",
    "feed_forward": "plain",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
}


def _read_config(fields: Fields) -> dict[str, Any]:
    """GPT-2's own names."""
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    d_model, heads = fields.integer("n_embd"), fields.integer("n_head")
    if heads < 1 or d_model % heads:
        raise fields.error("n_head", f"a divisor of n_embd = {d_model}")
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": d_model,
        "num_layers": fields.integer("n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": d_model // heads,
        "d_ff": fields.integer("n_inner", 4 * d_model),
        "context_length": fields.integer("n_positions"),
        "norm_epsilon": fields.number("layer_norm_epsilon", 1e-5),
        "activation": fields.one_of("activation_function", ACTIVATION_NAMES, "gelu_new"),
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        **_TRAITS,
        **fields.special_ids(SPECIAL_IDS),
    }


def _write_config(config: BaseConfig) -> dict[str, Any]:
    """config.json's fields."""
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "n_positions": config.context_length,
        "layer_norm_epsilon": config.norm_epsilon,
        "activation_function": config.activation,
        "tie_word_embeddings": config.tie_embeddings,
        **written_ids(config),
    }


def _tensors(config: BaseConfig) -> list[FileTensor]:
    """The tensors of GPT2LMHeadModel."""
    width, vocabulary = (config.d_model,), (config.vocab_size, config.d_model)
    context = (config.context_length, config.d_model)
    tensors = [
        same("transformer.wte.weight", "embedding", vocabulary),
        same("transformer.wpe.weight", "positions", context),
    ]
    for i in range(config.num_layers):
        tensors += _layer_tensors(config, f"transformer.h.{i}.", f"layers.{i}.")
    tensors += _norm("transformer.ln_f", "norm", width)
    if not config.tie_embeddings:
        tensors.append(same("lm_head.weight", "read_out", vocabulary))
    return tensors


def _layer_tensors(config: BaseConfig, theirs: str, ours: str) -> list[FileTensor]:
    """One layer; `theirs` and `ours` are the prefixes of its names."""
    width, wide = (config.d_model,), (config.d_ff,)
    heads = (config.num_heads, config.head_dim)
    fused = 3 * config.d_model
    kernels = tuple(
        Part(f"{ours}{name}", (*width, *heads), (*width, 3, *heads), (0, 1, 2), (1, index))
        for index, name in enumerate(("query", "key", "value"))
    )
    biases = tuple(
        Part(f"{ours}{name}_bias", heads, (3, *heads), (0, 1), (0, index))
        for index, name in enumerate(("query", "key", "value"))
    )
    return [
        *_norm(f"{theirs}ln_1", f"{ours}attention_norm", width),
        FileTensor(f"{theirs}attn.c_attn.weight", (*width, fused), kernels),
        FileTensor(f"{theirs}attn.c_attn.bias", (fused,), biases),
        conv1d(f"{theirs}attn.c_proj.weight", f"{ours}output", heads, width),
        same(f"{theirs}attn.c_proj.bias", f"{ours}output_bias", width),
        *_norm(f"{theirs}ln_2", f"{ours}mlp_norm", width),
        conv1d(f"{theirs}mlp.c_fc.weight", f"{ours}up", width, wide),
        same(f"{theirs}mlp.c_fc.bias", f"{ours}up_bias", wide),
        conv1d(f"{theirs}mlp.c_proj.weight", f"{ours}down", wide, width),
        same(f"{theirs}mlp.c_proj.bias", f"{ours}down_bias", width),
    ]


def _norm(file_name: str, name: str, width: tuple[int, ...]) -> list[FileTensor]:
    """A LayerNorm's scale and bias."""
    return [
        same(f"{file_name}.weight", f"{name}.scale", width),
        same(f"{file_name}.bias", f"{name}.bias", width),
    ]


GPT2 = Architecture(
    name="GPT2LMHeadModel",
    model_type="gpt2",
    prefix="transformer.",
    read_config=_read_config,
    write_config=_write_config,
    tensors=_tensors,
    ignored=r".*\.attn\.(masked_)?bias",
    gguf=GgufNames("gpt2", {**_TRAITS, "activation": "gelu_new"}, fused=True),
)
