"""Texts under way in the rows of one cache: they join and leave between steps.

    rows        0      1      2      3
    step 1      A      -      -      -        B's prompt is read, a chunk a step
    step 2      A      B      -      -
    step 3      A*     B      -      -        A ends; C, D, E join
    step 4      C      B      D      E

A prompt is read in a cache of one row, one chunk between two steps, so that a long prompt does not
hold up the others. Samples of one prompt are read once. A text that outgrows the window leaves its
row, is read again from its last chunks, and comes back.

Every text has settings, a retriever (a revision of the database), a stride and a count of neighbours
of its own: the cache has room for K of each chunk, and what is missing is padding. The cache always
has room for a whole window, and one of few numbers of rows, so that all programs can be compiled
before the first request (`warm_up`).

Drafts are not read here: a block of 4 tokens of several texts waits for arithmetic, no longer for the
weights (docs/serving.md).
"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError
from retro_jax.generate.cache import Cache
from retro_jax.generate.decoder import Completed, Decoder
from retro_jax.generate.mixture import Mixture
from retro_jax.generate.row_draws import Drawn, RowDraws
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.generate.text_progress import Decode, Progress, Retrieve, RunningText
from retro_jax.generate.text_stream import TextStream

_SHRINK_AFTER = 32  # steps with so few texts that fewer rows would do
# One of each program that draws, but for the penalty.
_USUAL = (SamplingConfig(temperature=0), SamplingConfig(), SamplingConfig(top_p=0.9))
_FACTOR = 4  # between numbers of rows, and of chunks that are completed at once


@dataclasses.dataclass
class _Reading:
    """A window that is being read for some texts, by blocks of a stride: `done` of these are."""

    texts: list[RunningText]
    tokens: np.ndarray
    neighbours: list[np.ndarray | None]
    stride: int
    done: int = 0
    cache: Cache | None = None


class RunningTexts:
    """Continues texts, all by one token a step.

    Attributes:
      most: rows at most. neighbours: K. strides: that texts may have.
      retrieval_seconds: spent in `retrieve` so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        rows: int,
        neighbours: int,
        eos_id: int,
        decode: Decode,
        forbidden: Iterable[int] = (),
        strides: Iterable[int] = (),
    ) -> None:
        """Takes what is common to all texts; nothing is compiled yet.

        Args:
          decoder: of the model, on one device.
          rows: texts at once, at most.
          neighbours: K, of a chunk at most; 0 where no text retrieves.
          eos_id: ends a text. decode: gives the text of tokens. forbidden: tokens never drawn.
          strides: tokens between retrievals that texts may ask for, besides a chunk's M.

        Raises:
          UserError: a stride that does not divide a chunk.
        """
        self.decoder, self.eos_id, self.decode = decoder, eos_id, decode
        config = decoder.config
        self.neighbours = neighbours if config.has_retrieval else 0
        self.retrieval_seconds = 0.0
        self._length, self._capacity = config.chunk_length, decoder.chunks * config.chunk_length
        self._sizes = row_counts(rows)
        self.most = self._sizes[-1]
        self.strides = tuple(sorted({self._length, *strides}, reverse=True))
        for stride in self.strides:
            if stride < 1 or self._length % stride:
                raise UserError(f"a stride of {stride}: expected a divisor of {self._length}")
        self._draws = RowDraws(config.vocab_size, forbidden, eos_id)
        self._reading: collections.deque[_Reading] = collections.deque()
        self._rows: list[RunningText | None] = [None] * self._sizes[0]
        self._state: tuple[jax.Array, Cache] | None = None
        self._small = 0  # steps in a row in which fewer rows would have done

    @property
    def room(self) -> int:
        """How many texts may join."""
        return self.most - len(self.texts)

    @property
    def texts(self) -> list[RunningText]:
        """All that are under way."""
        waiting = [text for reading in self._reading for text in reading.texts]
        return [text for text in self._rows if text is not None] + waiting

    def check(self, sampling: SamplingConfig) -> None:
        """Raises a UserError for settings that leave no token to draw, or name one that there is not."""
        self._draws.check(sampling)

    def join(self, texts: Sequence[RunningText]) -> None:
        """Takes in samples of one prompt, of equal retrieval; there must be `room` for them.

        Raises:
          UserError: an empty prompt, settings that leave no token, another stride than `strides`, or a
            failed retrieval.
        """
        assert len(texts) <= self.room
        if not texts[0].tokens:
            raise UserError("a prompt has no token: expected bos at least")
        for text in texts:
            self.check(text.sampling)
            text.stride = text.stride or self._length
            if text.stride not in self.strides:
                raise UserError(f"a stride of {text.stride}: expected one of {self.strides}")
        first = texts[0]
        if first.retrieve is not None and self.neighbours:
            ends = range(first.stride, len(first.tokens) + 1, first.stride)
            whole = [end for end in ends if end >= self._length]
            found: list[np.ndarray | None] = [None] * (len(ends) - len(whole))
            if whole:
                chunks = [first.tokens[end - self._length : end] for end in whole]
                found += list(self._retrieve(first.retrieve, np.array(chunks, np.int32)))
            for text in texts:
                text.neighbours = list(found)
        self._read(list(texts))

    def step(self) -> list[Progress]:
        """Draws a token of every text that has been read; reads one chunk of a prompt that has not."""
        self._read_chunk()
        while self._reading and not any(self._rows):
            self._read_chunk()
        if not any(self._rows):
            return []
        progress = self._draw()
        self._drop([text for text in self._rows if text is not None and text.ended])
        progress += self._retrieve_due()
        self._advance()
        return progress

    def end(self, text: RunningText, reason: str) -> Progress | None:
        """Ends a text between steps, and frees its row; None where it has ended before."""
        if text.ended:
            return None
        text.ended = reason
        self._drop([text])
        return Progress(text, text.stream.finish(), None, None, (), reason)

    def clear(self) -> list[RunningText]:
        """Drops all texts and the cache, after an error that is of no single text."""
        texts = self.texts
        self._reading.clear()
        self._rows = [None] * self._sizes[0]
        self._state = None
        self._draws.forget()
        return texts

    def warm_up(self) -> None:
        """Compiles the programs of all numbers of rows, strides and settings."""
        for size in self._sizes:
            self._rows = [None] * size
            state = self._state = self._empty(size)
            counts = [0, *row_counts(size)] if self.neighbours else [0]
            for count in counts:
                state = self._step_rows(state, {}, self._dummies(count, size))
            for stride in self.strides:
                alone = self._empty(1)
                block = np.zeros((1, stride), np.int32)
                for completed in ((), self._dummies(1, 1)) if self.neighbours else ((),):
                    alone = self._read_block(alone[1], block, 0, completed, False)
                logits, cache = self._read_block(alone[1], block, 0, (), True)
                alone = (_at(logits, np.int32(0)), cache)
            self._state = self.decoder.replace_rows(state, alone, {0: 0})
            mixture = Mixture.without_votes() if self.neighbours else None
            for penalty, settings in itertools.product((1.0, 1.1), _USUAL):
                sampling = dataclasses.replace(settings, repetition_penalty=penalty)
                text = RunningText([0], 1, sampling, TextStream(self.decode), alternatives=1)
                text.mixture = mixture
                self._rows = [text, *[None] * (size - 1)]
                self._draws.forget()
                self._draw()
                mixture = None
            for other in self._sizes:
                self._rows = [None] * size
                self._resize(other)
                self._rows, self._state = [None] * size, self._empty(size)
        self.clear()

    def _read(self, texts: list[RunningText], *, soon: bool = False) -> None:
        """Queues a window to be read: the last chunks of texts that are equal so far."""
        first = max(0, -(-len(texts[0].tokens) // self._length) - self.decoder.chunks)
        for text in texts:
            text.first = first
        stride = texts[0].stride
        tokens = np.asarray(texts[0].tokens[first * self._length :], np.int32)
        neighbours = texts[0].neighbours[first * self._length // stride :]
        reading = _Reading(texts, tokens, neighbours, stride)
        if soon:
            self._reading.appendleft(reading)
        else:
            self._reading.append(reading)

    def _read_chunk(self) -> None:
        """Reads one block of the first window that waits; its texts get rows after the last one."""
        if not self._reading:
            return
        reading = self._reading[0]
        length = reading.stride
        if reading.cache is None:
            reading.cache = self._empty(1)[1]
        end = (reading.done + 1) * length
        part = reading.tokens[end - length : end]
        block = np.full((1, length), self.decoder.config.pad_id, np.int32)
        block[0, : len(part)] = part
        completed: tuple[Completed, ...] = ()
        if reading.done < len(reading.neighbours) and end >= self._length:
            found = reading.neighbours[reading.done]
            assert found is not None
            completed = (Completed(0, reading.tokens[end - self._length : end], found),)
        partial = len(part) < length
        logits, reading.cache = self._read_block(
            reading.cache, block, reading.done * length, completed, partial
        )
        reading.done += 1
        if reading.done * length < len(reading.tokens):
            return
        self._reading.popleft()
        if partial:
            logits = _at(logits, np.int32(len(part) - 1))
        self._place(reading.texts, (logits, reading.cache))

    def _read_block(
        self,
        cache: Cache,
        block: np.ndarray,
        start: int,
        completed: Sequence[Completed],
        all_logits: bool,
    ) -> tuple[jax.Array, Cache]:
        """A block of one text, as long as its stride."""
        return self.decoder.step(
            cache,
            block,
            np.array([start], np.int32),
            live=np.ones(1, bool),
            completed=completed,
            all_logits=all_logits,
            strides=np.array([block.shape[1]], np.int32),
        )

    def _place(self, texts: list[RunningText], state: tuple[jax.Array, Cache]) -> None:
        """Gives rows to texts whose window has been read."""
        active = sum(text is not None for text in self._rows)
        self._resize(self._size_for(active + len(texts)))
        rows = {}
        for text in texts:
            row = self._rows.index(None)
            self._rows[row] = text
            rows[row] = 0
        if self._state is None:
            self._state = self._empty(len(self._rows))
        self._state = self.decoder.replace_rows(self._state, state, rows)
        self._draws.forget()

    def _size_for(self, count: int) -> int:
        """The number of rows for so many texts, never fewer than there are."""
        return next(size for size in self._sizes if size >= max(count, len(self._rows)))

    def _resize(self, size: int) -> None:
        """Moves the texts to another number of rows; room for them is known to be there."""
        if size == len(self._rows):
            return
        rows = [row for row, text in enumerate(self._rows) if text is not None]
        if self._state is not None:
            padded = (rows + [0] * size)[:size]
            logits, cache = self._state
            self._state = self.decoder.choose_rows(cache, logits, padded)
        kept = [self._rows[row] for row in rows]
        self._rows = [*kept, *[None] * (size - len(kept))]
        self._small = 0
        self._draws.forget()

    def _empty(self, rows: int) -> tuple[jax.Array, Cache]:
        """A cache in which nothing has been read, and logits of no meaning."""
        cache = self.decoder.empty(rows, self._capacity, self.neighbours)
        logits = jnp.zeros((rows, self.decoder.config.vocab_size), jnp.float32)
        return self.decoder.beside_weights(logits), cache

    def _drop(self, texts: list[RunningText]) -> None:
        """Frees the rows of texts, and forgets windows that nobody waits for."""
        if not texts:
            return
        for row, text in enumerate(self._rows):
            if text in texts:
                self._rows[row] = None
        for reading in list(self._reading):
            reading.texts = [text for text in reading.texts if text not in texts]
            if not reading.texts:
                self._reading.remove(reading)
        self._draws.forget()

    def _draw(self) -> list[Progress]:
        """The next token of every row."""
        assert self._state is not None
        drawn = self._draws.draw(self._state[0], self._rows)
        return [
            self._append(text, one)
            for text, one in zip(self._rows, drawn, strict=True)
            if text is not None and one is not None
        ]

    def _append(self, text: RunningText, drawn: Drawn) -> Progress:
        """Adds a token to a text, and ends it where it is to end."""
        token, score, alternatives = drawn.token, drawn.score, drawn.alternatives
        text.tokens.append(token)
        text.log_probabilities.append(score)
        piece = ""
        if token == self.eos_id:
            text.ended = "eos"
        else:
            piece = text.stream.push(token)
            text.ended = "stop" if text.stream.stopped else ""
        if not text.ended and text.generated >= text.sampling.max_tokens:
            text.ended = "length"
        if text.ended:
            piece += text.stream.finish()
        return Progress(text, piece, token, score, alternatives, text.ended)

    def _retrieve_due(self) -> list[Progress]:
        """Neighbours of the chunks that are complete now, asked for together by each retriever."""
        due: dict[int, list[RunningText]] = collections.defaultdict(list)
        if self.neighbours:
            for text in self._rows:
                if text is None or not text.retrieve or len(text.tokens) % text.stride:
                    continue
                if len(text.tokens) < self._length:
                    text.neighbours.append(None)
                else:
                    due[id(text.retrieve)].append(text)
        failed = []
        for texts in due.values():
            retrieve = texts[0].retrieve
            assert retrieve is not None
            chunks = np.array([text.tokens[-self._length :] for text in texts], np.int32)
            try:
                found = self._retrieve(retrieve, chunks)
            except Exception as error:  # of this revision alone: the other texts go on
                for text in texts:
                    text.error = error
                    failed.append(self.end(text, "error"))
                continue
            for text, neighbours in zip(texts, found, strict=True):
                text.neighbours.append(neighbours)
        return [progress for progress in failed if progress is not None]

    def _retrieve(self, retrieve: Retrieve, chunks: np.ndarray) -> np.ndarray:
        """[n, K, R]: the neighbours of chunks [n, M], padded."""
        start = time.perf_counter()
        found = np.asarray(retrieve(chunks), np.int32)
        self.retrieval_seconds += time.perf_counter() - start
        expected = (len(chunks), self.decoder.config.neighbour_length)
        if found.ndim != 3 or (found.shape[0], found.shape[2]) != expected:
            raise UserError(
                f"neighbours of {len(chunks)} chunks have shape {found.shape}: expected"
                f" [{expected[0]}, K, {expected[1]}]"
            )
        if found.shape[1] > self.neighbours:
            raise UserError(
                f"{found.shape[1]} neighbours of a chunk: expected {self.neighbours} at most"
            )
        missing = ((0, 0), (0, self.neighbours - found.shape[1]), (0, 0))
        return np.pad(found, missing, constant_values=self.decoder.config.pad_id)

    def _advance(self) -> None:
        """Reads the last token of every text; one whose window moves is read again."""
        for row, text in enumerate(self._rows):
            if text is not None and -(-len(text.tokens) // self._length) - self.decoder.chunks > (
                text.first
            ):
                self._rows[row] = None
                self._draws.forget()
                self._read([text], soon=True)
        live = {row: text for row, text in enumerate(self._rows) if text is not None}
        smaller = next(size for size in self._sizes if size >= len(self.texts))
        self._small = self._small + 1 if smaller < len(self._rows) else 0
        if self._small > _SHRINK_AFTER:
            self._resize(smaller)
            live = {row: text for row, text in enumerate(self._rows) if text is not None}
        if not live:
            return
        assert self._state is not None
        completed = []
        for row, text in live.items():
            inside = len(text.tokens) - text.first * self._length
            found = text.neighbours[-1] if text.neighbours else None
            if found is None or len(text.tokens) % text.stride or inside < self._length:
                continue
            query = np.asarray(text.tokens[-self._length :], np.int32)
            completed.append(Completed(row, query, found))
        count = next(n for n in [0, *row_counts(len(self._rows))] if n >= len(completed))
        completed += completed[-1:] * (count - len(completed))
        self._state = self._step_rows(self._state, live, completed)

    def _step_rows(
        self,
        state: tuple[jax.Array, Cache],
        live: dict[int, RunningText],
        completed: Sequence[Completed],
    ) -> tuple[jax.Array, Cache]:
        """One token of the rows that are live."""
        rows = len(self._rows)
        tokens, starts = np.zeros((rows, 1), np.int32), np.zeros(rows, np.int32)
        mask, strides = np.zeros(rows, bool), np.full(rows, self._length, np.int32)
        for row, text in live.items():
            tokens[row], mask[row], strides[row] = text.tokens[-1], True, text.stride
            starts[row] = len(text.tokens) - 1 - text.first * self._length
        return self.decoder.step(
            state[1], tokens, starts, live=mask, completed=completed, strides=strides
        )

    def _dummies(self, count: int, rows: int) -> list[Completed]:
        """Chunks that are complete, to compile for."""
        config = self.decoder.config
        neighbours = np.zeros((self.neighbours, config.neighbour_length), np.int32)
        chunk = np.zeros(config.chunk_length, np.int32)
        return [Completed(row % rows, chunk, neighbours) for row in range(count)]


def row_counts(most: int) -> list[int]:
    """1, 4, 16, ... and the power of two that has room for `most`."""
    largest = 1 << max(most - 1, 0).bit_length()
    counts = []
    count = 1
    while count < largest:
        counts.append(count)
        count *= _FACTOR
    return [*counts, largest]


@jax.jit
def _at(logits_BxTxV: jax.Array, place: jax.Array) -> jax.Array:
    """[B, V]: the logits after one token of a block."""
    return jax.lax.dynamic_index_in_dim(logits_BxTxV, place, axis=1, keepdims=False)
