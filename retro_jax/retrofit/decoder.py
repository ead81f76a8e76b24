"""An existing model as this library's decoder: its configuration, and where each of its tensors goes.

    config = decoder_config(base.config, cca_layers=(18, 20), pad_id=0)
    model = load_decoder(base, config, ExecutionConfig())

canonical.py names the base's tensors. A parameter of the decoder is one of them, or several side by
side: the fused projection to queries, keys and values.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from retro_jax.config import DecoderForm, ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.retrofit.base_model import BaseModel
from retro_jax.retrofit.canonical import Shape, parameter_shapes, stacked_name, stacked_shapes
from retro_jax.retrofit.config import BaseConfig, rotary_frequencies
from retro_jax.retrofit.placing import load_stacked
from retro_jax.sharding import MESH_SHARDINGS, Shardings, check_mesh, parameter_shardings
from retro_jax.storage import files
from retro_jax.train.parameter_names import map_named, named_leaves

# Fields of DecoderForm that no base decides.
FITTED_FIELDS = (
    "gated_cca",
    "neighbour_layer",
    "sink_id",
    "cca_rank",
    "shared_softmax",
    "neighbour_distance",
)
_ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu", "silu": "silu"}
_LAYER = {
    "attention_norm.scale": "attention.norm.scale",
    "attention_norm.bias": "attention.norm.bias",
    "query_norm": "attention.query_norm.scale",
    "key_norm": "attention.key_norm.scale",
    "output": "attention.output",
    "output_bias": "attention.output_bias",
    "mlp_norm.scale": "feed_forward.norm.scale",
    "mlp_norm.bias": "feed_forward.norm.bias",
    "gate": "feed_forward.gate",
    "gate_bias": "feed_forward.gate_bias",
    "up": "feed_forward.widen",
    "up_bias": "feed_forward.widen_bias",
    "down": "feed_forward.narrow",
    "down_bias": "feed_forward.narrow_bias",
}
_OTHERS = {"embedding": "embedding.table", "positions": "positions.table"}
_FUSED = ("query", "key", "value")
# Shape and NamedSharding of a parameter, or of anything else with both.
Struct = Any


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where a tensor goes: a parameter, and the axis and index of it for a part of one."""

    name: str
    axis: int | None = None
    index: int = 0


def decoder_form(base: BaseConfig, **others: Any) -> DecoderForm:
    """The form of a base model's decoder; `others` are fields that no base decides."""
    divisors: tuple[float, ...] = ()
    if base.rope_scaling is not None:
        plain = rotary_frequencies(dataclasses.replace(base, rope_scaling=None))
        divisors = tuple((plain / rotary_frequencies(base)).tolist())
    rotary = base.positions == "rotary"
    return DecoderForm(
        norm=base.norm,
        num_kv_heads=base.num_kv_heads,
        qkv_bias=base.qkv_bias,
        out_bias=base.out_bias,
        qk_norm=base.qk_norm,
        feed_forward=base.feed_forward,
        mlp_bias=base.mlp_bias,
        parallel_residual=base.parallel_residual,
        learned_positions=0 if rotary else base.context_length,
        rotary_base=base.rotary_base,
        rotary_dim=base.rotary_dim if rotary else 0,
        rotary_divisors=divisors,
        **others,
    )


def decoder_settings(base: BaseConfig) -> dict[str, Any]:
    """RetroConfig's fields that a base model decides, but for its form."""
    return {
        "vocab_size": base.vocab_size,
        "d_model": base.d_model,
        "num_layers": base.num_layers,
        "num_heads": base.num_heads,
        "head_dim": base.head_dim,
        "d_ff": base.d_ff,
        "tie_embeddings": base.tie_embeddings,
        "activation": _ACTIVATIONS[base.activation],
        "norm_epsilon": base.norm_epsilon,
        "positions": "rotary" if base.positions == "rotary" else "relative",
    }


def base_settings(base: BaseConfig) -> dict[str, Any]:
    """All settings that a base model decides, as JSON has them: what its weights mean nothing without."""
    form = dataclasses.asdict(decoder_form(base))
    kept = {name: value for name, value in form.items() if name not in FITTED_FIELDS}
    settings: dict[str, Any] = files.plain(decoder_settings(base) | {"form": kept})
    return settings


def decoder_config(
    base: BaseConfig, *, form: Mapping[str, Any] | None = None, **fields: Any
) -> RetroConfig:
    """The configuration of a RETRO whose decoder is a base model.

    Args:
      base: the base's.
      form: values of FITTED_FIELDS.
      **fields: of RetroConfig; without cca_layers the decoder alone.
    """
    fields = {"cca_layers": (), **decoder_settings(base), **fields}
    return RetroConfig(form=decoder_form(base, **(form or {})), **fields)


def check_decoder(config: RetroConfig, base: BaseModel) -> None:
    """Refuses a configuration whose decoder is not a base model.

    Raises:
      UserError: names the field, its value and the base's.
    """
    of_base = decoder_form(base.config)
    pairs: list[tuple[Any, str, Any]] = [
        (config, name, value) for name, value in decoder_settings(base.config).items()
    ]
    for field in dataclasses.fields(DecoderForm):
        if field.name not in FITTED_FIELDS:
            pairs.append((config.form, field.name, getattr(of_base, field.name)))
    for owner, name, value in pairs:
        if getattr(owner, name) != value:
            raise UserError(
                f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}: expected {value!r}, that"
                f" of {base.path}"
            )


def base_parameters(base: BaseModel, params: Mapping[str, Struct]) -> dict[str, jax.Array]:
    """The base's tensors as the decoder's parameters, each where it belongs; one by one through the host.

    Args:
      base: the model.
      params: name -> a parameter's shape, dtype and sharding, of a Retro with this decoder.

    Returns:
      Name -> array, of the decoder's parameters: not of CCA nor of an encoder.
    """
    targets = {name: _target(name, base.config) for name in stacked_shapes(base.config)}

    def sharding_of(name: str, shape: Shape) -> jax.sharding.Sharding:
        target = targets[name]
        sharding = params[target.name].sharding
        if target.axis is None or not isinstance(sharding, NamedSharding):
            return sharding
        spec = list(sharding.spec)
        del spec[target.axis]
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    placed = load_stacked(base, sharding_of)
    joined: dict[str, jax.Array] = {}
    for name, target in targets.items():
        if target.axis is None:
            joined[target.name] = placed.pop(name)
        elif target.index == 0:
            parts = [placed.pop(n) for n, t in targets.items() if t.name == target.name]
            joined[target.name] = _side_by_side(parts, target.axis, params[target.name].sharding)
    for name, array in joined.items():
        if array.shape != params[name].shape:
            raise ValueError(f"{name} is {params[name].shape}: expected {array.shape}")
    return joined


def changed_tensors(base: BaseModel, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The decoder's tensors that training has changed, as saving.save_hugging_face takes them.

    Args:
      base: the model. params: name -> array, of a Retro with this decoder; others are not read.

    Returns:
      Canonical name -> array, of those that are not the base's bit for bit.
    """
    changed: dict[str, np.ndarray] = {}
    for name in parameter_shapes(base.config):
        stacked, layer = stacked_name(name)
        target = _target(stacked, base.config)
        value = params[target.name]
        if layer is not None:
            value = value[layer]
        if target.axis is not None:
            value = jnp.take(value, target.index, axis=target.axis - 1)
        found = np.asarray(value)
        if found.tobytes() != base.read(name).astype(found.dtype).tobytes():
            changed[name] = found
    return changed


def fitted_parameters(
    base: BaseModel, config: RetroConfig, params: Mapping[str, Struct]
) -> dict[str, jax.Array]:
    """The first parameters of fitting: the decoder's, and gated CCA's, copies of its layers'.

    Gates are 0, so that nothing is read at first; they have gradients.

    Args:
      base: the model. config: of the Retro. params: as in base_parameters.

    Returns:
      Name -> array; a random start's encoder and CCA are not in it.

    Raises:
      UserError: the configuration's decoder is another one.
    """
    check_decoder(config, base)
    parameters = base_parameters(base, params)
    if not (config.has_retrieval and config.form.gated_cca):
        return parameters
    structs = {
        name: leaf
        for name, leaf in params.items()
        if name.startswith("cca.") and not name.endswith("_down")  # those are random
    }
    sources = {name: _source(name, parameters) for name in structs}

    def copy(layers: dict[str, jax.Array]) -> dict[str, jax.Array]:
        stacks = {}
        for name, (source, part) in sources.items():
            rows = [layers[source][p - 1][part] for p in config.cca_layers] if source else []
            stacks[name] = jnp.stack(rows) if rows else jnp.zeros(structs[name].shape)
        return stacks

    shardings = {name: leaf.sharding for name, leaf in structs.items()}
    inputs = {name: parameters[name] for name, _ in sources.values() if name}
    return parameters | jax.jit(copy, out_shardings=shardings)(inputs)


def load_decoder(
    base: BaseModel,
    config: RetroConfig,
    execution: ExecutionConfig = ExecutionConfig(),
    *,
    mesh: Mesh | None = None,
) -> Retro:
    """A Retro with a base model's decoder; its encoder and CCA as fitting begins with them.

    Args:
      base: the model. config: as decoder_config builds it. execution: how it is computed.
      mesh: where it goes; None for the first device.

    Raises:
      UserError: the configuration's decoder is another one, or the mesh does not divide it.
    """
    if mesh is not None:
        check_mesh(config, mesh)
    layout = Shardings() if mesh is None else MESH_SHARDINGS

    def make() -> Retro:
        return Retro(config, execution, shardings=layout, rngs=nnx.Rngs(0))

    graph, params = nnx.split(nnx.eval_shape(make))
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)
    else:
        shardings = parameter_shardings(params, mesh)
    structs = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        shardings,
    )
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        parameters = fitted_parameters(base, config, named_leaves(structs))
        others = {
            n: leaf.sharding for n, leaf in named_leaves(structs).items() if n not in parameters
        }

        def first() -> dict[str, jax.Array]:
            leaves = named_leaves(nnx.split(make())[1])
            return {name: leaves[name] for name in others}

        if others:
            parameters |= jax.jit(first, out_shardings=others)()
    return nnx.merge(graph, map_named(lambda name, _: parameters[name], params))


def _source(name: str, decoder: Mapping[str, Any]) -> tuple[str, Any]:
    """The decoder's parameter that one of CCA begins as, and which part of a layer's; "" for zeros."""
    short = name.removeprefix("cca.")
    if f"layers.{short}" in decoder:
        return f"layers.{short}", ...
    for part, index in (("query", 0), ("key_value", slice(1, None))):
        for bias in ("", "_bias"):
            if short == f"attention.{part}{bias}":
                cut = index if bias else (slice(None), index)
                return f"layers.attention.query_key_value{bias}", cut
    return "", ...


def _target(name: str, config: BaseConfig) -> _Target:
    """Where a stacked canonical tensor goes."""
    if not name.startswith("layers."):
        return _Target(_OTHERS.get(name, name))
    short = name.removeprefix("layers.")
    if short in _LAYER:
        return _Target(f"layers.{_LAYER[short]}")
    part, bias = short.removesuffix("_bias"), "_bias" if short.endswith("_bias") else ""
    axis = 1 if bias else 2
    if config.num_kv_heads == config.num_heads:
        return _Target(f"layers.attention.query_key_value{bias}", axis, _FUSED.index(part))
    if part == "query":
        return _Target(f"layers.attention.query{bias}")
    return _Target(f"layers.attention.key_value{bias}", axis, _FUSED.index(part) - 1)


def _side_by_side(parts: list[jax.Array], axis: int, sharding: Any) -> jax.Array:
    """Tensors along a new axis, laid out as the parameter."""
    join: Callable[[list[jax.Array]], jax.Array] = jax.jit(
        lambda parts: jnp.stack(parts, axis), out_shardings=sharding
    )
    return join(parts)
