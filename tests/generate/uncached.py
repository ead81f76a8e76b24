"""Generation with live retrieval: neighbours are found as soon as a chunk is complete.

With chunks of 4 tokens, a prompt "bos a b c d" and "e f g h" generated:

    chunk        0          1          2
    tokens       bos a b c  d e f g    h
    retrieved    after c    after g
    read by      c d e f    g h

Chunks are cut from the start of the text, as in training: the partial chunk is always the last one.
Chunk u's neighbours are read by its last token, which predicts the first token of chunk u + 1.
A text longer than the trained length is continued from its last `chunks` chunks: the window moves
at chunk boundaries, as the windows of evaluation do.

Each step is one compiled forward pass of a bucketed length; nothing is cached between steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.model.retro import Retro

Retrieve = Callable[[np.ndarray], np.ndarray]


class TextCodec(Protocol):
    """What is needed of a tokenizer."""

    @property
    def bos_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    def encode(self, text: str) -> np.ndarray: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn.

    Attributes:
      max_tokens: tokens generated at most; eos ends a text earlier.
      min_tokens: eos is not drawn before so many have been generated.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens are drawn; 0 for all.
      top_p: only the most likely tokens that together reach this probability; 1 for all.
      seed: of the draws. Sample i of a seed is the same however many samples are made.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_tokens > 0, self, "max_tokens", "a positive integer")
        require(self.min_tokens >= 0, self, "min_tokens", "a number of tokens")
        require(
            0 <= self.temperature < float("inf"),
            self,
            "temperature",
            "0 or a positive number",
        )
        require(self.top_k >= 0, self, "top_k", "a number of tokens, or 0 for all")
        require(0 < self.top_p <= 1, self, "top_p", "0 < top_p <= 1")
        require(0 <= self.seed < 2**32, self, "seed", "0 <= seed < 2**32")

    @property
    def filters(self) -> "Filters":
        """What a draw is compiled for."""
        return Filters(self.temperature, self.top_k, self.top_p)


class Filters(NamedTuple):
    """The settings of one draw (SamplingConfig)."""

    temperature: float
    top_k: int
    top_p: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
      tokens: [n] int32, the prompt (with bos), what was generated, and eos where it was drawn.
      prompt_length: how many of them are the prompt.
      log_probabilities: [n - prompt_length] float32, of the generated tokens in nats, as the model
        gave them (before temperature, top_k and top_p).
      neighbours: [C, K, R] int32, those of chunks 0 to C - 1 of `tokens`, exactly as the model
        read them; None with retrieval off.
      finished: whether eos ended it.
    """

    tokens: np.ndarray
    prompt_length: int
    log_probabilities: np.ndarray
    neighbours: np.ndarray | None
    finished: bool


@dataclasses.dataclass
class _Text:
    """A text under way, and the neighbours of its complete chunks."""

    tokens: list[int]
    neighbours: list[np.ndarray] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    finished: bool = False


class Generator:
    """Continues token sequences with a RETRO, or with the baseline (`retrieve` None)."""

    def __init__(
        self,
        model: Retro,
        *,
        chunks: int,
        eos_id: int,
        retrieve: Retrieve | None = None,
        forbidden: Sequence[int] = (),
    ):
        """Prepares to generate.

        Args:
          model: the model; its parameters are read now.
          chunks: C, the trained sequence length in chunks: the longest context.
          eos_id: ends a text.
          retrieve: gives the neighbours [n, K, R] of complete chunks [n, M]; None is retrieval off.
          forbidden: tokens never drawn (padding, bos).
        """
        config = model.config
        self.chunk_length, self.pad_id = config.chunk_length, config.pad_id
        self.chunks, self.eos_id, self.retrieve = chunks, eos_id, retrieve
        self._graphdef, self._params = nnx.split(model)
        allowed = np.ones(config.vocab_size, bool)
        allowed[[token for token in forbidden if token < config.vocab_size]] = False
        going_on = allowed & (np.arange(config.vocab_size) != eos_id)
        self._allowed, self._going_on = jnp.asarray(allowed), jnp.asarray(going_on)

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig,
        *,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[Generation]:
        """Continues each prompt ([n] token ids, n >= 1, bos first) until eos or max_tokens.

        `on_step` is called after each token, of all texts at once.
        """
        if not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt has no token: expected bos at least")
        texts = [_Text([int(token) for token in prompt]) for prompt in prompts]
        key = jax.random.key(sampling.seed)
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(texts)))
        known: dict[bytes, np.ndarray] = {}
        for step in range(sampling.max_tokens):
            self._retrieve_complete_chunks(texts, known)
            logits = self.next_logits(*self._context(texts))
            allowed = self._going_on if step < sampling.min_tokens else self._allowed
            drawn = draw(logits, allowed, keys=keys, step=step, filters=sampling.filters)
            for text, token, score in zip(texts, *map(np.asarray, drawn), strict=True):
                if not text.finished:
                    text.tokens.append(int(token))
                    text.log_probabilities.append(float(score))
                    text.finished = int(token) == self.eos_id
            on_step()
            if all(text.finished for text in texts):
                break
        return [_finish(text, len(prompt)) for text, prompt in zip(texts, prompts, strict=True)]

    def next_logits(
        self, tokens: np.ndarray, neighbours: np.ndarray | None, last: np.ndarray
    ) -> jax.Array:
        """Logits [S, V] after position `last` [S] of `tokens` [S, N]; `neighbours` [S, C, K, R]."""
        return _logits_at(self._graphdef, self._params, tokens, neighbours, last)

    def _retrieve_complete_chunks(self, texts: list[_Text], known: dict[bytes, np.ndarray]) -> None:
        """Gives every text the neighbours of its complete chunks; equal chunks are asked for once."""
        if self.retrieve is None:
            return
        due: list[tuple[_Text, bytes]] = []
        for text in texts:
            complete = 0 if text.finished else len(text.tokens) // self.chunk_length
            for u in range(len(text.neighbours), complete):
                chunk = text.tokens[u * self.chunk_length : (u + 1) * self.chunk_length]
                due.append((text, np.asarray(chunk, np.int32).tobytes()))
        queries = list(dict.fromkeys(chunk for _, chunk in due if chunk not in known))
        if queries:
            chunks = np.frombuffer(b"".join(queries), np.int32).reshape(len(queries), -1)
            known.update(zip(queries, np.asarray(self.retrieve(chunks), np.int32), strict=True))
        for text, query in due:
            text.neighbours.append(known[query])

    def _context(self, texts: list[_Text]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """What the model reads of the texts: padded tokens, neighbours, and each one's last position."""
        length = self.chunk_length
        counts = [-(-len(text.tokens) // length) for text in texts]
        firsts = [max(0, count - self.chunks) for count in counts]
        bucket = 1
        while bucket < min(max(counts), self.chunks):
            bucket = min(2 * bucket, self.chunks)
        tokens = np.full((len(texts), bucket * length), self.pad_id, np.int32)
        last = np.zeros(len(texts), np.int32)
        shape = next((text.neighbours[0].shape for text in texts if text.neighbours), None)
        neighbours = None
        if shape is not None:
            neighbours = np.full((len(texts), bucket, *shape), self.pad_id, np.int32)
        for row, (text, first) in enumerate(zip(texts, firsts, strict=True)):
            visible = text.tokens[first * length :]
            tokens[row, : len(visible)] = visible
            last[row] = len(visible) - 1
            if neighbours is not None and text.neighbours[first:]:
                neighbours[row, : len(text.neighbours) - first] = text.neighbours[first:]
        return tokens, neighbours, last


def _finish(text: _Text, prompt_length: int) -> Generation:
    """The text as plain arrays."""
    return Generation(
        tokens=np.asarray(text.tokens, np.int32),
        prompt_length=prompt_length,
        log_probabilities=np.asarray(text.log_probabilities, np.float32),
        neighbours=np.stack(text.neighbours) if text.neighbours else None,
        finished=text.finished,
    )


@partial(jax.jit, static_argnums=0)
def _logits_at(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: jax.Array,
    neighbours: jax.Array | None,
    last: jax.Array,
) -> jax.Array:
    """One full forward pass, and the logits of one position a row."""
    model: Retro = nnx.merge(graphdef, params)
    h = model.hidden_states(tokens, neighbours)
    return model.read(jnp.take_along_axis(h, last[:, None, None], axis=1))[:, 0]


@partial(jax.jit, static_argnames="filters")
def draw(
    logits: jax.Array, allowed: jax.Array, *, keys: jax.Array, step: int, filters: Filters
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row.

    Args:
      logits: [S, V] float32. allowed: [V] bool, the tokens that may be drawn.
      keys: [S] keys, one a row; `step` is folded in.
      filters: temperature, then top_k, then top_p among what is left.

    Returns:
      [S] int32 tokens, and their log probabilities [S] under the logits as they came.
    """
    temperature, top_k, top_p = filters
    scores = jnp.where(allowed, logits, -jnp.inf)
    if temperature == 0:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        scores = scores / temperature
        ordered = jnp.sort(scores, axis=-1, descending=True)
        if top_k:
            rank = jnp.arange(ordered.shape[-1])
            ordered = jnp.where(rank < top_k, ordered, -jnp.inf)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = (before < top_p) & (probabilities > 0)
        threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        scores = jnp.where(scores >= threshold, scores, -jnp.inf)
        noise = jax.vmap(
            lambda key: jax.random.gumbel(jax.random.fold_in(key, step), scores.shape[1:])
        )
        tokens = jnp.argmax(scores + noise(keys), axis=-1)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its continuation, as text (`text` is both) and as tokens."""

    prompt: str
    text: str
    generation: Generation


def sample_text(
    generator: Generator,
    codec: TextCodec,
    prompts: Sequence[str],
    sampling: SamplingConfig,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> list[Sample]:
    """Continues prompts, all at once; give one several times for several samples of it."""
    tokens = [np.concatenate([[codec.bos_id], codec.encode(prompt)]) for prompt in prompts]
    generations = generator.generate(tokens, sampling, on_step=on_step)
    special = (codec.bos_id, codec.eos_id, codec.pad_id)
    texts = [[int(t) for t in g.tokens if t not in special] for g in generations]
    return [
        Sample(prompt, codec.decode(text), generation)
        for prompt, text, generation in zip(prompts, texts, generations, strict=True)
    ]
