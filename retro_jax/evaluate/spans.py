"""Tokens as readable pieces of text, with what is known of each."""

import codecs
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of text: one token, or several that make up one character.

    Attributes:
      gain: bits that retrieval saved on it (negative: that it cost); None where it is not known.
      shared: whether it stands in a run of tokens that another text has too.
    """

    text: str
    gain: float | None = None
    shared: bool = False


def spans(
    pieces: Sequence[bytes],
    gains: Sequence[float] | None = None,
    shared: Sequence[bool] | None = None,
) -> list[Span]:
    """Decodes tokens given as UTF-8 bytes; a character cut by the text's ends becomes U+FFFD.

    Args:
      pieces: the bytes of each token.
      gains: bits of each token; those of tokens that share a character are added.
      shared: by token; a character is shared when its last token is.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    result: list[Span] = []
    pending: float | None = None
    for i, piece in enumerate(pieces):
        text = decoder.decode(piece, final=i == len(pieces) - 1)
        if gains is not None:
            pending = (pending or 0.0) + float(gains[i])
        if text:
            result.append(Span(text, pending, bool(shared is not None and shared[i])))
            pending = None
    return result


def merged(parts: Sequence[Span]) -> list[Span]:
    """The same text in as few spans as `shared` allows; gains are dropped."""
    groups = itertools.groupby(parts, key=lambda span: span.shared)
    return [Span("".join(span.text for span in group), shared=shared) for shared, group in groups]


def shared_runs(tokens: np.ndarray, other: np.ndarray, length: int = 4) -> np.ndarray:
    """[n] bool: which `tokens` [n] stand in a run of at least `length` that `other` [m] has too."""
    runs = {tuple(other[i : i + length].tolist()) for i in range(len(other) - length + 1)}
    mask = np.zeros(len(tokens), bool)
    for i in range(len(tokens) - length + 1):
        if tuple(tokens[i : i + length].tolist()) in runs:
            mask[i : i + length] = True
    return mask
