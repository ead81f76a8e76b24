"""A frozen BERT (Devlin et al., arXiv 1810.04805) that turns word pieces into one vector a text.

The paper's keys are BERT embeddings averaged over time (section 2.3). Weights come from a Hugging
Face folder: config.json, model.safetensors and, from sentence-transformers, modules.json. The layers
are stacked and scanned: a text length compiles one layer, whatever the depth.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
# sentence-transformers' names of the poolings: those of its older files, and of its newer ones.
POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "mean": "mean",
    "cls": "cls",
}
# Names that the first BERTs were published with, beside those of LAYER_WEIGHTS.
_OLDER = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
MODULES = "modules.json"  # of sentence-transformers
MASKED = -1e9  # logit of a padded position: exp underflows to exactly zero


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The architecture of a BERT encoder, in Hugging Face's names.

    Attributes:
      vocab_size: V, word pieces. hidden_size: D. num_hidden_layers: depth. num_attention_heads: H.
      intermediate_size: F, the feed-forward's width. max_position_embeddings: longest text.
      type_vocab_size: sentence types; type 0 is used throughout.
      hidden_act: the feed-forward's activation. layer_norm_eps: LayerNorm's epsilon.
      normalise: whether the pooled vector is divided by its L2 norm.
      pooling: how a text's positions become one vector: "mean" of all, or "cls", the first alone.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    normalise: bool = False
    pooling: str = "mean"

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
        ):
            require(_is_positive(getattr(self, field)), self, field, "a positive integer")
        for field in (
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            require(_is_positive(getattr(self, field)), self, field, "a positive integer")
        heads = self.num_attention_heads
        require(
            self.hidden_size % heads == 0,
            self,
            "hidden_size",
            f"a multiple of {heads} heads",
        )
        require(
            isinstance(self.hidden_act, str) and self.hidden_act in ACTIVATIONS,
            self,
            "hidden_act",
            f"one of {sorted(ACTIVATIONS)}",
        )
        epsilon = self.layer_norm_eps
        positive = isinstance(epsilon, (int, float)) and epsilon > 0
        require(positive, self, "layer_norm_eps", "a positive number")
        require(self.pooling in POOLINGS.values(), self, "pooling", "'mean' or 'cls'")

    @classmethod
    def open(cls, folder: Path | str) -> "BertConfig":
        """Reads config.json, and modules.json where there is one.

        Raises:
          UserError: a file is missing or no JSON, or the model is something else than a BERT whose
            outputs are averaged, or whose first one is taken.
        """
        folder = Path(folder)
        path = folder / "config.json"
        stored = read_json(path)
        kind = stored.get("model_type")
        if kind != "bert":
            raise UserError(f"{path}: model_type is {kind!r}: expected 'bert'")
        positions = stored.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise UserError(
                f"{path}: position_embedding_type is {positions!r}: expected 'absolute'"
            )
        names = {field.name for field in dataclasses.fields(cls)} - {"normalise", "pooling"}
        values = {name: stored[name] for name in names if name in stored}
        for field in dataclasses.fields(cls):
            if field.default is dataclasses.MISSING and field.name not in values:
                raise UserError(f"{path}: no {field.name}: expected the configuration of a BERT")
        pooling, normalise = _read_modules(folder)
        return cls(normalise=normalise, pooling=pooling, **values)


class Bert(nnx.Module):
    """BERT's encoder with pooling; every layer's weights stacked along axis 0."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        shapes = parameter_shapes(config)

        def parameter(name: str) -> nnx.Param:
            if name.endswith("_scale"):
                return nnx.Param(jnp.ones(shapes[name]))
            if name.endswith("_bias"):
                return nnx.Param(jnp.zeros(shapes[name]))
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), shapes[name]))

        self.word_embedding = parameter("word_embedding")
        self.position_embedding = parameter("position_embedding")
        self.type_embedding = parameter("type_embedding")
        self.embedding_norm_scale = parameter("embedding_norm_scale")
        self.embedding_norm_bias = parameter("embedding_norm_bias")
        self.layers = nnx.Dict({name: parameter(name) for name in LAYER_WEIGHTS})

    def __call__(self, ids: jax.Array, lengths: jax.Array) -> jax.Array:
        """Embeds texts.

        Args:
          ids: [B, N] int32 word pieces, [CLS] and [SEP] included.
          lengths: [B] int32, how many of them are the text; a row of length 0 gives zeros.

        Returns:
          [B, D] float32: the last layer's mean over the text's positions, or its first position,
          divided by its L2 norm where the configuration says so.
        """
        config = self.config
        valid_BxN = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
        # Under an explicit mesh a gather needs to know that rows stay where their ids are.
        rows = jax.sharding.PartitionSpec(*jax.typeof(ids).sharding.spec, None)
        in_mesh = not jax.sharding.get_abstract_mesh().empty
        table = self.word_embedding[...]
        h_BxNxD = table.at[ids].get(mode="clip", out_sharding=rows if in_mesh else None)
        h_BxNxD += self.position_embedding[...][: ids.shape[1]] + self.type_embedding[...][0]
        h_BxNxD = _layer_norm(
            h_BxNxD,
            self.embedding_norm_scale[...],
            self.embedding_norm_bias[...],
            config,
        )
        mask_BxN = jnp.where(valid_BxN, 0.0, MASKED)
        layers = {name: self.layers[name][...] for name in LAYER_WEIGHTS}
        h_BxNxD, _ = jax.lax.scan(
            lambda h, weights: (_layer(h, weights, mask_BxN, config), None),
            h_BxNxD,
            layers,
        )
        if config.pooling == "cls":
            pooled_BxD = h_BxNxD[:, 0] * (lengths > 0)[:, None]
        else:
            total_BxD = jnp.einsum("bnd,bn->bd", h_BxNxD, valid_BxN.astype(h_BxNxD.dtype))
            pooled_BxD = total_BxD / jnp.maximum(lengths, 1)[:, None]
        if not config.normalise:
            return pooled_BxD
        return pooled_BxD / jnp.maximum(jnp.linalg.norm(pooled_BxD, axis=-1, keepdims=True), 1e-12)


# Our name of a layer's weight -> (Hugging Face's names below encoder.layer.I, axes of the shape).
# A dense kernel is stored [out, in] there and [in, out] here.
LAYER_WEIGHTS: dict[str, tuple[tuple[str, ...], str]] = {
    "qkv_kernel": (
        tuple(f"attention.self.{n}.weight" for n in ("query", "key", "value")),
        "DE",
    ),
    "qkv_bias": (
        tuple(f"attention.self.{n}.bias" for n in ("query", "key", "value")),
        "E",
    ),
    "output_kernel": (("attention.output.dense.weight",), "DD"),
    "output_bias": (("attention.output.dense.bias",), "D"),
    "attention_norm_scale": (("attention.output.LayerNorm.weight",), "D"),
    "attention_norm_bias": (("attention.output.LayerNorm.bias",), "D"),
    "up_kernel": (("intermediate.dense.weight",), "DF"),
    "up_bias": (("intermediate.dense.bias",), "F"),
    "down_kernel": (("output.dense.weight",), "FD"),
    "down_bias": (("output.dense.bias",), "D"),
    "ffw_norm_scale": (("output.LayerNorm.weight",), "D"),
    "ffw_norm_bias": (("output.LayerNorm.bias",), "D"),
}
EMBEDDING_WEIGHTS: dict[str, tuple[str, str]] = {
    "word_embedding": ("embeddings.word_embeddings.weight", "VD"),
    "position_embedding": ("embeddings.position_embeddings.weight", "PD"),
    "type_embedding": ("embeddings.token_type_embeddings.weight", "TD"),
    "embedding_norm_scale": ("embeddings.LayerNorm.weight", "D"),
    "embedding_norm_bias": ("embeddings.LayerNorm.bias", "D"),
}


def parameter_shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of `Bert`, by attribute."""
    axes = _axes(config)
    shapes = {n: tuple(axes[a] for a in spec) for n, (_, spec) in EMBEDDING_WEIGHTS.items()}
    depth = config.num_hidden_layers
    for name, (_, spec) in LAYER_WEIGHTS.items():
        shapes[name] = (depth, *(axes[a] for a in spec))
    return shapes


def load_bert(folder: Path | str) -> Bert:
    """Loads a BERT from a Hugging Face folder.

    Weights may carry the prefix `bert.`, and the norms' may be called gamma and beta, as in the first
    BERTs that were published.

    Raises:
      UserError: the folder contains no BERT, or a weight is missing, is not finite, or has another shape
        than config.json says; the message names it.
    """
    config = BertConfig.open(folder)
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        other = path.with_name("pytorch_model.bin")
        more = f"; {other.name} has to be converted to it first" if other.is_file() else ""
        raise UserError(f"{path}: no such file: expected the weights of a BERT{more}")
    try:
        with safe_open(path, framework="numpy") as weights:
            values = _read_weights(config, path, weights)
    except SafetensorError as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))))
    pure: dict[str, Any] = {name: jnp.asarray(values[name]) for name in EMBEDDING_WEIGHTS}
    pure["layers"] = {name: jnp.asarray(values[name]) for name in LAYER_WEIGHTS}
    nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graphdef, state)


def read_json(path: Path, kind: type = dict) -> Any:
    """Reads a JSON object or list of a model folder; UserError when it is missing or broken."""
    try:
        return files.parse_json(path.read_bytes(), path, kind)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: expected a Hugging Face BERT folder") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{str(path)!a} cannot be read: {reason}") from None


def _layer(
    h_BxNxD: jax.Array,
    weights: Mapping[str, jax.Array],
    mask_BxN: jax.Array,
    config: BertConfig,
) -> jax.Array:
    """One post-norm transformer layer."""
    attended = _attention(h_BxNxD, weights, mask_BxN, config)
    h_BxNxD = _layer_norm(
        h_BxNxD + attended,
        weights["attention_norm_scale"],
        weights["attention_norm_bias"],
        config,
    )
    up_BxNxF = h_BxNxD @ weights["up_kernel"] + weights["up_bias"]
    down_BxNxD = ACTIVATIONS[config.hidden_act](up_BxNxF) @ weights["down_kernel"]
    return _layer_norm(
        h_BxNxD + down_BxNxD + weights["down_bias"],
        weights["ffw_norm_scale"],
        weights["ffw_norm_bias"],
        config,
    )


def _attention(
    h_BxNxD: jax.Array,
    weights: Mapping[str, jax.Array],
    mask_BxN: jax.Array,
    config: BertConfig,
) -> jax.Array:
    """Bidirectional attention over the unpadded positions.

    One product computes q, k and v. Heads come before positions, so that the products over them are
    plain batched matrix products. The softmax is divided after the product with the values, with
    H * N fewer divisions. Each was measured to be faster on CPU.
    """
    batch, length, width = h_BxNxD.shape
    heads = config.num_attention_heads
    qkv = h_BxNxD @ weights["qkv_kernel"] + weights["qkv_bias"]
    qkv = qkv.reshape(batch, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    q_BxHxNxK, k_BxHxNxK, v_BxHxNxK = qkv[0] * (width // heads) ** -0.5, qkv[1], qkv[2]
    logits = jnp.einsum("bhik,bhjk->bhij", q_BxHxNxK, k_BxHxNxK) + mask_BxN[:, None, None, :]
    exp = jnp.exp(logits - logits.max(-1, keepdims=True))
    out_BxHxNxK = jnp.einsum("bhij,bhjk->bhik", exp, v_BxHxNxK) / exp.sum(-1)[..., None]
    out_BxNxD = out_BxHxNxK.transpose(0, 2, 1, 3).reshape(batch, length, width)
    return out_BxNxD @ weights["output_kernel"] + weights["output_bias"]


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, config: BertConfig) -> jax.Array:
    """LayerNorm over the last axis."""
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + config.layer_norm_eps) * scale + bias


def _axes(config: BertConfig) -> dict[str, int]:
    """Sizes by the letters of the tables above; E is q, k and v side by side."""
    return {
        "V": config.vocab_size,
        "P": config.max_position_embeddings,
        "T": config.type_vocab_size,
        "D": config.hidden_size,
        "E": 3 * config.hidden_size,
        "F": config.intermediate_size,
    }


def _read_weights(config: BertConfig, path: Path, weights: Any) -> dict[str, np.ndarray]:
    """Reads every weight, checks its shape, and brings it into our layout."""
    names = set(weights.keys())
    prefix = "bert." if "bert.embeddings.word_embeddings.weight" in names else ""
    axes = _axes(config)

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        key = prefix + name
        for new, old in _OLDER.items():
            if key not in names and key.endswith(new):
                key = key.removesuffix(new) + old
        if key not in names:
            raise UserError(f"{path}: no weight {prefix + name}: expected one of shape {shape}")
        stored = tuple(weights.get_slice(key).get_shape())
        if stored != shape:
            raise UserError(
                f"{path}: weight {key} has shape {stored}: expected {shape} by config.json"
            )
        value = np.asarray(weights.get_tensor(key), np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"{path}: weight {key} is not finite: expected numbers")
        return value

    values = {
        ours: read(theirs, tuple(axes[a] for a in spec))
        for ours, (theirs, spec) in EMBEDDING_WEIGHTS.items()
    }
    for ours, (parts, spec) in LAYER_WEIGHTS.items():
        shape = tuple(axes[a] for a in reversed(spec))
        shape = (shape[0] // len(parts), *shape[1:])
        stacked = []
        for layer in range(config.num_hidden_layers):
            rows = [read(f"encoder.layer.{layer}.{part}", shape) for part in parts]
            stacked.append(np.concatenate(rows).T)
        values[ours] = np.stack(stacked)
    return values


def transformer_folder(folder: Path) -> Path:
    """Where a folder of sentence-transformers has its BERT: the folder itself, or its 0_Transformer."""
    path = folder / MODULES
    if not path.exists() or (folder / "config.json").exists():
        return folder
    places = [place for kind, place in _modules(path) if kind == "Transformer"]
    return folder / places[0] if places and "\0" not in places[0] else folder


def modules_folder(folder: Path) -> Path:
    """The folder of sentence-transformers to which a BERT's folder belongs: itself, or the one above."""
    above = folder.absolute().parent
    if (folder / MODULES).exists() or not (above / MODULES).exists():
        return folder
    is_part = ("Transformer", folder.absolute().name) in _modules(above / MODULES)
    return above if is_part else folder


def _modules(path: Path) -> list[tuple[str, str]]:
    """The kind and the folder of each of modules.json."""
    modules = read_json(path, list)
    for module in modules:
        if not isinstance(module, dict):
            raise UserError(f"{path}: module {module!r}: expected an object with type and path")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    return list(zip(kinds, (str(module.get("path", "")) for module in modules)))


def _read_modules(folder: Path) -> tuple[str, bool]:
    """The pooling, and whether modules.json lists Normalize; UserError for what BERT does not do."""
    root, pooling = modules_folder(folder), "mean"
    modules = _modules(root / MODULES) if (root / MODULES).exists() else []
    for kind, place in modules:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(
                f"{root / MODULES}: module {kind!r}: expected Transformer, Pooling, Normalize"
            )
        if kind == "Pooling":
            pooling = _read_pooling(root / place / "config.json")
    return pooling, "Normalize" in [kind for kind, _ in modules]


def _read_pooling(path: Path) -> str:
    """The one pooling that a configuration of sentence-transformers has on."""
    stored = read_json(path)
    modes = [k for k, v in stored.items() if k.startswith("pooling_mode") and v is True]
    named = stored.get("pooling_mode")
    modes = sorted(modes + ([named] if isinstance(named, str) else []))
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise UserError(
            f"{path}: pooling is {modes}: expected pooling_mode_mean_tokens alone, or"
            " pooling_mode_cls_token alone"
        )
    return POOLINGS[modes[0]]


def _is_positive(value: Any) -> bool:
    """Whether it is an integer above zero."""
    return isinstance(value, int) and value > 0
