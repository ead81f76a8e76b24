"""The requests that a server takes, with their types; unknown fields and other types are refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

_Token = Annotated[StrictInt, Field(ge=0)]
_Tokens = Annotated[list[_Token], Field(min_length=1)]


class _Request(BaseModel):
    """Common to all."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_Document = Annotated[str, Field(pattern=r"^[^/@]+/.+$")]


class RetrievalOptions(_Request):
    """How a completion retrieves: k neighbours of a chunk, at a revision of the database.

    `exclude` are documents that are never retrieved; `stride` are tokens between retrievals; `tokens`
    mixes the model with the token memory.
    """

    k: Annotated[int, Field(ge=0)] | None = None
    revision: Annotated[int, Field(ge=0)] | None = None
    exclude: Annotated[list[_Document], Field(max_length=1000)] = []
    stride: Annotated[int, Field(ge=1)] | None = None
    tokens: bool = False


class StreamOptions(_Request):
    """OpenAI's: whether the last event of a stream has the numbers of tokens."""

    include_usage: bool = False


class CompletionRequest(_Request):
    """OpenAI's completion, some settings that its clients send as extras, and `retrieval`."""

    model: str | None = None
    prompt: (
        StrictStr
        | Annotated[list[StrictStr], Field(min_length=1)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    temperature: Annotated[float, Field(ge=0, le=1e3)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    n: Annotated[int, Field(ge=1)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = False
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=16)] | None = None
    seed: int | None = None
    user: str | None = None
    best_of: int | None = None
    suffix: str | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, Any] | None = None
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    min_tokens: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=1e3)] = 1.0
    retrieval: StrictBool | RetrievalOptions | None = None


class RetrieveRequest(_Request):
    """A text whose neighbours are wanted."""

    text: str
    k: Annotated[int, Field(ge=1, le=100)] | None = None
    revision: Annotated[int, Field(ge=0)] | None = None


class NewDocument(_Request):
    """A document to append."""

    id: Annotated[str, Field(min_length=1)]
    text: Annotated[str, Field(min_length=1)]


class DocumentsRequest(_Request):
    """Documents to remove, as CORPUS/ID, and then some to append to a corpus."""

    append: list[NewDocument] = []
    remove: list[_Document] = []
    corpus: Annotated[str, Field(pattern=r"^\w+$")] = "served"


class TraceRequest(_Request):
    """What the page at / sends: a prompt whose continuation is traced."""

    prompt: str
    max_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    retrieval: StrictBool | RetrievalOptions = True


class TokenizeRequest(_Request):
    """A text to tokenise; the text of a special token is that token."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = False


class DetokenizeRequest(_Request):
    """Tokens to turn into text."""

    tokens: list[_Token]
    model: str | None = None
