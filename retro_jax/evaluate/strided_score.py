"""The loss of texts whose neighbours are retrieved after every s tokens, as generation reads them.

A stride of 64 is the paper's: it gives the losses of a whole forward pass. A smaller one costs as many
more retrievals and encodings, so that what a token reads was found with newer tokens:

    stride        64                          16
    token 79      found with tokens 0..63     found with tokens 16..79
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError
from retro_jax.generate.decoder import Completed, Decoder

Retrieve = Callable[[np.ndarray], np.ndarray]


def strided_losses(
    decoder: Decoder, texts: Sequence[np.ndarray], retrieve: Retrieve | None
) -> list[np.ndarray]:
    """The loss of every token of some texts, which are read together.

    Args:
      decoder: its stride is that of retrieval. texts: each [n] tokens from bos on, n >= 2.
      retrieve: gives the neighbours [m, K, R] of queries [m, M]; None is retrieval off.

    Returns:
      Of each text [n - 1] float32 nats, of its second token and on.

    Raises:
      UserError: a text is longer than the decoder's window.
    """
    length, stride = decoder.config.chunk_length, decoder.stride
    longest, most = max(map(len, texts)), decoder.chunks * length
    if longest > most:
        raise UserError(f"a text of {longest} tokens: expected at most {most}, one window")
    found = _retrieved(texts, retrieve, length, stride)
    neighbours = next((rows.shape[1] for rows in found if len(rows)), 0)
    rows = decoder.row_bucket(len(texts))
    cache = decoder.empty(rows, decoder.capacity_for(longest), neighbours)
    losses = [np.zeros(len(text) - 1, np.float32) for text in texts]
    for start in range(0, longest - 1, stride):
        block = np.full((rows, stride), decoder.config.pad_id, np.int32)
        targets, live, done = np.zeros((rows, stride), np.int32), np.zeros(rows, bool), []
        for row, text in enumerate(texts):
            part, following = text[start : start + stride], text[start + 1 : start + 1 + stride]
            block[row, : len(part)], targets[row, : len(following)] = part, following
            live[row] = len(part) > 0
            number = (start + stride - length) // stride
            if 0 <= number < len(found[row]):
                query = np.asarray(text[start + stride - length : start + stride], np.int32)
                done.append(Completed(row, query, found[row][number]))
        starts = np.full(rows, start, np.int32)
        logits, cache = decoder.step(
            cache, block, starts, live=live, completed=done, all_logits=True
        )
        nats = np.asarray(_nats(decoder.on_one_device(logits), targets))
        for row, own in enumerate(losses):
            part = own[start : start + stride]
            part[:] = nats[row, : len(part)]
    return losses


def _retrieved(
    texts: Sequence[np.ndarray], retrieve: Retrieve | None, length: int, stride: int
) -> list[np.ndarray]:
    """Of each text the neighbours [m, K, R] after M tokens, and after every s more."""
    ends = [range(length, len(text) + 1, stride) for text in texts]
    if retrieve is None or not any(map(len, ends)):
        return [np.zeros((0, 0, 0), np.int32) for _ in texts]
    queries = [text[end - length : end] for text, own in zip(texts, ends) for end in own]
    every = np.asarray(retrieve(np.stack(queries).astype(np.int32)), np.int32)
    cuts = np.cumsum([len(own) for own in ends])[:-1]
    return np.split(every, cuts)


@jax.jit
def _nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """[B, T] losses of targets [B, T]."""
    scores = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
