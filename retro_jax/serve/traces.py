"""The page at / and what it asks for: a continuation, and what retrieval changed in it.

The text is continued by the engine, beside all others and within the same limits. Its figures are
computed after that in a thread of their own, one text at a time: the engine goes on meanwhile.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np

from retro_jax.generate.text_generator import Codec, TextGenerator
from retro_jax.report.trace_page import trace_body, trace_page
from retro_jax.report.trace_value import SourceLibrary, traced_text
from retro_jax.report.views import NeighbourSource, SourceDocument
from retro_jax.serve.completions import Choice, Completion, CompletionService, named
from retro_jax.serve.engine import RefusedError
from retro_jax.serve.errors import RequestError
from retro_jax.serve.limits import Limits
from retro_jax.serve.requests import CompletionRequest, TraceRequest

_POLL = 0.2  # seconds between looks at whether a client is still there
_BOX = 128  # tokens that the page's box asks for at first


class TokenLibrary:
    """The library of a model without a database: its tokens alone."""

    def __init__(self, codec: Codec) -> None:
        """Takes the tokeniser."""
        self._codec = codec

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for a special one."""
        return self._codec.decode_bytes([token])

    def label(self, token: int) -> str:
        """The name of a special token."""
        names = {self._codec.bos_id: "bos", self._codec.eos_id: "eos", self._codec.pad_id: "pad"}
        return names.get(token, f"token {token}")

    def document(self, number: int) -> SourceDocument:
        """There is none."""
        raise LookupError(number)

    def votes(self, before: np.ndarray) -> None:
        """There is no memory."""

    def sources(self, ids: np.ndarray, scores: np.ndarray) -> list[NeighbourSource | None]:
        """There are none."""
        return [None] * len(ids)


class Traces:
    """Answers the page's questions."""

    def __init__(self, generator: TextGenerator, service: CompletionService) -> None:
        """Takes the model, and what makes completions of requests."""
        self._generator, self._service = generator, service
        self._turn, self._waiting = asyncio.Lock(), 0

    @property
    def _limits(self) -> Limits:
        """Of requests."""
        return self._service.limits

    def page(self) -> str:
        """The page at /."""
        tokens = max(1, min(_BOX, self._service.length // 2))
        name = self._generator.name
        return trace_page(endpoint="/trace", max_tokens=tokens, summary=name)

    async def answer(self, body: TraceRequest, gone: Callable[[], Any]) -> dict[str, Any]:
        """The continuation as HTML, and the revision that it read; `gone` says whether the client is.

        Raises:
          RequestError: naming the field, or that time is over. RefusedError: there is no room.
          ConnectionError: the client has gone.
        """
        deadline = time.monotonic() + self._limits.seconds
        retrieval = body.retrieval
        if retrieval is True and self._generator.databases is None:
            retrieval = False
        request = CompletionRequest(
            prompt=body.prompt,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            seed=body.seed,
            retrieval=retrieval,
        )
        completion = await asyncio.to_thread(self._service.prepare, request)
        lookup = completion.lookup
        if lookup is not None and (lookup.stride or lookup.mixture):
            name = "stride" if lookup.stride else "tokens"
            message = f"retrieval.{name} of a trace: expected none"
            raise RequestError(message, f"retrieval.{name}")
        try:
            completion.submit()
            async for _ in completion.progress(gone):
                pass
        finally:
            completion.cancel()
        async with self._in_turn(deadline, gone):
            html = await self._computed(completion, deadline, gone)
        revision = None if lookup is None else named(lookup.database)
        return {"html": html, "retrieval": revision}

    @contextlib.asynccontextmanager
    async def _in_turn(self, deadline: float, gone: Callable[[], Any]) -> AsyncIterator[None]:
        """One text at a time, and no more waiting than the queue has places."""
        if self._waiting >= self._limits.queue:
            raise RefusedError("too many texts wait to be traced", 429, "queue_full")
        self._waiting += 1
        try:
            while True:
                try:
                    await asyncio.wait_for(self._turn.acquire(), _POLL)
                    break
                except TimeoutError:
                    if await gone():
                        raise ConnectionError("the client has gone") from None
                    self._check_time(deadline)
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turn.release()

    async def _computed(
        self, completion: Completion, deadline: float, gone: Callable[[], Any]
    ) -> str:
        """The HTML of a finished text, by a thread, which ends early where nobody waits for it."""
        (choice,), over = completion.choices, threading.Event()

        def check() -> None:
            self._check_time(deadline)
            if over.is_set():
                raise ConnectionError("the client has gone")

        task = asyncio.create_task(asyncio.to_thread(self._html, choice, completion, check))
        try:
            while not task.done():
                await asyncio.wait([task], timeout=_POLL)
                if not task.done() and await gone():
                    over.set()
            return task.result()
        finally:
            over.set()

    def _html(self, choice: Choice, completion: Completion, check: Callable[[], None]) -> str:
        """The HTML of a finished text."""
        generator, lookup, text = self._generator, completion.lookup, choice.text
        library: SourceLibrary = TokenLibrary(generator.codec)
        facts = [("model", generator.name)]
        if generator.databases is not None:
            database = generator.databases.newest() if lookup is None else lookup.database
            library = database.library()
        if lookup is not None:
            facts.append(("database", f"revision {lookup.database.revision}"))
        found = [] if lookup is None else [each for each in text.neighbours if each is not None]

        def sources(chunk: np.ndarray) -> Sequence[NeighbourSource | None]:
            return [] if lookup is None else library.sources(*lookup.found(chunk))

        value = traced_text(
            generator.model,
            _Finished(text.tokens, text.prompt_length, found),
            sources,
            library,
            chunks=generator.chunks,
            heading=choice.prompt,
            facts=facts,
            between=check,
        )
        return trace_body(value)

    def _check_time(self, deadline: float) -> None:
        """Raises a RequestError where time is over."""
        if time.monotonic() > deadline:
            limit = self._limits.seconds
            raise RequestError(f"not finished after {limit:g} seconds", None, 504, "timeout")


class _Finished:
    """A finished text as traced_text reads it."""

    def __init__(
        self, tokens: Sequence[int], prompt_length: int, found: Sequence[np.ndarray]
    ) -> None:
        self.tokens, self.prompt_length = np.asarray(tokens, np.int32), prompt_length
        self.neighbours = np.stack(found) if found else None
