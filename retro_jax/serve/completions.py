"""Completions: a typed request becomes jobs of the engine, and their progress OpenAI's answers."""

import asyncio
import codecs
import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import numpy as np

from retro_jax.errors import UserError
from retro_jax.evaluate.text_scores import TextScores
from retro_jax.generate.live_database import LiveDatabase, Lookup, Retrieval
from retro_jax.generate.sampling import SamplingConfig
from retro_jax.generate.text_generator import TextGenerator
from retro_jax.generate.text_progress import Progress, RunningText
from retro_jax.serve.engine import Engine, Job
from retro_jax.serve.errors import RequestError, bad_request, told
from retro_jax.serve.limits import Limits
from retro_jax.serve.requests import CompletionRequest, RetrievalOptions

_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}
# OpenAI's settings that change texts and are not there, with their values that change nothing.
_UNKNOWN = {
    "suffix": (None, ""),
    "presence_penalty": (None, 0.0),
    "frequency_penalty": (None, 0.0),
    "logit_bias": (None, {}),
}
_POLL = 0.1  # seconds between looks at whether a client is still there


@dataclasses.dataclass
class Choice:
    """One sample of one prompt.

    Attributes:
      index: in the answer. text: under way. prompt: its text. echoed: the prompt's scores, where asked.
      progress: all that happened so far, where log-probabilities are asked for.
    """

    index: int
    text: RunningText
    prompt: str
    prompt_tokens: list[int]
    echoed: TextScores | None = None
    progress: list[Progress] = dataclasses.field(default_factory=list)
    characters: int = 0


class Completion:
    """One request under way.

    Attributes:
      choices: its samples. lookup: its retrievals, at one revision; None for retrieval off.
    """

    def __init__(
        self,
        service: "CompletionService",
        request: CompletionRequest,
        choices: list[Choice],
        lookup: Lookup | None,
    ) -> None:
        self.choices, self.lookup, self._request, self._service = choices, lookup, request, service
        self.id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._events: asyncio.Queue[Progress] = asyncio.Queue()
        self._jobs: list[Job] = []

    def submit(self) -> None:
        """Hands the samples to the engine.

        Raises:
          RefusedError: there is no room. UserError: more samples than rows.
        """
        if not self._request.max_tokens and self._request.max_tokens is not None:
            return
        loop = asyncio.get_running_loop()

        def listen(progress: Progress) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, progress)

        deadline = time.monotonic() + self._service.limits.seconds
        prompts: dict[int, list[RunningText]] = {}
        samples = self._request.n or 1
        for choice in self.choices:
            prompts.setdefault(choice.index // samples, []).append(choice.text)
        jobs = [Job(texts, listen, deadline) for texts in prompts.values()]
        self._service.engine.submit(jobs)
        self._jobs = jobs

    def cancel(self) -> None:
        """Frees the rows; nothing happens where all have ended."""
        for job in self._jobs:
            if not all(text.ended for text in job.texts):
                self._service.engine.cancel(job)

    async def progress(self, gone: Callable[[], Any]) -> AsyncIterator[tuple[Choice, Progress]]:
        """What happens to the samples until the last one ends; `gone` says whether the client is.

        Raises:
          RequestError: time was over, or a sample failed. ConnectionError: the client has gone.
        """
        by_text = {id(choice.text): choice for choice in self.choices}
        left = len(self.choices) if self._jobs else 0
        asked = time.monotonic()
        while left:
            if time.monotonic() - asked >= _POLL:
                if await gone():
                    raise ConnectionError("the client has gone")
                asked = time.monotonic()
            try:
                progress = await asyncio.wait_for(self._events.get(), _POLL)
            except TimeoutError:
                continue
            if progress.ended == "timeout":
                limit = self._service.limits.seconds
                raise RequestError(f"not finished after {limit:g} seconds", None, 504, "timeout")
            if progress.ended == "cancelled":
                raise RequestError("the server stops", None, 503, "stopping")
            if progress.ended == "error":
                error = progress.text.error
                if isinstance(error, UserError):
                    raise bad_request(error, "retrieval") from error
                raise RuntimeError("a text failed") from error
            left -= bool(progress.ended)
            yield by_text[id(progress.text)], progress

    async def whole(self, gone: Callable[[], Any]) -> dict[str, Any]:
        """The answer at once."""
        async for choice, progress in self.progress(gone):
            choice.progress.append(progress)
        choices = []
        for choice in self.choices:
            ended = choice.text.ended or "length"
            text = (choice.prompt if self._request.echo else "") + choice.text.stream.text
            one = self._choice(choice, text, _REASONS[ended], choice.progress, echo=True)
            choices.append(one | {"neighbours": self._neighbours(choice)})
        return self._head() | {"choices": choices, "usage": self._usage()}

    async def events(self, gone: Callable[[], Any]) -> AsyncIterator[dict[str, Any]]:
        """The answer as events of a stream."""
        for choice in self.choices:
            if self._request.echo:
                yield self._event(self._choice(choice, choice.prompt, None, [], echo=True))
            if not self._jobs:
                yield self._event(self._last(choice, "", "length", []))
        async for choice, progress in self.progress(gone):
            if progress.ended:
                reason = _REASONS[progress.ended]
                yield self._event(self._last(choice, progress.piece, reason, [progress]))
            elif progress.piece or self._request.logprobs is not None:
                yield self._event(self._choice(choice, progress.piece, None, [progress]))
        options = self._request.stream_options
        if options is not None and options.include_usage:
            yield self._head() | {"choices": [], "usage": self._usage()}

    def _last(
        self, choice: Choice, piece: str, reason: str, progress: Sequence[Progress]
    ) -> dict[str, Any]:
        """The last event's choice, which has the neighbours."""
        one = self._choice(choice, piece, reason, progress)
        return one | {"neighbours": self._neighbours(choice)}

    def _event(self, choice: dict[str, Any]) -> dict[str, Any]:
        """An event with one choice."""
        return self._head() | {"choices": [choice]}

    def _head(self) -> dict[str, Any]:
        """The fields that every answer and event has; the revision that is read is one of them."""
        retrieval = None
        if self.lookup is not None:
            retrieval = named(self.lookup.database)
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.generator.name,
            "retrieval": retrieval,
        }

    def _usage(self) -> dict[str, int]:
        """Numbers of tokens; a prompt counts once for its samples."""
        samples = self._request.n or 1
        prompt = sum(len(choice.prompt_tokens) for choice in self.choices[::samples])
        made = sum(choice.text.generated for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }

    def _neighbours(self, choice: Choice) -> list[list[dict[str, Any]]]:
        """Where the neighbours of each complete chunk are from."""
        found = self._service.generator.by_chunk(choice.text, self.lookup)
        return [[place(neighbour) for neighbour in chunk] for chunk in found]

    def _choice(
        self,
        choice: Choice,
        text: str,
        reason: str | None,
        progress: Sequence[Progress],
        *,
        echo: bool = False,
    ) -> dict[str, Any]:
        """A choice, or what is new of it."""
        logprobs = None
        if self._request.logprobs is not None:
            logprobs = self._logprobs(choice, progress, echo=echo and bool(self._request.echo))
        return {
            "index": choice.index,
            "text": text,
            "finish_reason": reason,
            "logprobs": logprobs,
        }

    def _logprobs(
        self, choice: Choice, progress: Sequence[Progress], *, echo: bool
    ) -> dict[str, Any]:
        """OpenAI's lists of tokens, their log-probabilities, the likeliest others, and offsets."""
        rows: list[tuple[int, float | None, Sequence[tuple[int, float]] | None]] = []
        if echo and choice.echoed is not None:
            rows += _prompt_rows(choice)
        for each in progress:
            if each.token is not None:
                rows.append((each.token, each.log_probability, each.alternatives))
        name, count = self._service.token_name, self._request.logprobs or 0
        lists: dict[str, list[Any]] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token, value, others in rows:
            top = None
            if others is not None:
                top = {name(other): score for other, score in others[:count]}
                if value is not None:
                    top.setdefault(name(token), value)
            lists["tokens"].append(name(token))
            lists["token_logprobs"].append(value)
            lists["top_logprobs"].append(top)
            lists["text_offset"].append(choice.characters)
            choice.characters += len(decoder.decode(self._service.bytes_of(token)))
        return lists


def _prompt_rows(
    choice: Choice,
) -> list[tuple[int, float | None, Sequence[tuple[int, float]] | None]]:
    """The prompt's tokens; the first one has a log-probability unless it is bos itself."""
    scores, tokens = choice.echoed, choice.prompt_tokens
    assert scores is not None
    rows: list[tuple[int, float | None, Sequence[tuple[int, float]] | None]] = []
    missing = len(tokens) - len(scores.log_probabilities)
    for place_, token in enumerate(tokens):
        at = place_ - missing
        if at < 0:
            rows.append((token, None, None))
            continue
        ids, values = scores.likeliest[at].tolist(), scores.likeliest_log_probabilities[at].tolist()
        others = tuple(zip(ids, values, strict=True))
        rows.append((token, float(scores.log_probabilities[at]), others))
    return rows


def place(neighbour: Any) -> dict[str, Any]:
    """Where a neighbour is from, without its text."""
    fields = ("document", "corpus", "place", "score", "revision")
    return {name: getattr(neighbour, name) for name in fields}


def named(database: LiveDatabase) -> dict[str, Any]:
    """A database's revision, as answers name it."""
    return {"revision": database.revision, "database": database.digest}


class CompletionService:
    """Makes completions of requests.

    Attributes:
      generator: the model. engine: what runs texts. limits: of requests. length: of a text, in tokens.
    """

    def __init__(self, generator: TextGenerator, engine: Engine, limits: Limits) -> None:
        self.generator, self.engine, self.limits = generator, engine, limits
        self.length = limits.length or generator.window
        codec = generator.codec
        self._longest = max(len(codec.decode_bytes([i])) for i in range(codec.vocab_size))
        self._scoring = threading.Lock()

    def prepare(self, request: CompletionRequest) -> Completion:
        """Checks a request whole, and scores its prompts where that is asked; takes a while.

        Raises:
          RequestError: naming the field.
        """
        self.check_model(request.model)
        for name, nothing in _UNKNOWN.items():
            if getattr(request, name) not in nothing:
                raise RequestError(f"{name} is not supported: expected none", name)
        samples = request.n or 1
        if request.best_of not in (None, samples):
            raise RequestError(f"best_of is {request.best_of}: expected n, {samples}", "best_of")
        if samples > self.engine.running.most:
            most = self.engine.running.most
            raise RequestError(f"n is {samples}: expected {most} at most", "n")
        max_tokens = 16 if request.max_tokens is None else request.max_tokens
        if not max_tokens and not request.echo:
            raise RequestError("max_tokens is 0: expected 1 at least, or echo", "max_tokens")
        prompts = [self.prompt(prompt, max_tokens) for prompt in _prompts(request.prompt)]
        if len(prompts) * samples > self.limits.queue:
            most = self.limits.queue
            message = f"{len(prompts)} prompts of {samples} samples: expected {most} texts at most"
            raise RequestError(message, "prompt")
        sampling = self._sampling(request, max_tokens)
        lookup = self.lookup(request.retrieval)
        scored = request.echo and request.logprobs is not None
        if scored and lookup is not None and (lookup.stride or lookup.mixture):
            name = "stride" if lookup.stride else "tokens"
            message = (
                f"retrieval.{name} with echo and logprobs: expected none, as prompts are scored"
            )
            raise RequestError(f"{message} as launch.evaluate does", f"retrieval.{name}")
        choices = []
        for number, (tokens, given, text) in enumerate(prompts):
            for sample in range(samples):
                running = self.generator.text(
                    tokens,
                    sampling,
                    lookup=lookup,
                    number=sample,
                    alternatives=request.logprobs or 0,
                )
                choices.append(Choice(number * samples + sample, running, text, given))
        if scored:
            for first in range(0, len(choices), samples):
                read = np.asarray(choices[first].text.tokens, np.int32)
                with self._scoring:
                    (scores,) = self.generator.scorer.score([read], lookup)
                for choice in choices[first : first + samples]:
                    choice.echoed = scores
        return Completion(self, request, choices, lookup)

    def check_model(self, model: str | None) -> None:
        """Raises a RequestError for the name of another model."""
        if model not in (None, self.generator.name):
            message = f"there is no model {model!r}: expected {self.generator.name!r}"
            raise RequestError(message, "model", 404, "model_not_found")

    def prompt(
        self, prompt: str | list[int], max_tokens: int, param: str = "prompt"
    ) -> tuple[list[int], list[int], str]:
        """A prompt's tokens with bos, the tokens as they were given, and its text.

        Raises:
          RequestError: it is no text, has tokens that there are not, or is too long.
        """
        codec = self.generator.codec
        if isinstance(prompt, str):
            try:
                size = len(prompt.encode())
                if size > self.length * self._longest:  # before time is spent on it
                    self._too_long(f"{size // self._longest} or more", max_tokens, param)
                given = codec.encode(prompt).tolist()
            except (UserError, UnicodeEncodeError) as error:
                message = f"{param} has a lone surrogate: expected valid Unicode"
                raise RequestError(message, param) from error
            tokens, text = [codec.bos_id, *given], prompt
        else:
            past = next((token for token in prompt if token >= codec.vocab_size), None)
            if past is not None:
                raise RequestError(
                    f"{param} has the token {past}: expected ids less than {codec.vocab_size}",
                    param,
                )
            given, text = prompt, codec.decode(prompt)
            tokens = prompt if prompt[0] == codec.bos_id else [codec.bos_id, *prompt]
        if len(tokens) + max_tokens > self.length:
            self._too_long(str(len(tokens)), max_tokens, param, known=len(tokens))
        return tokens, given, text

    def _too_long(self, count: str, max_tokens: int, param: str, known: int | None = None) -> None:
        """Raises the error of a text that is too long."""
        field = param
        if known is not None and known < self.length and max_tokens:
            field = "max_tokens"
        raise RequestError(
            f"a text has {self.length} tokens at most, the prompt (with bos) has {count} and max_tokens"
            f" is {max_tokens}: expected a shorter prompt or fewer tokens",
            field,
            code="context_length_exceeded",
        )

    def database(self, revision: int | None, param: str) -> LiveDatabase:
        """A revision of the database, the newest for None.

        Raises:
          RequestError: there is no database, or no such revision.
        """
        databases = self.generator.databases
        if databases is None:
            message = f"{self.generator.name} was trained without retrieval"
            raise RequestError(f"{message}: expected none", param)
        try:
            return databases.newest() if revision is None else databases.at(revision)
        except UserError as error:
            raise RequestError(told(error), param, 404, "revision_not_found") from error

    def token_name(self, token: int) -> str:
        """A token as text, or as OpenAI writes bytes that are none."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.generator.codec.decode_bytes([token])

    def _sampling(self, request: CompletionRequest, max_tokens: int) -> SamplingConfig:
        """The settings of its samples."""
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        try:
            sampling = SamplingConfig(
                max_tokens=max(max_tokens, 1),
                min_tokens=request.min_tokens,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_k=request.top_k,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=seed,
                min_p=request.min_p,
                repetition_penalty=request.repetition_penalty,
                stop=tuple(stop),
            )
            self.engine.running.check(sampling)
        except UserError as error:
            raise bad_request(error, None) from error
        return sampling

    def lookup(self, retrieval: bool | RetrievalOptions | None) -> Lookup | None:
        """What retrieves for a request, at one revision.

        Raises:
          RequestError: naming the field.
        """
        generator = self.generator
        if retrieval is False or (retrieval is None and generator.databases is None):
            return None
        options = retrieval if isinstance(retrieval, RetrievalOptions) else RetrievalOptions()
        if options.k == 0:
            for name in ("exclude", "stride", "tokens"):
                if getattr(options, name):
                    message = f"retrieval.{name} with k = 0: expected none"
                    raise RequestError(message, f"retrieval.{name}")
            return None
        strides = self.engine.running.strides
        if options.stride not in (None, *strides):
            message = f"retrieval.stride is {options.stride}: expected one of {list(strides)}"
            raise RequestError(message, "retrieval.stride")
        database = self.database(options.revision, "retrieval.revision")
        if options.exclude:
            with _naming("retrieval.exclude"):
                database = database.without(options.exclude)
        with _naming("retrieval.k"):
            lookup = generator.lookup(Retrieval(options.k, stride=options.stride or 0), database)
        if options.tokens:
            choices = Retrieval(options.k, stride=options.stride or 0, tokens=True)
            with _naming("retrieval.tokens"):
                lookup = generator.lookup(choices, database)
        return lookup


@contextlib.contextmanager
def _naming(param: str) -> Iterator[None]:
    """A UserError becomes that of a field."""
    try:
        yield
    except UserError as error:
        raise bad_request(error, param) from error


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request: one text or many, as strings or as tokens."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)
