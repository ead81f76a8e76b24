"""How the next token is drawn: settings that are values, one set for each text.

The order, where several are set:

    repetition penalty -> allowed tokens -> temperature -> top-k -> top-p -> min-p -> draw

A draw depends on the text's own seed, sample number and step only, so that the same seed gives the
same text in any batch and any order. (Logits of other batch sizes differ by rounding, 1e-6 or so; a
draw that hangs on it may differ.)
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.config import require
from retro_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn, and when a text ends.

    Attributes:
      max_tokens: tokens generated at most; eos or a stop string ends a text earlier.
      min_tokens: eos is not drawn before so many have been generated.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens are drawn; 0 for all.
      top_p: only the most likely tokens that together reach this probability; 1 for all.
      seed: of the draws. Sample i of a prompt is the same for any number of samples.
      min_p: only tokens at least this times as likely as the most likely one; 0 for all.
      repetition_penalty: divides positive logits of tokens that the text has already, and
        multiplies negative ones (Keskar et al. 2019, arXiv 1909.05858); 1 changes nothing.
      allowed_tokens: only these are drawn, and eos; none means all.
      forbidden_tokens: these are never drawn.
      stop: the text ends before the first of these strings.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    allowed_tokens: tuple[int, ...] = ()
    forbidden_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The settings as JSON gives them back; later ones only where they are set."""
        settings = dataclasses.asdict(self)
        for name in ("min_p", "repetition_penalty", "allowed_tokens", "forbidden_tokens", "stop"):
            if settings[name] == getattr(SamplingConfig, name):
                del settings[name]
            elif isinstance(settings[name], tuple):
                settings[name] = list(settings[name])
        return settings

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, self, "max_tokens", "a positive integer")
        require(self.min_tokens >= 0, self, "min_tokens", "a number of tokens")
        finite = 0 <= self.temperature < float("inf")
        require(finite, self, "temperature", "0 or a positive number")
        require(self.top_k >= 0, self, "top_k", "a number of tokens, or 0 for all")
        require(0 < self.top_p <= 1, self, "top_p", "0 < top_p <= 1")
        require(0 <= self.seed < 2**32, self, "seed", "0 <= seed < 2**32")
        require(0 <= self.min_p <= 1, self, "min_p", "0 <= min_p <= 1")
        positive = 0 < self.repetition_penalty < float("inf")
        require(positive, self, "repetition_penalty", "a positive number, 1 for none")
        for field in ("allowed_tokens", "forbidden_tokens"):
            ok = all(token >= 0 for token in getattr(self, field))
            require(ok, self, field, "token ids")
        valid = not isinstance(self.stop, str) and all(self.stop)
        require(valid, self, "stop", "a list of strings that are not empty")


class Sampler(NamedTuple):
    """The settings of the draws of B texts, as arrays: other values need no other program.

    Attributes:
      temperature, top_p, min_p, penalty: [B] float32. top_k: [B] int32.
      key: [B], each text's random key.
      allowed: [B, V] bool, or [1, V] where all texts have the same.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array
    key: jax.Array
    allowed: jax.Array


class Needs(NamedTuple):
    """Which costly parts any of the texts needs; each combination is a program."""

    random: bool
    order: bool
    penalty: bool


def needs(settings: Sequence[SamplingConfig]) -> Needs:
    """The computations that the draws of these texts need."""
    random = [one for one in settings if one.temperature > 0]
    return Needs(
        random=bool(random),
        order=any(one.top_k or one.top_p < 1 for one in random),
        penalty=any(one.repetition_penalty != 1 for one in settings),
    )


def make_sampler(
    settings: Sequence[SamplingConfig], numbers: Sequence[int], allowed: np.ndarray
) -> Sampler:
    """The settings of several texts as arrays.

    Args:
      settings: of each text. numbers: each text's number among the samples of its prompt, from 0.
      allowed: [V] bool, the tokens that any text may draw.

    Raises:
      UserError: a text may draw no token.
    """

    def column(field: str, dtype: type) -> jax.Array:
        return jnp.asarray(np.array([getattr(one, field) for one in settings], dtype))

    masks = [allowed_tokens(one, allowed) for one in settings]
    if all(mask is masks[0] for mask in masks):
        masks = masks[:1]
    seeds = np.array([one.seed for one in settings], np.uint32)
    return Sampler(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        penalty=column("repetition_penalty", np.float32),
        key=_keys(seeds, np.array(numbers, np.uint32)),
        allowed=jnp.asarray(np.stack(masks)),
    )


def allowed_tokens(setting: SamplingConfig, allowed: np.ndarray) -> np.ndarray:
    """[V] bool: the tokens that one text may draw; the same array where its settings say nothing.

    Raises:
      UserError: naming a token past the vocabulary, or that none is left.
    """
    if not setting.allowed_tokens and not setting.forbidden_tokens:
        return allowed
    for field in ("allowed_tokens", "forbidden_tokens"):
        past = [token for token in getattr(setting, field) if token >= len(allowed)]
        if past:
            raise UserError(
                f"SamplingConfig.{field} has {past[0]}: expected ids less than {len(allowed)}"
            )
    mask = allowed.copy()
    if setting.allowed_tokens:
        mask[:] = False
        mask[list(setting.allowed_tokens)] = allowed[list(setting.allowed_tokens)]
    mask[list(setting.forbidden_tokens)] = False
    if not mask.any():
        raise UserError(
            "SamplingConfig.allowed_tokens less forbidden_tokens leaves none: expected one or more"
        )
    return mask


@jax.jit
def _keys(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    """[B] keys of seeds and sample numbers."""
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(
        seeds, numbers
    )


@partial(jax.jit, static_argnames="needs")
def draw(
    logits: jax.Array,
    sampler: Sampler,
    *,
    steps: jax.Array,
    barred: jax.Array,
    seen: jax.Array | None = None,
    needs: Needs,
) -> tuple[jax.Array, jax.Array]:
    """Draws one token of each text.

    Args:
      logits: [B, V] float32, as the model gave them.
      sampler: the texts' settings.
      steps: [B] int32, how many tokens each text has generated before.
      barred: [B] int32, a token that is not drawn now (eos before min_tokens), or -1.
      seen: [B, V] bool, tokens that each text has already; read for a penalty only.
      needs: of these texts; parts that it says none needs are not computed.

    Returns:
      [B] int32 tokens, and their log-probabilities [B] under the logits as they came.
    """
    scores = _perturbed(logits, sampler, steps, barred, seen, needs)
    tokens = jnp.argmax(scores, axis=-1)
    return tokens.astype(jnp.int32), _log_probability(logits, tokens)


@partial(jax.jit, static_argnames="needs")
def draw_block(
    logits: jax.Array,
    sampler: Sampler,
    *,
    steps: jax.Array,
    barred: jax.Array,
    seen: jax.Array | None = None,
    needs: Needs,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws a token after every token of a block, as `draw` would one after the other.

    Args:
      logits: [B, T, V]. steps: [B, T]. barred: [B, T]. The rest is as in `draw`; `seen` is that of the
        first place, so texts with a penalty may use the first token alone.

    Returns:
      [B, T] tokens, their log-probabilities, and by how much each was ahead of the next in logits.
    """
    rows, length, vocabulary = logits.shape

    def repeated(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, length, axis=0) if x.shape[0] == rows else x

    flat = logits.reshape(rows * length, vocabulary)
    sampler = Sampler(*map(repeated, sampler))
    seen = None if seen is None else repeated(seen)
    scores = _perturbed(flat, sampler, steps.reshape(-1), barred.reshape(-1), seen, needs)
    tokens = jnp.argmax(scores, axis=-1)
    others = jnp.where(jnp.arange(vocabulary) == tokens[:, None], -jnp.inf, scores)
    ahead = jnp.max(scores, axis=-1) - jnp.max(others, axis=-1)
    if needs.random:
        ahead = ahead * jnp.where(sampler.temperature == 0, 1.0, sampler.temperature)
    shape = (rows, length)
    found = tokens.astype(jnp.int32), _log_probability(flat, tokens), ahead
    return found[0].reshape(shape), found[1].reshape(shape), found[2].reshape(shape)


def _perturbed(
    logits: jax.Array,
    sampler: Sampler,
    steps: jax.Array,
    barred: jax.Array,
    seen: jax.Array | None,
    needs: Needs,
) -> jax.Array:
    """[B, V] scores of which the largest is drawn: arguments as of `draw`."""
    scores = logits
    if needs.penalty and seen is not None:
        scores = jnp.where(seen, penalised(logits, sampler.penalty[:, None]), logits)
    vocabulary = jnp.arange(logits.shape[-1])
    may = sampler.allowed & (vocabulary != barred[:, None])
    scores = jnp.where(may, scores, -jnp.inf)
    if not needs.random:
        return scores
    greedy = (sampler.temperature == 0)[:, None]
    drawn = scores / jnp.where(greedy, 1.0, sampler.temperature[:, None])
    if needs.order:
        drawn = keep_likeliest(drawn, sampler.top_k[:, None], sampler.top_p[:, None])
    drawn = keep_near_best(drawn, sampler.min_p[:, None])
    drawn = drawn + _noise(sampler.key, steps, logits.shape[-1])
    return jnp.where(greedy, scores, drawn)


def _log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """[B]: of one token of each row, in nats."""
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(log_probabilities, tokens[:, None], axis=-1)[:, 0]


def penalised(logits: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits of tokens that the text has already."""
    return jnp.where(logits > 0, logits / penalty, logits * penalty)


def keep_likeliest(scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Top-k, then top-p among the rest; other scores are -inf.

    Args:
      scores: [B, V]. top_k: [B, 1], 0 for all. top_p: [B, 1], 1 for all.
    """
    order = _in_order(scores)
    mask = (top_k == 0) | _heaviest(order, jnp.ones_like(scores), top_k)
    probabilities = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    # A sum of many small probabilities may round to less than 1: 1 means all.
    mask &= (top_p >= 1) | _heaviest(order, probabilities, top_p)
    return jnp.where(mask, scores, -jnp.inf)


def _in_order(scores: jax.Array) -> jax.Array:
    """[B, V] uint32 in the order of float32 scores."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _heaviest(order: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Which tokens have less than `limit` of weight above them: [B, V] bool.

    By bisection over the 32 bits of a score: sorting 16,384 of them takes as long as a whole step
    of a model of 36M parameters on a CPU.

    Args:
      order: [B, V] uint32. weights: [B, V] float32. limit: [B, 1].
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        above = jnp.sum(jnp.where(order > middle, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    low = jnp.zeros((order.shape[0], 1), jnp.uint32)
    _, threshold = jax.lax.fori_loop(0, 32, halve, (low, ~low))
    return order >= threshold


def keep_near_best(scores: jax.Array, min_p: jax.Array) -> jax.Array:
    """Min-p; other scores are -inf. scores: [B, V]. min_p: [B, 1], 0 for all."""
    best = jnp.max(scores, axis=-1, keepdims=True)
    return jnp.where(scores >= best + jnp.log(min_p), scores, -jnp.inf)


def _noise(keys: jax.Array, steps: jax.Array, size: int) -> jax.Array:
    """[B, V] Gumbel noise, of each text's key and step."""

    def one(key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(key, step), (size,))

    return jax.vmap(one)(keys, steps)
