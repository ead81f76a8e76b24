"""Initial values with which a RETRO copies from its neighbours before it has learnt anything.

Copying needs three things that are useless alone: a neighbour's token must know the token before
it, CCA must look for this token there, and the result must reach the read-out. From random
values none of them shows after a million tokens (docs/results.md). Here one head of each begins as
its part of an induction head (Olsson et al. 2022, arXiv 2209.11895):

    encoder, layer 1, head 0    reads the token before, and writes it to a subspace of the stream
    every CCA, head 0           query: the decoder's token;  key: that subspace of a neighbour's token
                                value: a neighbour's token, written as it is embedded

An encoder with an embedding of its own begins with a copy of the decoder's.
The model still computes Algorithm 1; all values, these included, are trained.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from retro_jax.config import RetroConfig
from retro_jax.errors import UserError
from retro_jax.model.attention import Attention
from retro_jax.model.positions import Relative, frequencies, sinusoids
from retro_jax.model.retro import Retro
from retro_jax.sharding import lay_out, replicated

_SHARPNESS = 2.0  # of the head that reads the token before
# Only sinusoids that turn this fast (radians per token) distinguish one token from the next.
_SLOWEST = 0.1


def check_can_copy(config: RetroConfig) -> None:
    """Refuses a model whose parts cannot be set up to copy.

    Raises:
      UserError: naming the field and the value that copying needs.
    """
    needs = {
        "encoder_d_model": config.d_model,  # a neighbour's token is written as the decoder embeds it
        "positions": "relative",  # a bias alone makes the head that reads the token before
        "encoder_head_dim": config.head_dim,  # query and key come from one head's values
    }
    for field, needed in needs.items():
        value = getattr(config, field)
        if value != needed:
            raise UserError(
                f"TrainConfig.initial_retrieval is 'copying' and RetroConfig.{field} is {value!r}: "
                f"expected {needed!r}, or 'random'"
            )


def begin_with_copying(model: Retro) -> None:
    """Sets the first heads of encoder and CCA so that the model copies; the rest stays as it is.

    Args:
      model: new, with random values; changed in place. A baseline is left alone.

    Raises:
      UserError: the configuration does not allow it.
    """
    if not model.config.has_retrieval:
        return
    check_can_copy(model.config)
    embed_neighbours_alike(model)
    encoder, cca = model.encoder.layers.attention, model.cca.attention
    seen_DxH, written_HxD = _read_token_before(encoder)
    width, head_dim = seen_DxH.shape

    # |query|^2 is about head_dim: where the tokens are equal the logit is about its root.
    store(cca.query, whole(cca.query).at[:, :, 0].set(seen_DxH))
    key_DxH = 1.5 * head_dim / math.sqrt(width) * written_HxD.T
    key_value = whole(cca.key_value).at[:, :, 0, 0].set(key_DxH)
    store(cca.key_value, key_value)
    if isinstance(cca.positions, Relative):
        store(cca.relative, whole(cca.relative).at[:, :, 0].set(0.0))

    # Reading by V and writing by its transpose is a projection, scaled by head_dim / width.
    value_LxDxH = key_value[:, :, 1, 0]
    gain = 2.0 * math.sqrt(width) / head_dim
    output = whole(cca.output).at[:, 0].set(gain * jnp.swapaxes(value_LxDxH, 1, 2))
    store(cca.output, output)


def embed_neighbours_alike(model: Retro) -> None:
    """Begins an embedding of the encoder's own as a copy of the decoder's; their updates part them."""
    if not model.config.share_embeddings:
        store(model.encoder.embedding.table, whole(model.embedding.table))


def whole(param: nnx.Param) -> jax.Array:
    """A parameter's values, on a mesh whole on every device."""
    value = param[...]
    return value if jax.typeof(value).sharding.mesh.empty else replicated(value)


def store(param: nnx.Param, value: jax.Array) -> None:
    """Sets a parameter, split as it was."""
    sharding = jax.typeof(param[...]).sharding
    param[...] = value if sharding.mesh.empty else lay_out(value, sharding.spec)


def read_earlier(attention: Attention, head: int, *, distance: int, sharpness: float) -> None:
    """Makes a head of layer 1 read the token that is `distance` before its own.

    Args:
      attention: stacked, with relative positions; changed in place. head: which.
      sharpness: logits of that token over its own neighbours are about twice it.
    """
    fused = whole(attention.query_key_value).at[0, :, 0, head].multiply(0.1)
    store(attention.query_key_value, fused)
    width, head_dim = fused.shape[1], fused.shape[-1]

    # v.R(d) is largest at the distance: the sum of cos(w (d - distance)) over the fast frequencies w.
    there_D = sinusoids(jnp.full(1, float(distance)), width)[0]
    fast_D = jnp.tile(frequencies(width) > _SLOWEST, 2)
    column_D = sharpness / math.sqrt(head_dim) * jnp.where(fast_D, there_D, 0.0)
    relative_DxH = jnp.broadcast_to(column_D[:, None], (width, head_dim))
    store(attention.relative, whole(attention.relative).at[0, :, head].set(relative_DxH))
    store(attention.position_bias, whole(attention.position_bias).at[0, head].set(1.0))


def _read_token_before(attention: Attention) -> tuple[jax.Array, jax.Array]:
    """Makes head 0 of layer 1 read the token before: its value map [D, H] and output map [H, D]."""
    read_earlier(attention, 0, distance=1, sharpness=_SHARPNESS)
    output = whole(attention.output)
    value_DxH, output_HxD = whole(attention.query_key_value)[0, :, 2, 0], output[0, 0]
    width, head_dim = value_DxH.shape

    # Of norm 1, as an embedding is.
    output_HxD = output_HxD / (jnp.std(output_HxD) * math.sqrt(head_dim * width))
    store(attention.output, output.at[0, 0].set(output_HxD))
    return value_DxH, output_HxD
