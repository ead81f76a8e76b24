"""A trace as a plain value of dictionaries, lists, numbers and strings: what a page draws, as JSON.

    {"prompt_length": 17, "chunk_length": 64, "retrieval": true,
     "units": [{"text": " def", "token": 70, "with": -0.12, "without": -2.51, "effects": [2.1, 0.0],
                "responsible": 0, "memory": {...}}, ...],
     "chunks": [{"start": 0, "stop": 61, "neighbours": [{"document": ..., "units": [...]}],
                 "spans": [{"start": 70, "place": 12, "length": 9, "neighbour": 0, "document": ...}]}],
     "attention": {"layers": [2], "first": 64, "shape": [n - 64, K, R], "peaks": [...], "data": [...]}}

A unit is a token, or several that form one character: their figures are added. `token` is its last
token's place in the text. Log-probabilities are in nats. `peaks` has, for each layer, the largest
attention of each token from `first` on, and `data` the attention in 255ths of it, in base64.
"""

import base64
import codecs
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from retro_jax.generate.trace import Trace, largest_effect, trace
from retro_jax.model.retro import Retro
from retro_jax.report.matching_spans import MatchingSpan, matching_spans
from retro_jax.report.views import NeighbourSource, SourceDocument

LEAST_MATCH = 4  # tokens of a run that is marked
LEAST_COPY = 8  # tokens of a run that counts as copied
_MOST_NEXT = 3  # tokens for which a memory voted that are named


class MemoryVotes(Protocol):
    """What followed the longest ending of a text that occurs in a database.

    Attributes:
      length: tokens of the ending. tokens: [v], the token after each occurrence.
      documents: [v] numbers of their documents.
    """

    @property
    def length(self) -> int: ...
    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def documents(self) -> np.ndarray: ...


class Library(Protocol):
    """What is known of tokens, and of the documents of a token memory."""

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes of a token; none for a special one."""

    def label(self, token: int) -> str:
        """The name of a special token."""

    def document(self, number: int) -> SourceDocument:
        """The document of a vote."""

    def votes(self, before: np.ndarray) -> MemoryVotes | None:
        """The token memory's votes on what follows tokens [p]; None without a memory."""


class SourceLibrary(Library, Protocol):
    """A library of a database, whose neighbours have sources too."""

    def sources(self, ids: np.ndarray, scores: np.ndarray) -> Sequence[NeighbourSource | None]:
        """The sources of neighbours by their ids [k], -1 for none, and scores [k]."""


class TracedText(Protocol):
    """A text with the neighbours of its complete chunks: a Generation is one."""

    @property
    def tokens(self) -> np.ndarray: ...
    @property
    def prompt_length(self) -> int: ...
    @property
    def neighbours(self) -> np.ndarray | None: ...


@dataclasses.dataclass(frozen=True)
class Unit:
    """The text of one token, or of several that form one character: `tokens` up to `token`.

    It is of no token of its own where bytes are left over of one that had text already.
    """

    text: str
    token: int
    tokens: int
    special: bool = False


def trace_value(
    result: Trace,
    sources: Sequence[Sequence[NeighbourSource | None]],
    library: Library,
    *,
    heading: str = "",
    facts: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """A trace with its texts, its neighbours' sources, matching spans and the memory's votes.

    A matching span names a document only where that document contains it.

    Args:
      result: the figures. sources: [C][K or fewer], of the neighbours of each complete chunk, None for
        an empty slot.
      library: of the tokeniser and the database.
      heading: of the text. facts: names and values that are shown below it.
    """
    parts = list(units(result.tokens, library))
    return {
        "heading": heading,
        "facts": [list(fact) for fact in facts],
        "prompt_length": result.prompt_length,
        "chunk_length": result.chunk_length,
        "retrieval": result.neighbours is not None,
        "units": [_unit(unit, result, library) for unit in parts],
        "chunks": _chunks(result, parts, sources, library),
        "attention": _attention(result),
    }


def traced_text(
    model: Retro,
    text: TracedText,
    found: Callable[[np.ndarray], Sequence[NeighbourSource | None]],
    library: Library,
    *,
    chunks: int,
    heading: str = "",
    facts: Sequence[tuple[str, str]] = (),
    between: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Traces a text that was generated, and describes it as trace_value does.

    Args:
      model: on one device. text: tokens, prompt and neighbours, as a Generation has them.
      found: gives the sources of a complete chunk's neighbours by its tokens [M].
      chunks: of the longest context. library, heading, facts: as for trace_value.
      between: as for generate.trace.trace.
    """
    result = trace(
        model,
        text.tokens,
        text.neighbours,
        chunks=chunks,
        prompt_length=text.prompt_length,
        between=between,
    )
    count = 0 if result.neighbours is None else len(result.neighbours)
    length = result.chunk_length
    complete = result.tokens[: count * length].reshape(count, length)
    sources = [found(chunk) for chunk in complete]
    return trace_value(result, sources, library, heading=heading, facts=facts)


def units(tokens: np.ndarray, library: Library) -> Iterator[Unit]:
    """The units of tokens [n]; bytes that form no character become U+FFFD."""
    decoder, pending = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for i, token in enumerate(tokens.tolist()):
        piece = library.piece(token)
        if piece:
            pending += 1
            text = decoder.decode(piece, final=i + 1 == len(tokens))
            if text:
                yield Unit(text, i, pending)
                pending = 0
            continue
        left = decoder.decode(b"", final=True)
        if left:
            yield Unit(left, i - 1, pending)
            pending = 0
        yield Unit(library.label(token), i, 1, special=True)


def _unit(unit: Unit, result: Trace, library: Library) -> dict[str, Any]:
    """A unit of the text with its figures."""
    inside = slice(unit.token + 1 - unit.tokens, unit.token + 1)
    effects = result.effects[inside].sum(axis=0, keepdims=True)
    value = _named(unit) | {
        "with": _rounded(result.log_probabilities[inside].sum()),
        "without": _rounded(result.without[inside].sum()),
        "effects": [_rounded(effect) for effect in effects[0]],
        "responsible": int(largest_effect(effects)[0]),
    }
    if unit.tokens != 1:
        value["tokens"] = unit.tokens
    memory = None if unit.token == 0 else _memory(result.tokens, unit.token, library)
    return value if memory is None else value | {"memory": memory}


def _memory(tokens: np.ndarray, place: int, library: Library) -> dict[str, Any] | None:
    """What a memory's votes say of one token; None without a memory or a vote."""
    votes = library.votes(tokens[:place])
    if votes is None or not len(votes.tokens):
        return None
    names, counts = np.unique(votes.tokens, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_NEXT]
    total = len(votes.tokens)
    following = [
        {"text": _text_of(int(names[i]), library), "share": _rounded(counts[i] / total)}
        for i in order
    ]
    right = votes.tokens == tokens[place]
    value = {
        "length": int(votes.length),
        "votes": total,
        "share": _rounded(right.mean()),
        "next": following,
    }
    for number in dict.fromkeys(votes.documents[right].tolist()):
        document = library.document(number)
        if contains(document.tokens(), tokens[place - votes.length : place + 1]):
            return value | {"document": document.id}
    return value


def _text_of(token: int, library: Library) -> str:
    """A token alone."""
    (unit,) = units(np.array([token]), library)
    return unit.text


def _chunks(
    result: Trace,
    parts: Sequence[Unit],
    sources: Sequence[Sequence[NeighbourSource | None]],
    library: Library,
) -> list[dict[str, Any]]:
    """The text's chunks, each with the neighbours that its tokens read."""
    length = result.chunk_length
    values: list[dict[str, Any]] = []
    owners = np.array([unit.token // length for unit in parts])
    for chunk in range(-(-len(result.tokens) // length)):
        start, stop = np.searchsorted(owners, [chunk, chunk + 1])
        neighbours: list[dict[str, Any] | None] = []
        spans: list[dict[str, Any]] = []
        of_chunk = sources[chunk - 1] if 0 < chunk <= len(sources) else []
        for slot, tokens in enumerate(result.read_by(chunk)):
            source = of_chunk[slot] if slot < len(of_chunk) else None
            if source is None:
                neighbours.append(None)
                continue
            shown = [_named(unit) for unit in units(tokens[tokens != result.pad_id], library)]
            neighbours.append({**_described(source), "units": shown})
            found = _spans(result, chunk, tokens, source.document.tokens())
            spans += [
                {**dataclasses.asdict(span), "neighbour": slot, "document": source.document.id}
                for span in found
            ]
        values.append(
            {
                "start": int(start),
                "stop": int(stop),
                "neighbours": neighbours,
                "spans": sorted(spans, key=lambda span: -span["length"]),
            }
        )
    return values


def _named(unit: Unit) -> dict[str, Any]:
    """A unit's text and place."""
    value: dict[str, Any] = {"text": unit.text, "token": unit.token}
    return value | {"special": True} if unit.special else value


def _described(source: NeighbourSource) -> dict[str, Any]:
    """A source as plain values."""
    return {
        "document": source.document.id,
        "corpus": source.document.corpus,
        "chunk": source.chunk,
        "chunks": source.chunks,
        "score": _rounded(source.score),
        "kind": source.kind,
        "revision": source.revision,
    }


def _spans(
    result: Trace, chunk: int, neighbour: np.ndarray, document: np.ndarray
) -> list[MatchingSpan]:
    """The spans of a chunk, and of the end of the chunk before, that its neighbour's document has."""
    first, end = (chunk - 1) * result.chunk_length, (chunk + 1) * result.chunk_length
    text = result.tokens[first:end]
    spans = []
    for span in matching_spans(text, neighbour, least=LEAST_MATCH, pad_id=result.pad_id):
        inside = text[span.start : span.start + span.length]
        if span.start + span.length > result.chunk_length and contains(document, inside):
            spans.append(dataclasses.replace(span, start=first + span.start))
    return spans


def contains(document: np.ndarray, span: np.ndarray) -> bool:
    """Whether tokens [n] stand in a document's tokens [m], in one piece."""
    if len(span) > len(document):
        return False
    places = np.flatnonzero(document[: len(document) - len(span) + 1] == span[0])
    return any((document[at : at + len(span)] == span).all() for at in places)


def _attention(result: Trace) -> dict[str, Any] | None:
    """The attention of each token that may read neighbours, of each layer."""
    if result.attention is None:
        return None
    first = min(result.chunk_length, len(result.tokens))
    weights = result.attention[:, first:]
    peaks = weights.max(axis=(2, 3), initial=0)
    scale = np.where(peaks > 0, peaks, 1)[..., None, None]
    shares = np.round(255 * weights / scale).astype(np.uint8)
    return {
        "layers": list(result.layers),
        "first": first,
        "shape": list(shares.shape[1:]),
        "peaks": [[_rounded(peak) for peak in layer] for layer in peaks],
        "data": [base64.b64encode(layer.tobytes()).decode() for layer in shares],
    }


def _rounded(value: Any) -> float:
    """Four digits after the point."""
    return round(float(value), 4)
