"""A trained model with its tokeniser and its database: text in, text out, from Python.

    generator = Generator.open("W")                      # launch/runs/text_generator.py opens W
    (result,) = generator.generate(["The history of"], SamplingConfig(max_tokens=50, temperature=0))
    for piece in generator.generate(["def main("], stream=True):
        print(piece.text, end="")
    generator.score(["A text."])[0].log_probabilities
    generator.retrieve("A text.")

This file knows neither directories nor data pipelines: it takes a model, a tokeniser and databases.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, overload

import numpy as np

from retro_jax.batch import Neighbour
from retro_jax.errors import UserError
from retro_jax.evaluate.text_scores import TextScorer
from retro_jax.generate.decoder import Decoder
from retro_jax.generate.live_database import LiveDatabase, LiveDatabases, Lookup, Retrieval
from retro_jax.generate.mixture import Mixture
from retro_jax.generate.row_draws import ALTERNATIVES
from retro_jax.generate.running_texts import RunningTexts
from retro_jax.generate.sample import TextCodec
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.generate.text_progress import RunningText
from retro_jax.generate.text_stream import TextStream
from retro_jax.model.retro import Retro

_AT_ONCE = 32  # texts that generate continues together


class Codec(TextCodec, Protocol):
    """The methods that are needed of a tokeniser."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def special_ids(self) -> frozenset[int]: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class TextResult:
    """A continuation.

    Attributes:
      prompt, text: the prompt, and its continuation up to a stop string.
      tokens: [n] int32, of the continuation. log_probabilities: [n] float32, nats.
      ended: "eos", "stop" (a stop string) or "length".
      neighbours: of every complete chunk of prompt and continuation.
      revision: of the database; None with retrieval off.
    """

    prompt: str
    text: str
    tokens: np.ndarray
    log_probabilities: np.ndarray
    ended: str
    neighbours: list[list[Neighbour]]
    revision: int | None


@dataclasses.dataclass(frozen=True)
class TextPiece:
    """New text of a continuation: of which prompt, and at its end the whole result."""

    index: int
    text: str
    result: TextResult | None = None


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """A text's log-probabilities.

    Attributes:
      tokens: [n] int32, of the text. log_probabilities: [n] float32, nats, each given those before.
      end_log_probability: of eos after the text. revision: as TextResult.
    """

    tokens: np.ndarray
    log_probabilities: np.ndarray
    end_log_probability: float
    revision: int | None


class TextGenerator:
    """Generates, scores and retrieves.

    Attributes:
      name: of the model. model: itself. codec: the tokeniser.
      databases: the revisions of its database; None without retrieval.
      neighbours: K, of a chunk at most. chunks, window: C and tokens that the model reads at once.
      scorer: of texts as tokens.
    """

    def __init__(
        self,
        model: Retro,
        codec: Codec,
        *,
        chunks: int,
        databases: LiveDatabases | None = None,
        neighbours: int = 2,
        name: str = "retro",
        weights: Callable[[str, int], np.ndarray] | None = None,
    ) -> None:
        """Prepares the weights.

        Args:
          model: on one device. codec: its tokeniser. chunks: C, the trained length.
          databases: what it retrieves from. neighbours: K, as in training. name: of the model.
          weights: reads those of a token memory's votes, which launch.evaluate tuned, for the hash of its
            database and a number of neighbours.

        Raises:
          UserError: a form of decoder without a cache.
        """
        config = model.config
        self.name, self.model, self.codec, self._weights = name, model, codec, weights
        self.chunks = chunks
        self.databases = databases if config.has_retrieval else None
        self.neighbours = neighbours if self.databases is not None else 0
        self.window = chunks * config.chunk_length
        self.scorer = TextScorer(model, chunks=chunks, alternatives=ALTERNATIVES)
        self._decoder = Decoder(model, chunks=chunks)
        self._running: RunningTexts | None = None

    def running(self, rows: int, strides: Sequence[int] = ()) -> RunningTexts:
        """A batch of texts under way, of `rows` at most; it shares this model's weights.

        `strides` of retrieval may be asked for, besides a chunk's length.
        """
        codec, config = self.codec, self._decoder.config
        special = codec.special_ids - {codec.eos_id}
        return RunningTexts(
            self._decoder,
            rows=rows,
            neighbours=self.neighbours,
            eos_id=codec.eos_id,
            decode=codec.decode,
            forbidden=[*special, *range(codec.vocab_size, config.vocab_size)],
            strides=strides,
        )

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig | Sequence[SamplingConfig] = ...,
        *,
        retrieval: bool | int | Retrieval = ...,
        stream: Literal[False] = ...,
    ) -> list[TextResult]: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig | Sequence[SamplingConfig] = ...,
        *,
        retrieval: bool | int | Retrieval = ...,
        stream: Literal[True],
    ) -> Iterator[TextPiece]: ...

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingConfig | Sequence[SamplingConfig] = SamplingConfig(),
        *,
        retrieval: bool | int | Retrieval = True,
        stream: bool = False,
    ) -> list[TextResult] | Iterator[TextPiece]:
        """Continues prompts.

        Args:
          prompts: texts; equal ones are samples of one prompt.
          sampling: of all prompts, or of each.
          retrieval: True as in training, False for none, neighbours of a chunk, K at most, or all
            choices as a `Retrieval`.
          stream: gives pieces as they come, instead of results at the end.

        Raises:
          UserError: a prompt that is no text, settings that do not fit, or too many neighbours.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is a string: expected a list of strings")
        settings = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else sampling
        if len(settings) != len(prompts):
            raise UserError(
                f"{len(settings)} settings of sampling: expected {len(prompts)}, one a prompt"
            )
        lookup = self.lookup(retrieval)
        groups: dict[str, list[RunningText]] = {}
        texts = []
        for prompt, one in zip(prompts, settings, strict=True):
            group = groups.setdefault(prompt, [])
            text = self.text(self.encode(prompt), one, lookup=lookup, number=len(group))
            group.append(text)
            texts.append(text)
        length = self._decoder.config.chunk_length
        divisors = [n for n in range(1, length) if length % n == 0]
        running = self._running = self._running or self.running(_AT_ONCE, divisors)
        for text in texts:
            running.check(text.sampling)
        pieces = self._pieces(list(prompts), texts, list(groups.values()), lookup)
        if stream:
            return pieces
        results = {piece.index: piece.result for piece in pieces if piece.result is not None}
        return [results[index] for index in range(len(texts))]

    def score(
        self, texts: Sequence[str], *, retrieval: bool | int | Retrieval = True
    ) -> list[ScoredText]:
        """Log-probabilities of texts, as whole documents, in the windows of launch.evaluate.

        The texts of a split in its order have the same log-probabilities as there.

        Args:
          texts: any. retrieval: as for `generate`, without stride and token memory.
        """
        if isinstance(texts, str):
            raise UserError("texts is a string: expected a list of strings")
        if not texts:
            return []
        lookup = self.lookup(retrieval)
        if lookup is not None and (lookup.stride or lookup.mixture is not None):
            raise UserError("scores with a stride or a token memory: expected launch.evaluate")
        encoded = [[*self.encode(text), self.codec.eos_id] for text in texts]
        scores = self.scorer.score([np.asarray(ids, np.int32) for ids in encoded], lookup)
        revision = None if lookup is None else lookup.database.revision
        return [
            ScoredText(
                tokens=np.asarray(ids[1:-1], np.int32),
                log_probabilities=each.log_probabilities[:-1],
                end_log_probability=float(each.log_probabilities[-1]),
                revision=revision,
            )
            for ids, each in zip(encoded, scores, strict=True)
        ]

    def retrieve(
        self, text: str, k: int | None = None, *, database: LiveDatabase | None = None
    ) -> list[list[Neighbour]]:
        """The neighbours of each chunk of a text, as if the text were a document.

        Args:
          text: any; its last chunk is filled with padding, as a document's is.
          k: neighbours of a chunk; None as in training. database: None for the newest revision.

        Raises:
          UserError: there is no database, or k is not positive.
        """
        if self.databases is None:
            raise UserError(
                f"{self.name} was trained without retrieval: expected no text to search"
            )
        k = self.neighbours if k is None else k
        if k < 1:
            raise UserError(f"k is {k}: expected at least one neighbour")
        tokens, config = self.encode(text), self._decoder.config
        count = -(-len(tokens) // config.chunk_length)
        chunks = np.full((count, config.chunk_length), config.pad_id, np.int32)
        chunks.reshape(-1)[: len(tokens)] = tokens
        lookup = Lookup(database or self.databases.newest(), k)
        lookup(chunks)
        return lookup.by_chunk(chunks.reshape(-1), config.chunk_length)

    def lookup(
        self, retrieval: bool | int | Retrieval, database: LiveDatabase | None = None
    ) -> Lookup | None:
        """What retrieves for one request; None for retrieval off.

        Raises:
          UserError: more neighbours than the cache has room for, a document that is not there, no token
            memory, or a stride that does not divide a chunk.
        """
        choices = retrieval if isinstance(retrieval, Retrieval) else _choices(retrieval)
        if choices.k == 0 or self.databases is None:
            if self.databases is None and not (choices.k == 0 or retrieval is True):
                raise UserError(f"retrieval of {self.name}, trained without: expected False")
            return None
        k = self.neighbours if choices.k is None else choices.k
        if not 1 <= k <= self.neighbours:
            raise UserError(f"retrieval is {k} neighbours: expected 0 to {self.neighbours}")
        length = self._decoder.config.chunk_length
        if choices.stride and length % choices.stride:
            raise UserError(f"a stride of {choices.stride}: expected a divisor of {length}")
        database = database or self.databases.newest()
        if choices.exclude:
            database = database.without(choices.exclude)
        mixture = self._mixture(database, k) if choices.tokens else None
        return Lookup(database, k, stride=choices.stride, mixture=mixture)

    def _mixture(self, database: LiveDatabase, k: int) -> Mixture:
        """A database's token memory with its weights, of a model with k neighbours a chunk."""
        ask = database.votes()
        if ask is None or self._weights is None:
            raise UserError(
                f"revision {database.revision} has no token memory: expected launch.evaluate"
                " --retrieval=tokens before"
            )
        return Mixture(ask, self._weights(database.digest, k))

    def encode(self, text: str) -> list[int]:
        """bos and the tokens of a text."""
        return [self.codec.bos_id, *self.codec.encode(text).tolist()]

    def text(
        self,
        tokens: Sequence[int],
        sampling: SamplingConfig,
        *,
        lookup: Lookup | None,
        number: int = 0,
        alternatives: int = 0,
    ) -> RunningText:
        """A text to continue, of a prompt's tokens."""
        return RunningText(
            tokens=list(tokens),
            prompt_length=len(tokens),
            sampling=sampling,
            stream=TextStream(self.codec.decode, sampling.stop),
            retrieve=lookup,
            stride=0 if lookup is None else lookup.stride,
            mixture=None if lookup is None else lookup.mixture,
            number=number,
            alternatives=alternatives,
        )

    def by_chunk(self, text: RunningText, lookup: Lookup | None) -> list[list[Neighbour]]:
        """The neighbours that a text has read, of each complete chunk, or of each query."""
        if lookup is None:
            return []
        count = sum(found is not None for found in text.neighbours)
        return lookup.by_chunk(text.tokens, self._decoder.config.chunk_length)[:count]

    def _pieces(
        self,
        prompts: list[str],
        texts: list[RunningText],
        groups: list[list[RunningText]],
        lookup: Lookup | None,
    ) -> Iterator[TextPiece]:
        """Runs texts to their ends, as many at once as there is room for."""
        running = self.running(_AT_ONCE) if self._running is None else self._running
        self._running = None  # another call meanwhile gets another batch
        index = {id(text): number for number, text in enumerate(texts)}
        waiting = list(groups)
        try:
            while waiting or running.texts:
                while waiting and running.room:
                    now, later = waiting[0][: running.room], waiting[0][running.room :]
                    running.join(now)
                    waiting[:1] = [later] if later else []
                for progress in running.step():
                    text = progress.text
                    number = index[id(text)]
                    if text.error is not None:
                        raise text.error
                    result = None
                    if progress.ended:
                        result = self._result(prompts[number], text, lookup)
                    if progress.piece or result is not None:
                        yield TextPiece(number, progress.piece, result)
        finally:
            for text in running.texts:
                running.end(text, "cancelled")
            self._running = running

    def _result(self, prompt: str, text: RunningText, lookup: Lookup | None) -> TextResult:
        """A text that has ended."""
        return TextResult(
            prompt=prompt,
            text=text.stream.text,
            tokens=np.asarray(text.tokens[text.prompt_length :], np.int32),
            log_probabilities=np.asarray(text.log_probabilities, np.float32),
            ended=text.ended,
            neighbours=self.by_chunk(text, lookup),
            revision=None if lookup is None else lookup.database.revision,
        )


def _choices(retrieval: bool | int) -> Retrieval:
    """Retrieval as True, False or a number of neighbours."""
    if retrieval is True:
        return Retrieval()
    if retrieval < 0:
        raise UserError(f"retrieval is {retrieval}: expected True, False or a number from 0")
    return Retrieval(int(retrieval))
