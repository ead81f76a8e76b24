"""The next token of every row of texts under way, by each text's own settings."""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.generate.mixture import Mixture, mixed
from retro_jax.generate.sampling import (
    Needs,
    Sampler,
    SamplingConfig,
    allowed_tokens,
    draw,
    make_sampler,
    needs,
)
from retro_jax.generate.text_progress import RunningText

ALTERNATIVES = 5  # likeliest tokens that a text may ask for at each position
Rows = Sequence[RunningText | None]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A token of one row, its log-probability in nats, and the likeliest tokens with theirs."""

    token: int
    score: float
    alternatives: tuple[tuple[int, float], ...]


@dataclasses.dataclass
class _Settings:
    """The settings of all rows as arrays."""

    sampler: Sampler
    needs: Needs
    seen: np.ndarray | None


class RowDraws:
    """Draws; remembers the settings of rows until it is told to forget them."""

    def __init__(self, vocab_size: int, forbidden: Iterable[int], eos_id: int) -> None:
        """Takes what is common to all texts: tokens never drawn, and the one that ends a text."""
        self._allowed, self._eos_id = np.ones(vocab_size, bool), eos_id
        self._allowed[[t for t in forbidden if t < vocab_size]] = False
        self._settings: _Settings | None = None

    def check(self, sampling: SamplingConfig) -> None:
        """Raises a UserError for settings that leave no token to draw, or name one that there is not."""
        allowed_tokens(sampling, self._allowed)

    def forget(self) -> None:
        """Other texts are in the rows."""
        self._settings = None

    def draw(self, logits: jax.Array, rows: Rows) -> list[Drawn | None]:
        """The next token of each row by logits [B, V]; None for a free one."""
        settings = self._of_rows(rows)
        logits = _mixed_rows(logits, rows)
        steps = np.array([0 if t is None else t.generated for t in rows], np.int32)
        barred = np.full(len(rows), -1, np.int32)
        for row, text in enumerate(rows):
            if text is not None and text.generated < text.sampling.min_tokens:
                barred[row] = self._eos_id
        places = {"steps": steps, "barred": barred}
        drawn = draw(logits, settings.sampler, **places, seen=settings.seen, needs=settings.needs)
        asked = any(text is not None and text.alternatives for text in rows)
        (tokens, scores), likeliest = jax.device_get((drawn, _likeliest(logits) if asked else None))
        found: list[Drawn | None] = []
        for row, text in enumerate(rows):
            if text is None:
                found.append(None)
                continue
            if settings.seen is not None:
                settings.seen[row, tokens[row]] = True
            others: tuple[tuple[int, float], ...] = ()
            if likeliest is not None:
                ids, values = likeliest[0][row].tolist(), likeliest[1][row].tolist()
                others = tuple(zip(ids, values, strict=True))[: text.alternatives]
            found.append(Drawn(int(tokens[row]), float(scores[row]), others))
        return found

    def _of_rows(self, rows: Rows) -> _Settings:
        """The settings of the rows; free ones are drawn greedily and thrown away."""
        if self._settings is None:
            free = SamplingConfig(temperature=0)
            settings = [free if text is None else text.sampling for text in rows]
            numbers = [0 if text is None else text.number for text in rows]
            needed, seen = needs(settings), None
            if needed.penalty:
                seen = np.zeros((len(rows), len(self._allowed)), bool)
                for row, text in enumerate(rows):
                    if text is not None:
                        seen[row, text.tokens] = True
            sampler = make_sampler(settings, numbers, self._allowed)
            if len(sampler.allowed) == 1:  # one program, whatever tokens each text may draw
                every = jnp.asarray(np.repeat(np.asarray(sampler.allowed), len(settings), axis=0))
                sampler = sampler._replace(allowed=every)
            self._settings = _Settings(sampler, needed, seen)
        return self._settings


def _mixed_rows(logits: jax.Array, rows: Rows) -> jax.Array:
    """Logits [B, V], in which the rows that have a token memory are mixed with its votes."""
    mixtures: dict[int, Mixture] = {}
    for text in rows:
        if text is not None and text.mixture is not None:
            mixtures[id(text.mixture)] = text.mixture
    if not mixtures:
        return logits
    every: list[np.ndarray] = []
    for number, mixture in mixtures.items():
        own = [text is not None and id(text.mixture) == number for text in rows]
        texts = [
            text.tokens if text is not None and is_own else [] for text, is_own in zip(rows, own)
        ]
        votes = [np.array(own), *mixture.votes(texts)]
        if not every:
            every = votes
            continue
        for known, new in zip(every, votes, strict=True):
            known[own] = new[own]
    return _choose(*every, logits)


@jax.jit
def _choose(
    own_B: jax.Array,
    weights_B: jax.Array,
    tokens_BxP: jax.Array,
    shares_BxP: jax.Array,
    logits_BxV: jax.Array,
) -> jax.Array:
    """The mixture's log-probabilities of rows of their own; the logits of others as they were."""
    both_BxV = mixed(logits_BxV, weights_B, tokens_BxP, shares_BxP)
    return jnp.where(own_B[:, None], both_BxV, logits_BxV)


@jax.jit
def _likeliest(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens of each row, and their log-probabilities, [B, ALTERNATIVES] each."""
    values, ids = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), ALTERNATIVES)
    return ids, values
