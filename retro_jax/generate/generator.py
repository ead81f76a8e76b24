"""Generation with live retrieval: a chunk's neighbours are retrieved as soon as it is complete.

With chunks of 4 tokens, a prompt "bos a b c d" and "e f g h" generated:

    chunk        0          1          2
    tokens       bos a b c  d e f g    h
    retrieved    after c    after g
    read by      c d e f    g h

Chunks are cut from the start of the text, as in training: the partial chunk is always the last one.
Chunk u's neighbours are read by its last token, which predicts the first token of chunk u + 1.

A text longer than the trained length is continued from its last `chunks` chunks. The window moves
by one chunk, at a chunk's end, as the windows of evaluation do, and is read again then: the cached
activations had read the chunk that has left. This keeps the text equal to an uncached one, and
costs a prefill of the window for every chunk (docs/generation.md has the time).
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from retro_jax.errors import UserError
from retro_jax.generate.cache import Cache, encoded_length
from retro_jax.generate.decoder import Completed, Decoder, Window
from retro_jax.generate.drafts import Drafter, Drafting, LookUp
from retro_jax.generate.mixture import Mixture, mixed
from retro_jax.generate.sampling import (
    Needs,
    Sampler,
    SamplingConfig,
    draw,
    draw_block,
    make_sampler,
    needs,
)
from retro_jax.generate.text_stream import TextStream
from retro_jax.model.retro import Retro

Retrieve = Callable[[np.ndarray], np.ndarray]
Decode = Callable[[Sequence[int]], str]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A finished text.

    Attributes:
      tokens: [n] int32, the prompt (with bos), the generated tokens, and eos where it was drawn.
      prompt_length: how many of them are the prompt.
      log_probabilities: [n - prompt_length] float32, of the generated tokens in nats, as the model
        gave them (before penalties, temperature and filters).
      neighbours: [C, K, R] int32, those of chunks 0 to C - 1 of `tokens`, exactly as the model
        read them; None with retrieval off. With a stride s < M after each s tokens; those of fewer
        than M tokens were not read.
      finished: whether eos ended it.
      ended: "eos", "stop" (a stop string) or "length".
      text: the generated text, up to the stop string; None without a decoder of tokens.
    """

    tokens: np.ndarray
    prompt_length: int
    log_probabilities: np.ndarray
    neighbours: np.ndarray | None
    finished: bool
    ended: str = "length"
    text: str | None = None


@dataclasses.dataclass
class _Text:
    """A text under way.

    Attributes:
      number: among the samples of its prompt. first: chunk of the window that the cache has read.
      drafting: of the tokens after the last one.
    """

    tokens: list[int]
    prompt_length: int
    setting: SamplingConfig
    number: int
    stream: TextStream | None
    neighbours: list[np.ndarray | None] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)
    first: int = 0
    ended: str = ""
    drafting: Drafting = dataclasses.field(default_factory=Drafting)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.log_probabilities)


@dataclasses.dataclass
class _Batch:
    """Texts under way in the rows of one cache; rows past them are padding.

    Attributes:
      logits: [B, V] after the last token, or [B, T, V] after every token of a block.
      block: [B, T] the block's tokens, where it had drafts.
    """

    texts: list[_Text]
    logits: jax.Array
    cache: Cache
    sampler: Sampler
    needs: Needs
    seen: np.ndarray | None
    block: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class GeneratorOptions:
    """How a generator reads texts and what it retrieves.

    Attributes:
      neighbours: K. None waits for the first answer of `retrieve`, and compiles for that K then.
      stride: tokens between retrievals, a divisor of M; None for M, as in training. The query is the
        last M tokens.
      drafts: reads several tokens at once where they probably come next (drafts.py); the texts stay
        the same. look_up: gives drafts from a database too.
      mixture: texts are drawn from the model mixed with a token memory (mixture.py).
    """

    neighbours: int | None = None
    stride: int | None = None
    drafts: bool = False
    look_up: LookUp | None = None
    mixture: Mixture | None = None


class Generator:
    """Continues token sequences with a RETRO, or with the baseline (`retrieve` None).

    Attributes:
      retrieval_seconds: time spent in `retrieve` so far. blocks: read so far, but for prompts.
      drafter: counts drafts; None without them.
    """

    def __init__(
        self,
        model: Retro,
        *,
        chunks: int,
        eos_id: int,
        retrieve: Retrieve | None = None,
        forbidden: Sequence[int] = (),
        decode: Decode | None = None,
        mesh: Mesh | None = None,
        options: GeneratorOptions = GeneratorOptions(),
    ):
        """Prepares to generate.

        Args:
          model: the model; its parameters are read now.
          chunks: C, the trained sequence length in chunks: the longest context.
          eos_id: ends a text.
          retrieve: gives the neighbours [n, K, R] of complete chunks [n, M]; None is retrieval off.
          forbidden: tokens never drawn (padding, bos).
          decode: gives the text of generated tokens; stop strings need it.
          mesh: of the model's parameters; None for one device.
          options: K, the stride, drafts and a token memory.
        """
        config = model.config
        self.decoder = Decoder(model, chunks=chunks, mesh=mesh, stride=options.stride)
        self.stride, self._mixture = self.decoder.stride, options.mixture
        self.chunk_length, self.chunks, self.eos_id = config.chunk_length, chunks, eos_id
        self.retrieve = retrieve if config.has_retrieval else None
        self.retrieval_seconds, self.blocks = 0.0, 0
        dtype = self.decoder.layout.dtype.name
        drafter = Drafter(config.pad_id, dtype, options.look_up)
        self.drafter = drafter if options.drafts else None
        self._decode, self._shape = decode, (config.chunk_length, config.neighbour_length)
        self._encoded = encoded_length(config)
        self._neighbours = 0 if self.retrieve is None else options.neighbours or 1
        self._allowed = np.ones(config.vocab_size, bool)
        self._allowed[[token for token in forbidden if token < config.vocab_size]] = False

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        *,
        on_step: Callable[[], object] = lambda: None,
        on_text: Callable[[int, str], object] | None = None,
    ) -> list[Generation]:
        """Continues prompts, all at once.

        Args:
          prompts: each [n] token ids, n >= 1, bos first. Equal prompts are samples of one.
          sampling: of all prompts, or of each.
          on_step: called after each token, of all texts at once.
          on_text: called with a prompt's index and new text of its continuation; needs `decode`.

        Raises:
          UserError: an empty prompt, stop strings without a decoder, or a bad answer of `retrieve`.
        """
        texts = self._texts(prompts, sampling, streams=on_text is not None)
        answers: dict[bytes, np.ndarray] = {}
        self._retrieve_complete_chunks(texts, answers)
        batch = self._begin(texts)
        while True:
            most = 0
            for text, drawn in zip(batch.texts, self._draw(batch), strict=False):
                if text.ended:
                    continue
                new, before = "", text.generated
                for token, score in drawn:
                    new += self._append(text, token, score)
                    if text.ended:
                        break
                most = max(most, text.generated - before)
                if on_text is not None and new:
                    on_text(texts.index(text), new)
            for _ in range(most):
                on_step()
            under_way = [text for text in batch.texts if not text.ended]
            if not under_way:
                break
            self._retrieve_complete_chunks(under_way, answers)
            self._drop_finished(batch)
            self._advance(batch)
        return [_finish(text) for text in texts]

    def _texts(self, prompts: Sequence[np.ndarray], sampling: Any, *, streams: bool) -> list[_Text]:
        """Texts of prompts, each with its own settings and sample number."""
        if not all(len(prompt) for prompt in prompts):
            raise UserError("a prompt has no token: expected bos at least")
        settings = list(sampling) if isinstance(sampling, Sequence) else [sampling] * len(prompts)
        if len(settings) != len(prompts):
            raise UserError(
                f"{len(settings)} settings of sampling: expected {len(prompts)}, one a prompt"
            )
        if self._decode is None and (streams or any(setting.stop for setting in settings)):
            raise UserError(
                "SamplingConfig.stop or streamed text without a decoder of tokens: expected `decode`"
            )
        numbers: Counter[bytes] = Counter()
        texts = []
        for prompt, setting in zip(prompts, settings, strict=True):
            tokens = np.asarray(prompt, np.int32)
            stream = None if self._decode is None else TextStream(self._decode, setting.stop)
            number = numbers[tokens.tobytes()]
            numbers[tokens.tobytes()] += 1
            texts.append(_Text(tokens.tolist(), len(tokens), setting, number, stream))
        return texts

    def _begin(self, texts: list[_Text]) -> _Batch:
        """Reads the texts so far; equal ones once."""
        logits, cache, sources = self._prefill(texts)
        logits, cache = self.decoder.choose_rows(cache, logits, [sources[id(t)] for t in texts])
        batch = _Batch(texts, logits, cache, *self._settings(texts, cache.rows), None)
        if batch.needs.penalty:
            batch.seen = np.zeros((cache.rows, len(self._allowed)), bool)
            for row, text in enumerate(texts):
                batch.seen[row, text.tokens] = True
        return batch

    def _prefill(
        self, texts: Sequence[_Text], capacity: int | None = None
    ) -> tuple[jax.Array, Cache, dict[int, int]]:
        """Logits and a cache of windows, and which of its rows is whose (by id)."""
        windows: dict[bytes, tuple[int, Window]] = {}
        sources = {}
        for text in texts:
            text.first = self._first_chunk(text)
            start = text.first * self.chunk_length
            tokens = np.asarray(text.tokens[start:], np.int32)
            window = Window(tokens, _stacked(text.neighbours[start // self.stride :]))
            row, _ = windows.setdefault(tokens.tobytes(), (len(windows), window))
            sources[id(text)] = row
        logits, cache = self.decoder.prefill(
            [window for _, window in windows.values()],
            neighbours=self._neighbours,
            capacity=capacity,
        )
        return logits, cache, sources

    def _first_chunk(self, text: _Text) -> int:
        """The first chunk of a text's window."""
        return max(0, -(-len(text.tokens) // self.chunk_length) - self.chunks)

    def _settings(self, texts: list[_Text], rows: int) -> tuple[Sampler, Needs]:
        """The settings of the rows; padding is drawn greedily and thrown away."""
        settings = [text.setting for text in texts]
        padding = [SamplingConfig(temperature=0)] * (rows - len(texts))
        numbers = [text.number for text in texts] + [0] * len(padding)
        return make_sampler([*settings, *padding], numbers, self._allowed), needs(settings)

    def _draw(self, batch: _Batch) -> list[list[tuple[int, float]]]:
        """The next tokens of every text and their log-probabilities: one, or more with a draft."""
        logits = self.decoder.on_one_device(batch.logits)
        length = 1 if batch.block is None else batch.block.shape[1]
        if self._mixture is not None:
            logits = mixed(logits, *self._votes(batch, length))
        steps = np.zeros((batch.cache.rows, length), np.int32)
        barred = np.full((batch.cache.rows, length), -1, np.int32)
        for row, text in enumerate(batch.texts):
            steps[row] = text.generated + np.arange(length)
            barred[row, steps[row] < text.setting.min_tokens] = self.eos_id
        seen, needed = batch.seen, batch.needs
        if batch.block is None:
            places: dict[str, Any] = {"steps": steps[:, 0], "barred": barred[:, 0]}
            found = jax.device_get(draw(logits, batch.sampler, **places, seen=seen, needs=needed))
            tokens, scores = (x[:, None] for x in found)
            ahead = np.full(tokens.shape, np.inf)
        else:
            places = {"steps": steps, "barred": barred}
            drawn_block = draw_block(logits, batch.sampler, **places, seen=seen, needs=needed)
            tokens, scores, ahead = jax.device_get(drawn_block)
        drawn = []
        for row, text in enumerate(batch.texts):
            count = 1
            if self.drafter is not None:
                count = self.drafter.kept(text.drafting, tokens[row], ahead[row])
            drawn.append(list(zip(tokens[row, :count].tolist(), scores[row, :count].tolist())))
            if batch.seen is not None:
                batch.seen[row, tokens[row, :count]] = True
        return drawn

    def _votes(self, batch: _Batch, length: int) -> tuple[np.ndarray, ...]:
        """The token memory's votes after every token of a block, of all rows."""
        assert self._mixture is not None
        endings: list[list[int]] = []
        for row in range(batch.cache.rows):
            text = batch.texts[row] if row < len(batch.texts) else None
            past: list[int] = [] if text is None or text.ended else text.tokens
            rest = [] if batch.block is None else batch.block[row, 1:].tolist()
            endings += [past + rest[:i] if past else [] for i in range(length)]
        return self._mixture.votes(endings)

    def _append(self, text: _Text, token: int, score: float) -> str:
        """Adds a token to a text, and ends it where it is to end; gives new text."""
        text.tokens.append(token)
        text.log_probabilities.append(score)
        new = ""
        if token == self.eos_id:
            text.ended = "eos"
        elif text.stream is not None:
            new = text.stream.push(token)
            text.ended = "stop" if text.stream.stopped else ""
        if not text.ended and text.generated >= text.setting.max_tokens:
            text.ended = "length"
        return new + text.stream.finish() if text.ended and text.stream is not None else new

    def _advance(self, batch: _Batch) -> None:
        """Reads the last token of every text under way, and drafts after it."""
        chunks = batch.cache.chunk
        if chunks is not None and chunks.present.shape[1] != self._neighbours * self._encoded:
            fresh = self._begin(batch.texts)  # the first answer has come with another K
            batch.logits, batch.cache = fresh.logits, fresh.cache
            return
        rows = batch.cache.rows
        tokens, starts = np.zeros((rows, 1), np.int32), np.zeros(rows, np.int32)
        live, completed, moved = np.zeros(rows, bool), [], {}
        for row, text in enumerate(batch.texts):
            if text.ended:
                continue
            if self._first_chunk(text) > text.first:
                moved[row] = text
                continue
            tokens[row], live[row] = text.tokens[-1], True
            starts[row] = len(text.tokens) - 1 - text.first * self.chunk_length
            whole = starts[row] + 1 >= self.chunk_length
            if self.retrieve is not None and len(text.tokens) % self.stride == 0 and whole:
                query = np.asarray(text.tokens[-self.chunk_length :], np.int32)
                found = text.neighbours[-1]
                assert found is not None
                completed.append(Completed(row, query, found))
        batch.block = None if moved or completed else self._with_drafts(batch, tokens, starts, live)
        tokens = tokens if batch.block is None else batch.block
        self.blocks += 1
        capacity = self.decoder.capacity_for(int(starts.max()) + tokens.shape[1])
        if capacity > batch.cache.capacity:
            batch.cache = self.decoder.grow(batch.cache, capacity)
        if live.any():
            batch.logits, batch.cache = self.decoder.step(
                batch.cache,
                tokens,
                starts,
                live=live,
                completed=completed,
                all_logits=batch.block is not None,
            )
        if moved:
            logits, cache, sources = self._prefill(list(moved.values()), batch.cache.capacity)
            sources = {row: sources[id(text)] for row, text in moved.items()}
            batch.logits, batch.cache = self.decoder.replace_rows(
                (batch.logits, batch.cache), (logits, cache), sources
            )

    def _with_drafts(
        self, batch: _Batch, tokens: np.ndarray, starts: np.ndarray, live: np.ndarray
    ) -> np.ndarray | None:
        """[B, T]: the last tokens [B, 1] and what probably follows; None where one token is read."""
        if self.drafter is None:
            return None
        # A block ends before its chunk does: the chunk's neighbours are asked for with all of it.
        limit = self.stride - 1 - int((starts[live] % self.stride).max())
        places = {}
        for row in np.flatnonzero(live).tolist():
            text = batch.texts[row]
            places[row] = text.drafting
            left = text.setting.max_tokens - text.generated - 1
            self.drafter.propose(
                text.drafting,
                text.tokens,
                text.neighbours[-1] if text.neighbours else None,
                # A penalty depends on the tokens before, which a block draws at once.
                most=left if text.setting.repetition_penalty == 1 else 0,
            )
        return self.drafter.block(tokens, places, limit)

    def _drop_finished(self, batch: _Batch) -> None:
        """Goes on with fewer rows once a smaller bucket has room for the texts under way."""
        rows = [row for row, text in enumerate(batch.texts) if not text.ended]
        if self.decoder.row_bucket(len(rows)) >= batch.cache.rows:
            return
        batch.logits, batch.cache = self.decoder.choose_rows(batch.cache, batch.logits, rows)
        batch.texts = [batch.texts[row] for row in rows]
        batch.sampler, batch.needs = self._settings(batch.texts, batch.cache.rows)
        if batch.seen is not None:
            padding = np.zeros((batch.cache.rows - len(rows), batch.seen.shape[1]), bool)
            batch.seen = np.concatenate([batch.seen[rows], padding])

    def _retrieve_complete_chunks(
        self, texts: list[_Text], answers: dict[bytes, np.ndarray]
    ) -> None:
        """Gives every text the neighbours of its complete chunks; equal chunks are asked for once."""
        if self.retrieve is None:
            return
        due: list[tuple[_Text, bytes]] = []
        for text in texts:
            for u in range(len(text.neighbours), len(text.tokens) // self.stride):
                query = text.tokens[: (u + 1) * self.stride][-self.chunk_length :]
                if len(query) < self.chunk_length:
                    text.neighbours.append(None)
                else:
                    due.append((text, np.asarray(query, np.int32).tobytes()))
        queries = list(dict.fromkeys(chunk for _, chunk in due if chunk not in answers))
        if queries:
            answers.update(zip(queries, self._ask(queries), strict=True))
        for text, asked in due:
            text.neighbours.append(answers[asked])

    def _ask(self, queries: list[bytes]) -> np.ndarray:
        """[n, K, R]: the result of `retrieve` for chunks."""
        assert self.retrieve is not None
        chunks = np.frombuffer(b"".join(queries), np.int32).reshape(len(queries), -1)
        start = time.perf_counter()
        neighbours = np.asarray(self.retrieve(chunks), np.int32)
        self.retrieval_seconds += time.perf_counter() - start
        expected = (
            len(queries),
            neighbours.shape[1] if neighbours.ndim == 3 else 0,
            self._shape[1],
        )
        if neighbours.shape != expected or not expected[1]:
            raise UserError(
                f"neighbours of {len(queries)} chunks have shape {neighbours.shape}: "
                f"expected [{len(queries)}, K >= 1, {self._shape[1]}]"
            )
        self._neighbours = expected[1]
        return neighbours


def _stacked(neighbours: list[np.ndarray | None]) -> np.ndarray | None:
    """[n, K, R]; what was not retrieved, before the first whole query, is like the first that was."""
    first = next((found for found in neighbours if found is not None), None)
    if first is None:
        return None
    return np.stack([first if found is None else found for found in neighbours])


def _finish(text: _Text) -> Generation:
    """The text as plain arrays."""
    return Generation(
        tokens=np.asarray(text.tokens, np.int32),
        prompt_length=text.prompt_length,
        log_probabilities=np.asarray(text.log_probabilities, np.float32),
        neighbours=_stacked(text.neighbours),
        finished=text.ended == "eos",
        ended=text.ended,
        text=None if text.stream is None else text.stream.text,
    )
