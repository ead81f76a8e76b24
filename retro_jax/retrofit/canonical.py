"""The one set of names and shapes that every base model's tensors are given.

V vocabulary, D d_model, L layers, H heads, G heads of keys and values, K head_dim, F d_ff:

    embedding                       [V, D]
    positions                       [context, D]    learned positions
    layers.0.attention_norm.scale   [D]             and .bias with LayerNorm
    layers.0.query                  [D, H, K]       and layers.0.query_bias [H, K]
    layers.0.key, layers.0.value    [D, G, K]       and key_bias, value_bias [G, K]
    layers.0.query_norm, key_norm   [K]             with qk_norm
    layers.0.output                 [H, K, D]       and output_bias [D]
    layers.0.mlp_norm.scale         [D]             and .bias with LayerNorm
    layers.0.gate                   [D, F]          gated; and gate_bias [F]
    layers.0.up                     [D, F]          and up_bias [F]
    layers.0.down                   [F, D]          and down_bias [D]
    norm.scale                      [D]             and .bias with LayerNorm
    read_out                        [V, D]          unless tied

Layers count from 0 here, as in the files. A kernel's input axes come first: `x @ kernel`. Rotary
pairs are (i, i + rotary_dim / 2) of a head in any file format. A stacked name has no number, and
its array a leading axis of L: layers.query [L, D, H, K].
"""

from retro_jax.retrofit.config import BaseConfig

Shape = tuple[int, ...]


def parameter_shapes(config: BaseConfig) -> dict[str, Shape]:
    """Every canonical tensor of a model and its shape, in the order in which they are streamed."""
    vocabulary = (config.vocab_size, config.d_model)
    shapes: dict[str, Shape] = {"embedding": vocabulary}
    if config.positions == "learned":
        shapes["positions"] = (config.context_length, config.d_model)
    layer = layer_shapes(config)
    for i in range(config.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= _norm_shapes(config, "norm")
    if not config.tie_embeddings:
        shapes["read_out"] = vocabulary
    return shapes


def layer_shapes(config: BaseConfig) -> dict[str, Shape]:
    """The canonical tensors of one layer, without `layers.0.`."""
    d_model, d_ff = config.d_model, config.d_ff
    heads = {
        "query": (config.num_heads, config.head_dim),
        "key": (config.num_kv_heads, config.head_dim),
        "value": (config.num_kv_heads, config.head_dim),
    }
    shapes = _norm_shapes(config, "attention_norm")
    for name, width in heads.items():
        shapes[name] = (d_model, *width)
    if config.qkv_bias:
        shapes |= {f"{name}_bias": width for name, width in heads.items()}
    if config.qk_norm:
        shapes |= {"query_norm": (config.head_dim,), "key_norm": (config.head_dim,)}
    shapes["output"] = (*heads["query"], d_model)
    if config.out_bias:
        shapes["output_bias"] = (d_model,)
    shapes |= _norm_shapes(config, "mlp_norm")
    wide = ("gate", "up") if config.feed_forward == "gated" else ("up",)
    shapes |= dict.fromkeys(wide, (d_model, d_ff))
    shapes["down"] = (d_ff, d_model)
    if config.mlp_bias:
        shapes |= {f"{name}_bias": (d_ff,) for name in wide}
        shapes["down_bias"] = (d_model,)
    return shapes


def stacked_shapes(config: BaseConfig) -> dict[str, Shape]:
    """The same with every layer's tensors stacked: "layers.query" -> (L, D, H, K)."""
    shapes: dict[str, Shape] = {}
    for name, shape in parameter_shapes(config).items():
        stacked, layer = stacked_name(name)
        shapes[stacked] = shape if layer is None else (config.num_layers, *shape)
    return shapes


def stacked_name(name: str) -> tuple[str, int | None]:
    """ "layers.3.query" -> ("layers.query", 3); other names as they are, and None."""
    first, *rest = name.split(".", 2)
    if first != "layers":
        return name, None
    return f"layers.{rest[1]}", int(rest[0])


def _norm_shapes(config: BaseConfig, name: str) -> dict[str, Shape]:
    """A norm's scale, and its bias where it has one."""
    shapes: dict[str, Shape] = {f"{name}.scale": (config.d_model,)}
    if config.norm == "layer":
        shapes[f"{name}.bias"] = (config.d_model,)
    return shapes
