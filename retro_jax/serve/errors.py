"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}} and an HTTP status."""

import re
from typing import Any

from fastapi.responses import JSONResponse

from retro_jax.errors import UserError
from retro_jax.serve.engine import RefusedError

_FIELD = re.compile(r"SamplingConfig\.(\w+)")
_DIRECTORIES = re.compile(r"(?<![\w./-])/(?:[^\s/'\"]+/)+")


class RequestError(Exception):
    """A request that cannot be answered.

    Attributes:
      param: the field that is wrong. status: of HTTP. code: a name for programs.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def told(error: UserError) -> str:
    """The message of a UserError as a client may read it: without the server's directories."""
    return _DIRECTORIES.sub("", str(error))


def bad_request(error: UserError, param: str | None) -> RequestError:
    """A UserError as the error of a field; SamplingConfig's fields have the same names here."""
    message = told(error)
    field = _FIELD.search(message)
    return RequestError(_FIELD.sub(r"\1", message), field[1] if field else param)


def body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error; text that is no Unicode, which a client may have sent, is escaped."""
    plain = message.encode("utf-8", "backslashreplace").decode()
    return {"error": {"message": plain, "type": kind, "param": param, "code": code}}


def body_of(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The status and JSON of an exception; of a defect nothing but that there is one."""
    if isinstance(error, RequestError):
        kind = "authentication_error" if error.status == 401 else "invalid_request_error"
        return error.status, body(str(error), kind, error.param, error.code)
    if isinstance(error, RefusedError):
        return error.status, body(str(error), "rate_limit_error", None, error.code)
    if isinstance(error, UserError):
        return 400, body(told(error), "invalid_request_error")
    return 500, body("the server failed on this request; its log says how", "server_error")


def response(error: BaseException) -> JSONResponse:
    """An exception as a response."""
    status, content = body_of(error)
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(content, status, headers)
