"""Initial values with which a RETRO copies what follows the same ENDING: its last few tokens together.

`copying_init` looks for one token, and cannot tell one `self.` from another. Here the stream of each
token also tells which tokens came before it. An embedding of D numbers is read in two parts, by
directions drawn at random: u(x), by which tokens are compared, and the rest, which is copied. R is a
rotation of the first part:

    decoder, layer 1, head j    reads the token j before, and adds R^j u of it to the stream
    encoder, layer 1, head j    the same in a neighbour

so that a stream's first part says which tokens are the last ones, in order:

    decoder, after x y z        u(z) + R u(y) + R^2 u(x)
    neighbour, at t of x y z t  u(t) + R u(z) + R^2 u(y) + R^3 u(x)
    turned back by R            R^-1 u(t) + u(z) + R u(y) + R^2 u(x)

The query of every CCA is the decoder's first part, its key the neighbour's, turned back: their product
counts the equal tokens. Different tokens, and equal ones in different places, have a product near 0.
The value is the second part of t, which each head writes in a share of its directions.

The text so far can be read in the same way: in layer 2 the query is the stream's first part, and the key
is the first part of an earlier position, turned back. A baseline can begin with it too.

The model still computes Algorithm 1; all values, these included, are trained.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from retro_jax.config import DecoderForm, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model.attention import Attention
from retro_jax.model.copying_init import embed_neighbours_alike, read_earlier, store, whole
from retro_jax.model.positions import Relative
from retro_jax.model.retro import Retro

# Of an embedding's directions, those that compare tokens; the rest is copied.
_COMPARED = 3 / 8
_TOKENS = 4  # of an ending at most: the query's own, and one for each head of layer 1
_SHARPNESS = 3.0  # of the heads that read an earlier token
# Norm of an earlier token beside the stream's own: the decoder predicts from its stream, the encoder not.
_DECODER_NORM, _ENCODER_NORM = 0.7, 1.0
# Logits of one equal token, and norms of what is copied. What layer 2 copies makes CCA's query shorter.
_ATTENTION_LOGIT, _ATTENTION_NORM = 6.0, 3.0
_CCA_LOGIT, _CCA_LOGIT_BEHIND, _CCA_NORM = 5.0, 9.0, 4.0
_BRANCH = 0.2  # squared norm of what layer 1 adds beside the heads above
_REST = 0.1  # scale of the random values beside those that are set


def check_can_begin(config: RetroConfig, setting: str, *, layers: int = 1) -> None:
    """Refuses a model whose parts cannot be set up to compare endings.

    Args:
      config: of a RETRO or a baseline. setting: that asks for it, for the message.
      layers: of the decoder that are set.

    Raises:
      UserError: naming the field and the value that it needs.
    """
    needs: dict[str, tuple[bool, str]] = {
        "positions": (config.positions == "relative", "'relative'"),
        "tie_embeddings": (config.tie_embeddings, "True"),
        "form": (config.form == DecoderForm(), "the paper's, DecoderForm()"),
        "num_layers": (config.num_layers >= layers, f"{layers} at least"),
    }
    if config.has_retrieval:
        # A neighbour's token is compared and copied as the decoder embeds it.
        alike = config.encoder_d_model == config.d_model
        needs["encoder_d_model"] = (alike, str(config.d_model))
        needs["encoder_num_heads"] = (config.encoder_num_heads > 1, "2 at least")
    for field, (met, needed) in needs.items():
        if not met:
            raise UserError(
                f"{setting} and RetroConfig.{field} is {getattr(config, field)!r}: expected {needed},"
                " or 'random'"
            )


def begin_with_endings(model: Retro, *, neighbours: bool, text: bool) -> None:
    """Sets the first layers so that the model copies what follows an equal ending.

    Args:
      model: new, with random values; changed in place.
      neighbours: in its neighbours: encoder, CCA, and the decoder's layer 1. Nothing of a baseline.
      text: in the text so far: the decoder's layers 1 and 2.

    Raises:
      UserError: the configuration does not allow it.
    """
    config = model.config
    neighbours = neighbours and config.has_retrieval
    if text:
        check_can_begin(config, "TrainConfig.initial_attention is 'endings'", layers=2)
    if neighbours:
        check_can_begin(config, "TrainConfig.initial_retrieval is 'endings'")
    if not (neighbours or text):
        return
    parts = _Parts.of(model)
    _tell_earlier_tokens(model.layers.attention, parts, parts.tokens - 1, _DECODER_NORM)
    if text:
        _copy_from_text(model.layers.attention, parts)
    if neighbours:
        embed_neighbours_alike(model)
        _tell_earlier_tokens(model.encoder.layers.attention, parts, parts.tokens, _ENCODER_NORM)
        _copy_from_neighbours(model.cca.attention, parts, _CCA_LOGIT_BEHIND if text else _CCA_LOGIT)


def _copy_from_text(attention: Attention, parts: "_Parts") -> None:
    """Layer 2's heads look for the ending in earlier positions."""
    fused, output = whole(attention.query_key_value), whole(attention.output)
    read = parts.squared_norm(parts.tokens - 1, _DECODER_NORM, others=1)
    scale = parts.scale(_ATTENTION_LOGIT, _DECODER_NORM / read)
    maps = (fused[1, :, 0], fused[1, :, 1], fused[1, :, 2], output[1])
    maps = _copying_heads(parts, maps, scale, _ATTENTION_NORM * math.sqrt(read))
    store(attention.query_key_value, fused.at[1].set(jnp.stack(maps[:3], axis=1)))
    store(attention.output, output.at[1].set(maps[3]))
    store(attention.relative, whole(attention.relative).at[1].multiply(_REST))


def _copy_from_neighbours(attention: Attention, parts: "_Parts", logit: float) -> None:
    """Every CCA's heads look for the ending in the neighbours."""
    key_value = whole(attention.key_value)
    read = parts.squared_norm(parts.tokens - 1, _DECODER_NORM, others=1)
    context = parts.squared_norm(parts.tokens, _ENCODER_NORM, others=1.5)
    scale = parts.scale(logit, _ENCODER_NORM / math.sqrt(read * context))
    maps = (
        whole(attention.query),
        key_value[:, :, 0],
        key_value[:, :, 1],
        whole(attention.output),
    )
    maps = _copying_heads(parts, maps, scale, _CCA_NORM * math.sqrt(context))
    store(attention.query, maps[0])
    store(attention.key_value, jnp.stack(maps[1:3], axis=2))
    store(attention.output, maps[3])
    if isinstance(attention.positions, Relative):
        store(attention.relative, jnp.zeros_like(whole(attention.relative)))


# Maps [..., D, heads, H] to query, key and value, and one [..., heads, H, D] of the output.
_Maps = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _copying_heads(parts: "_Parts", maps: _Maps, scale: float, norm: float) -> _Maps:
    """The maps of heads that copy; norm: of what is copied, times that of the stream it comes from."""
    query, key, value, output = (_REST * each for each in maps)
    compared, heads = parts.compared.shape[1], query.shape[-2]
    query = query.at[..., :compared].set(scale * parts.compared[:, None])
    key = key.at[..., :compared].set(scale * parts.turned[:, None])
    for head in range(heads):
        copied_DxW = parts.copied_by(head)
        width = copied_DxW.shape[1]
        value = value.at[..., head, :width].set(copied_DxW)
        written_WxD = norm / math.sqrt(parts.width - compared) * copied_DxW.T
        output = output.at[..., head, :width, :].set(written_WxD)
    return query, key, value, output


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The two parts of an embedding's directions, drawn from a model's random values.

    Attributes:
      compared: [D, U] orthonormal columns: u(x) is the product with them. turned: [D, U], of R^-1 u(x).
      copied: [D, X] orthonormal columns of the rest.
      rotation: [U, U], R. tokens: of an ending. head_dim: of the decoder.
    """

    compared: jax.Array
    turned: jax.Array
    copied: jax.Array
    rotation: jax.Array
    tokens: int
    head_dim: int

    @classmethod
    def of(cls, model: Retro) -> "_Parts":
        """The same for a RETRO and its baseline: the decoder's last layer is drawn equally."""
        config, layers = model.config, model.layers
        width, head_dim = config.d_model, config.head_dim
        directions = min(head_dim, config.encoder_head_dim, config.d_ff, int(_COMPARED * width))
        output_XxD = whole(layers.attention.output)[-1].reshape(-1, width)[:width]
        basis_DxX = jnp.linalg.qr(output_XxD.T)[0]
        widen_DxF = whole(layers.feed_forward.widen)[-1]
        rotation_UxU = jnp.linalg.qr(widen_DxF[:directions, :directions])[0]
        compared_DxU = basis_DxX[:, :directions]
        return cls(
            compared=compared_DxU,
            turned=compared_DxU @ rotation_UxU,
            copied=basis_DxX[:, directions:],
            rotation=rotation_UxU,
            tokens=min(_TOKENS, config.num_heads + 1, config.encoder_num_heads),
            head_dim=head_dim,
        )

    @property
    def width(self) -> int:
        """D."""
        return self.compared.shape[0]

    def copied_by(self, head: int) -> jax.Array:
        """The directions [D, W] that a head copies, W of head_dim or fewer."""
        return self.copied[:, head * self.head_dim : (head + 1) * self.head_dim]

    def squared_norm(self, earlier: int, norm: float, *, others: float) -> float:
        """Of a stream in which heads told of `earlier` tokens, and other branches added theirs."""
        share = self.compared.shape[1] / self.width
        return 1 + earlier * norm**2 * share + others * _BRANCH

    def scale(self, logit: float, product: float) -> float:
        """Of query and key, so that an equal token has a logit; product: of two of its whole embeddings."""
        product *= self.compared.shape[1]
        return math.sqrt(logit * math.sqrt(self.head_dim) / product)


def _tell_earlier_tokens(attention: Attention, parts: _Parts, count: int, norm: float) -> None:
    """Head j - 1 of layer 1 adds R^j u(x), of norm `norm` beside u's, of the token j before; j <= count."""
    compared_DxU = parts.compared
    width, directions = compared_DxU.shape
    fused, output = whole(attention.query_key_value), whole(attention.output)
    turned_DxU = compared_DxU
    for head in range(count):
        turned_DxU = turned_DxU @ parts.rotation
        fused = fused.at[0, :, 2, head].multiply(_REST)
        fused = fused.at[0, :, 2, head, :directions].set(compared_DxU)
        written_UxD = norm / math.sqrt(width) * turned_DxU.T
        output = output.at[0, head].multiply(_REST).at[0, head, :directions].set(written_UxD)
    store(attention.query_key_value, fused)
    store(attention.output, output)
    for head in range(count):
        read_earlier(attention, head, distance=head + 1, sharpness=_SHARPNESS)
