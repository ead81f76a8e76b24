"""The server's paths, as an ASGI application.

POST /v1/completions   OpenAI's, with `retrieval`; GET /v1/models
POST /retrieve         {"text": ..., "k": 2}
POST /documents        {"append": [{"id": ..., "text": ...}], "remove": ["CORPUS/ID"]}, if allowed
GET  /                 a page to type into; POST /trace is what it asks
GET  /health, /metrics
POST /tokenize, /detokenize, GET /tokenizer_info   as vLLM's, for clients that count tokens
"""

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from retro_jax.errors import UserError
from retro_jax.generate.text_generator import TextGenerator
from retro_jax.serve import errors
from retro_jax.serve.completions import Completion, CompletionService, named, place
from retro_jax.serve.engine import Engine
from retro_jax.serve.errors import RequestError
from retro_jax.serve.limits import Limits
from retro_jax.serve.metrics import CONTENT_TYPE, Metrics
from retro_jax.serve.requests import (
    CompletionRequest,
    DetokenizeRequest,
    DocumentsRequest,
    RetrieveRequest,
    TokenizeRequest,
    TraceRequest,
)
from retro_jax.serve.traces import Traces

_BODY_SECONDS = 30.0  # that a client has to send a request in
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
# What fields of several types may be, and the types' names in errors.
_EXPECTED = {
    "prompt": "a string, a list of strings, or tokens as one or several lists of numbers",
    "stop": "a string, or a list of 16 strings at most",
    "remove": "documents as CORPUS/ID",
    "retrieval.exclude": "1,000 documents as CORPUS/ID at most",
    "corpus": "a name of letters, digits and _",
    "retrieval": 'true, false, or {"k": neighbours, "revision": number, "exclude": ["CORPUS/ID"],'
    ' "stride": tokens, "tokens": true}',
}
_KINDS = ("str", "bool", "int", "RetrievalOptions")
_log = logging.getLogger(__name__)

# Appends (id, text) to a corpus and removes CORPUS/ID; returns lines about it.
Change = Callable[[str, Sequence[tuple[str, str]], Sequence[str]], list[str]]


class Server:
    """A generator, the engine that runs it, and the application before them.

    Attributes:
      engine, metrics, service: its parts. app: the ASGI application, whose lifespan starts and stops
        the engine.
    """

    def __init__(
        self,
        generator: TextGenerator,
        limits: Limits = Limits(),
        *,
        api_key: str | None = None,
        change: Change | None = None,
        warm_up: bool = True,
        poll: float = 1.0,
    ) -> None:
        """Puts the parts together; nothing is compiled before the application starts.

        Args:
          generator: the model, its tokeniser and databases.
          api_key: that requests have to bring; None for none.
          change: changes the database's documents; None refuses to.
          warm_up: compiles everything before the first request; else each program at its first use.
          poll: seconds between looks for another revision.
        """
        self.limits, self.metrics = limits, Metrics()
        self.engine = Engine(generator.running(limits.rows, limits.strides), limits, self.metrics)
        self.service = CompletionService(generator, self.engine, limits)
        self._generator, self._change, self._poll = generator, change, poll
        self._warm_up = warm_up
        self._traces = Traces(generator, self.service)
        self._changing = asyncio.Lock()
        self._created = int(time.time())
        self.app = FastAPI(
            title="retro-jax", docs_url=None, redoc_url=None, lifespan=self._lifespan
        )
        self._add_routes()
        self.app.add_exception_handler(RequestValidationError, _invalid)
        self.app.add_exception_handler(HTTPException, _http_error)
        for kind in (RequestError, errors.RefusedError, UserError, Exception):
            self.app.add_exception_handler(kind, _failed)
        self.app.add_middleware(_Guard, limits=limits, api_key=api_key, metrics=self.metrics)

    async def refresh(self) -> bool:
        """Takes up another revision where there is one; requests under way keep theirs."""
        databases = self._generator.databases
        if databases is None:
            return False
        changed = await asyncio.to_thread(databases.refresh)
        revision = databases.newest().revision
        self.metrics.revision.set(revision)
        if changed:
            self.metrics.swaps.inc()
            _log.info("the database is at revision %d now", revision)
        return changed

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Compiles, runs, and finishes what was accepted."""
        if self._warm_up:
            await asyncio.to_thread(self.engine.running.warm_up)
            if self._generator.databases is not None:
                await asyncio.to_thread(self._generator.databases.warm_up)
        self.engine.start()
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(self.engine.stop, self.limits.stop_seconds)

    async def _watch(self) -> None:
        """Looks for another revision, again and again; one that cannot be opened is left for later."""
        told = ""
        while True:
            try:
                await self.refresh()
                told = ""
            except Exception as error:
                if str(error) != told:
                    _log.info("the newest revision cannot be opened (yet): %s", error)
                told = str(error)
            await asyncio.sleep(self._poll)

    def _add_routes(self) -> None:
        """The paths."""
        app = self.app
        app.add_api_route("/v1/completions", self._complete, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/models/{model}", self._model, methods=["GET"])
        app.add_api_route("/retrieve", self._retrieve, methods=["POST"])
        app.add_api_route("/documents", self._documents, methods=["POST"])
        app.add_api_route("/trace", self._traced, methods=["POST"], response_model=None)
        app.add_api_route("/tokenizer_info", self._tokenizer_info, methods=["GET"])
        app.add_api_route("/tokenize", self._tokenize, methods=["POST"])
        app.add_api_route("/detokenize", self._detokenize, methods=["POST"])
        app.add_api_route("/health", self._health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self._metrics, methods=["GET"], response_model=None)
        app.add_api_route("/", self._root, methods=["GET"], response_model=None)

    async def _complete(self, body: CompletionRequest, request: Request) -> Response:
        """/v1/completions."""
        start = time.monotonic()
        completion = await asyncio.to_thread(self.service.prepare, body)
        try:
            completion.submit()
        except UserError as error:
            raise errors.bad_request(error, "n") from error
        if body.stream:
            return _Events(completion, request, self.limits.seconds)
        try:
            answer = await completion.whole(request.is_disconnected)
        except ConnectionError:
            return Response(status_code=499)  # nobody reads it
        finally:
            completion.cancel()
        self.metrics.request_seconds.observe(time.monotonic() - start)
        return JSONResponse(answer)

    async def _models(self) -> dict[str, Any]:
        """/v1/models."""
        return {"object": "list", "data": [self._described()]}

    async def _model(self, model: str) -> dict[str, Any]:
        """/v1/models/MODEL."""
        self.service.check_model(model)
        return self._described()

    def _described(self) -> dict[str, Any]:
        """The model."""
        databases = self._generator.databases
        return {
            "id": self._generator.name,
            "object": "model",
            "created": self._created,
            "owned_by": "retro-jax",
            "max_model_len": self.service.length,
            "retrieval": None if databases is None else named(databases.newest()),
        }

    async def _retrieve(self, body: RetrieveRequest) -> dict[str, Any]:
        """/retrieve."""
        self.service.prompt(body.text, 0, "text")
        database = await asyncio.to_thread(self.service.database, body.revision, "revision")
        found = await asyncio.to_thread(
            self._generator.retrieve, body.text, body.k, database=database
        )
        chunks = [
            [place(each) | {"text": each.text, "continuation": each.continuation} for each in chunk]
            for chunk in found
        ]
        return named(database) | {"chunks": chunks}

    async def _documents(self, body: DocumentsRequest) -> dict[str, Any]:
        """/documents."""
        if self._change is None:
            message = "this server was started without --documents: expected no change"
            raise RequestError(message, None, 403, "documents_refused")
        if not body.append and not body.remove:
            raise RequestError("append and remove are empty: expected one of them", "append")
        documents = [(document.id, document.text) for document in body.append]
        async with self._changing:
            try:
                lines = await asyncio.to_thread(self._change, body.corpus, documents, body.remove)
            except UserError as error:
                raise errors.bad_request(error, "remove" if body.remove else "append") from error
            await self.refresh()
        databases = self._generator.databases
        assert databases is not None
        return named(databases.newest()) | {"report": lines}

    async def _traced(self, body: TraceRequest, request: Request) -> Response:
        """/trace."""
        try:
            return JSONResponse(await self._traces.answer(body, request.is_disconnected))
        except ConnectionError:
            return Response(status_code=499)  # nobody reads it

    async def _tokenizer_info(self) -> dict[str, Any]:
        """/tokenizer_info."""
        return {"tokenizer_class": "retro-jax", "vocab_size": self._generator.codec.vocab_size} | (
            _SPECIAL
        )

    async def _tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """/tokenize."""
        codec = self._generator.codec
        special = {_SPECIAL["bos_token"]: codec.bos_id, _SPECIAL["eos_token"]: codec.eos_id}
        if body.prompt in special:
            tokens = [special[body.prompt]]
        else:
            try:
                tokens = (await asyncio.to_thread(codec.encode, body.prompt)).tolist()
            except (UserError, UnicodeEncodeError) as error:
                raise RequestError("prompt: expected valid Unicode", "prompt") from error
            tokens = [codec.bos_id, *tokens] if body.add_special_tokens else tokens
        return {"tokens": tokens, "count": len(tokens), "max_model_len": self.service.length}

    async def _detokenize(self, body: DetokenizeRequest) -> dict[str, Any]:
        """/detokenize."""
        codec = self._generator.codec
        past = next((token for token in body.tokens if token >= codec.vocab_size), None)
        if past is not None:
            message = f"tokens has {past}: expected ids less than {codec.vocab_size}"
            raise RequestError(message, "tokens")
        return {"prompt": codec.decode(body.tokens)}

    async def _health(self) -> Response:
        """/health."""
        well = self.engine.alive and not self.engine.stopping
        return JSONResponse({"status": "ok" if well else "stopping"}, 200 if well else 503)

    async def _metrics(self) -> Response:
        """/metrics."""
        return Response(self.metrics.text(self.engine), media_type=CONTENT_TYPE)

    async def _root(self) -> Response:
        """The page; it needs no key, as it says nothing but the model's name."""
        return HTMLResponse(await asyncio.to_thread(self._traces.page))


class _Events(StreamingResponse):
    """A completion as server-sent events. A client that is gone, or does not read, frees its rows."""

    def __init__(self, completion: Completion, request: Request, seconds: float) -> None:
        super().__init__(self._lines(completion, request), media_type="text/event-stream")
        self._completion, self._seconds = completion, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends until the end, or until a slow reader's time is over."""
        try:
            with anyio.move_on_after(self._seconds + _BODY_SECONDS):
                await super().__call__(scope, receive, send)
        finally:
            self._completion.cancel()

    @staticmethod
    async def _lines(completion: Completion, request: Request) -> AsyncIterator[str]:
        """The events as lines; an error in mid-stream is the last one."""
        try:
            async for event in completion.events(_never):
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        except (RequestError, UserError, RuntimeError) as error:
            if isinstance(error, RuntimeError):
                _log.error("a stream failed", exc_info=error)
            yield f"data: {json.dumps(errors.body_of(error)[1])}\n\n"


async def _never() -> bool:
    """A stream's client is found to be gone by the response itself."""
    return False


class _Guard:
    """Before all paths: the key, the size of a body and the time to send it; counts what is answered."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, api_key: str | None, metrics: Metrics
    ) -> None:
        self._app, self._limits, self._api_key, self._metrics = app, limits, api_key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what must not go further."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check_key(scope)
            replay = await self._read(scope, receive)
        except RequestError as error:
            await errors.response(error)(scope, receive, counted)
            return
        if replay is not None:
            await self._app(scope, replay, counted)

    def _check_key(self, scope: Scope) -> None:
        """Raises unless the key is right; a probe of health and the page itself need none."""
        if self._api_key is None or scope["path"] in ("/health", "/"):
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._api_key.encode()):
            message = "no or another API key: expected 'Authorization: Bearer KEY'"
            raise RequestError(message, None, 401, "invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> Receive | None:
        """The body, read whole, and what comes after it; None where the client has gone."""
        most, parts, size = self._limits.body, [], 0
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            self._refuse_size(length.decode())
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        self._refuse_size(f"{size} or more")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            message_ = f"no whole request within {_BODY_SECONDS:g} seconds"
            raise RequestError(message_, None, 408, "timeout") from None
        whole: list[Message] = [
            {"type": "http.request", "body": b"".join(parts), "more_body": False}
        ]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay

    def _refuse_size(self, size: str) -> None:
        """Raises the error of a body that is too large."""
        message = f"the request has {size} bytes: expected {self._limits.body} at most"
        raise RequestError(message, None, 413, "request_too_large")


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """A body that is no JSON, or has fields that are wrong: the first one is named."""
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda each: len(_field(each["loc"]).split(".")))
    field, kind = _field(first["loc"]), first["type"]
    expected = _EXPECTED.get(field)
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return errors.response(RequestError(f"the body is no JSON: {reason}"))
    if kind == "missing":
        message = f"{field or 'the body'} is missing: expected {expected or 'it'}"
    elif kind == "extra_forbidden":
        message = f"unknown field {field!r}: expected none of this name"
    elif expected:
        message = f"{field}: expected {expected}"
    else:
        reason = first["msg"].replace("Input should be", "expected")
        message = f"{field or 'the body'}: {reason}"
    return errors.response(RequestError(message, field or None))


def _field(location: Sequence[str | int]) -> str:
    """A field's name, without "body", places in lists and names of types."""
    parts = [part for part in location[1:] if isinstance(part, str) and part.isidentifier()]
    return ".".join(part for part in parts if part not in _KINDS)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return errors.response(RequestError(message, None, error.status_code))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """Everything else."""
    if not isinstance(error, RequestError | errors.RefusedError | UserError):
        _log.error("a request failed", exc_info=error)
    return errors.response(error)
