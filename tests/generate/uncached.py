"""The slow reference of generation: nothing is cached, every token is one whole forward pass.

Neighbours are retrieved as soon as a chunk is complete.

With chunks of 4 tokens, a prompt "bos a b c d" and "e f g h" generated:

    chunk        0          1          2
    tokens       bos a b c  d e f g    h
    retrieved    after c    after g
    read by      c d e f    g h

Chunks are cut from the start of the text, as in training: the partial chunk is always the last one.
Chunk u's neighbours are read by its last token, which predicts the first token of chunk u + 1.
A text longer than the trained length is continued from its last `chunks` chunks: the window moves
at chunk boundaries, as the windows of evaluation do. Each step has a bucketed length.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retro_jax.model.retro import Retro

Retrieve = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass
class _Text:
    """A text under way, and the neighbours of its complete chunks."""

    tokens: list[int]
    neighbours: list[np.ndarray] = dataclasses.field(default_factory=list)
    finished: bool = False


class UncachedGenerator:
    """Continues token sequences greedily, with a whole forward pass for every token."""

    def __init__(
        self,
        model: Retro,
        *,
        chunks: int,
        eos_id: int,
        retrieve: Retrieve | None = None,
        forbidden: Sequence[int] = (),
    ):
        """Takes what retro_jax.generate's Generator takes."""
        config = model.config
        self.chunk_length, self.pad_id = config.chunk_length, config.pad_id
        self.chunks, self.eos_id, self.retrieve = chunks, eos_id, retrieve
        self._graphdef, self._params = nnx.split(model)
        self._forbidden = [token for token in forbidden if token < config.vocab_size]

    def generate(self, prompts: Sequence[np.ndarray], max_tokens: int) -> list[np.ndarray]:
        """Each prompt with its continuation until eos or max_tokens."""
        texts = [_Text([int(token) for token in prompt]) for prompt in prompts]
        known: dict[bytes, np.ndarray] = {}
        for _ in range(max_tokens):
            self._retrieve_complete_chunks(texts, known)
            logits = np.array(self.next_logits(*self._context(texts)))
            logits[:, self._forbidden] = -np.inf
            for text, token in zip(texts, logits.argmax(-1), strict=True):
                if not text.finished:
                    text.tokens.append(int(token))
                    text.finished = int(token) == self.eos_id
            if all(text.finished for text in texts):
                break
        return [np.asarray(text.tokens, np.int32) for text in texts]

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
