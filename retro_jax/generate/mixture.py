"""The model mixed with the votes of a token memory while decoding.

    p(token) = (1 - w) p_model(token) + w share(token)

as launch.evaluate scores it: w of the ending's class, tuned by retro_jax.evaluate.token_mixture. What
a text draws from, and its log-probabilities, are the mixture's.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluate.token_mixture import Votes, num_classes

# The text's last tokens [n] -> (length of the longest ending that occurs, the tokens [v] after it)
AskVotes = Callable[[np.ndarray], tuple[int, np.ndarray]]

_PLACES = 64  # different tokens that votes name, at most


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A token memory and the weights of its votes.

    Attributes:
      ask: gives the votes after an ending. weights: [classes] of token_mixture.tune_weights.
      longest: tokens of an ending that are compared.
    """

    ask: AskVotes
    weights: np.ndarray
    longest: int = 32

    def __post_init__(self) -> None:
        if np.shape(self.weights) != (num_classes(),):
            raise UserError(
                f"a token mixture has {np.size(self.weights)} weights: expected {num_classes()}; tune"
                " them again"
            )

    @classmethod
    def without_votes(cls) -> "Mixture":
        """A mixture with a memory that knows nothing: the model alone."""
        return cls(lambda _: (0, np.zeros(0, np.int64)), np.zeros(num_classes()))

    def votes(self, texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the memory says after texts.

        Returns:
          The weight of the votes [n] float32, tokens [n, 64] int32 and their shares [n, 64] float32;
          the shares of no token are 0.
        """
        count = len(texts)
        weights, lengths = np.zeros(count, np.float32), np.zeros(count, np.int32)
        tokens = np.zeros((count, _PLACES), np.int32)
        shares = np.zeros((count, _PLACES), np.float32)
        totals = np.zeros(count, np.int32)
        for row, text in enumerate(texts):
            if not len(text):
                continue
            lengths[row], following = self.ask(np.asarray(text[-self.longest :], np.int32))
            values, counts = np.unique(following, return_counts=True)
            totals[row] = len(following)
            order = np.argsort(-counts, kind="stable")[:_PLACES]
            tokens[row, : len(order)] = values[order]
            shares[row, : len(order)] = counts[order] / max(len(following), 1)
        agreements = shares.max(axis=1)
        classes = Votes(lengths, totals, agreements, agreements).classes()
        weights[:] = np.asarray(self.weights)[classes]
        return weights, tokens, shares


@jax.jit
def mixed(logits: jax.Array, weights: jax.Array, tokens: jax.Array, shares: jax.Array) -> jax.Array:
    """The mixture's log-probabilities [..., V] float32 of logits [..., V]; other inputs as `votes` gives."""
    model = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    flat = model.reshape(-1, model.shape[-1])
    weight = weights.reshape(-1, 1)
    memory = weight * shares.reshape(weight.shape[0], -1)
    rows = jnp.arange(flat.shape[0])[:, None]
    added = jnp.zeros_like(flat).at[rows, tokens.reshape(memory.shape)].add(memory)
    both = jnp.logaddexp(flat + jnp.log1p(-weight), jnp.log(added))
    return jnp.where(weight > 0, both, flat).reshape(model.shape)
