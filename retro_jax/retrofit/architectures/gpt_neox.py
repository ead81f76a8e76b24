"""GPT-NeoX (Pythia): LayerNorm, rotary positions on a share of each head, projections fused by head."""

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
from retro_jax.retrofit.layout import FileTensor, Part, linear, same
from retro_jax.retrofit.rope import read_rope, write_rope

_TRAITS = {"norm": "layer", "feed_forward": "plain", "mlp_bias": True}


def _read_config(fields: Fields) -> dict[str, Any]:
    """GPT-NeoX's own names."""
    d_model, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if heads < 1 or d_model % heads:
        raise fields.error("num_attention_heads", f"a divisor of hidden_size = {d_model}")
    head_dim, bias = d_model // heads, fields.flag("attention_bias", True)
    return {
        "vocab_size": fields.integer("vocab_size"),
        "d_model": d_model,
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": head_dim,
        "d_ff": fields.integer("intermediate_size"),
        "context_length": fields.integer("max_position_embeddings"),
        "norm_epsilon": fields.number("layer_norm_eps", 1e-5),
        "activation": fields.one_of("hidden_act", ACTIVATION_NAMES, "gelu"),
        "parallel_residual": fields.flag("use_parallel_residual", True),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "qkv_bias": bias,
        "out_bias": bias,
        **_TRAITS,
        **read_rope(fields, head_dim, theta="rotary_emb_base", share="rotary_pct", default=0.25),
        **fields.special_ids(SPECIAL_IDS),
    }


def _write_config(config: BaseConfig) -> dict[str, Any]:
    """config.json's fields."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": config.context_length,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": config.activation,
        "use_parallel_residual": config.parallel_residual,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "rotary_pct": config.rotary_dim / config.head_dim,
        **write_rope(config, theta="rotary_emb_base"),
        **written_ids(config),
    }


def _tensors(config: BaseConfig) -> list[FileTensor]:
    """The tensors of GPTNeoXForCausalLM."""
    width, vocabulary = (config.d_model,), (config.vocab_size, config.d_model)
    tensors = [same("gpt_neox.embed_in.weight", "embedding", vocabulary)]
    for i in range(config.num_layers):
        tensors += _layer_tensors(config, f"gpt_neox.layers.{i}.", f"layers.{i}.")
    tensors += _norm("gpt_neox.final_layer_norm", "norm", width)
    if not config.tie_embeddings:
        tensors.append(same("embed_out.weight", "read_out", vocabulary))
    return tensors


def _layer_tensors(config: BaseConfig, theirs: str, ours: str) -> list[FileTensor]:
    """One layer; `theirs` and `ours` are the prefixes of its names."""
    width, wide = (config.d_model,), (config.d_ff,)
    count, head = config.num_heads, config.head_dim
    attention, mlp = f"{theirs}attention.", f"{theirs}mlp."
    names = ("query", "key", "value")
    kernels = tuple(
        Part(
            f"{ours}{name}", (*width, count, head), (count, 3, head, *width), (2, 0, 1), (1, index)
        )
        for index, name in enumerate(names)
    )
    biases = tuple(
        Part(f"{ours}{name}_bias", (count, head), (count, 3, head), (0, 1), (1, index))
        for index, name in enumerate(names)
    )
    fused = 3 * count * head
    tensors = [
        *_norm(f"{theirs}input_layernorm", f"{ours}attention_norm", width),
        FileTensor(f"{attention}query_key_value.weight", (fused, *width), kernels),
    ]
    if config.qkv_bias:
        tensors.append(FileTensor(f"{attention}query_key_value.bias", (fused,), biases))
    tensors.append(linear(f"{attention}dense.weight", f"{ours}output", (count, head), width))
    if config.out_bias:
        tensors.append(same(f"{attention}dense.bias", f"{ours}output_bias", width))
    return [
        *tensors,
        *_norm(f"{theirs}post_attention_layernorm", f"{ours}mlp_norm", width),
        linear(f"{mlp}dense_h_to_4h.weight", f"{ours}up", width, wide),
        same(f"{mlp}dense_h_to_4h.bias", f"{ours}up_bias", wide),
        linear(f"{mlp}dense_4h_to_h.weight", f"{ours}down", wide, width),
        same(f"{mlp}dense_4h_to_h.bias", f"{ours}down_bias", width),
    ]


def _norm(file_name: str, name: str, width: tuple[int, ...]) -> list[FileTensor]:
    """A LayerNorm's scale and bias."""
    return [
        same(f"{file_name}.weight", f"{name}.scale", width),
        same(f"{file_name}.bias", f"{name}.bias", width),
    ]


GPT_NEOX = Architecture(
    name="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    prefix="gpt_neox.",
    read_config=_read_config,
    write_config=_write_config,
    tensors=_tensors,
    ignored=r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    gguf=GgufNames(
        "gptneox",
        {**_TRAITS, "qkv_bias": True, "out_bias": True, "activation": "gelu"},
        fused=True,
    ),
)
