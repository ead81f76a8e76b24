"""Bits per byte and word perplexity, with denominators counted on the documents themselves.

The numerator is the loss of every token of a document's text. The end of the document (eos) is no
byte of the text: its loss is left out and given apart. A document's first token (bos) has no loss.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from retro_jax.batch import SizedDocument, text_mask


@dataclasses.dataclass(frozen=True)
class Score:
    """Sums over some documents, and the figures that follow from them.

    Attributes:
      documents, chunks: how many were scored.
      tokens: predicted tokens of the text (without bos and eos), with their summed loss in `nats`.
      eos_nats: summed loss of the documents' ends, one each in `eos_tokens`.
      bytes, words, lines: UTF-8 bytes, whitespace words and line ends of the documents.
    """

    documents: int
    chunks: int
    tokens: int
    eos_tokens: int
    bytes: int
    words: int
    lines: int
    nats: float
    eos_nats: float

    @property
    def bits_per_byte(self) -> float:
        """Loss of the text in bits, over its UTF-8 bytes."""
        return _ratio(self.nats / math.log(2), self.bytes)

    @property
    def bits_per_token(self) -> float:
        """Loss of the text in bits, over its tokens; comparable for one tokenizer only."""
        return _ratio(self.nats / math.log(2), self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp of the loss a word, line ends counted as words (WikiText's convention)."""
        return math.exp(min(_ratio(self.nats, self.words + self.lines), 700.0))

    @property
    def bits_per_eos(self) -> float:
        """Loss of a document's end in bits, on average."""
        return _ratio(self.eos_nats / math.log(2), self.eos_tokens)

    def to_dict(self) -> dict[str, float]:
        """Every sum and figure by name."""
        figures = ("bits_per_byte", "word_perplexity", "bits_per_token", "bits_per_eos")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in figures}


def _ratio(numerator: float, denominator: int) -> float:
    """The quotient, NaN where there is nothing to divide by."""
    return numerator / denominator if denominator else math.nan


def measure(
    nll: np.ndarray,
    tokens: np.ndarray,
    documents: np.ndarray,
    *,
    records: Mapping[int, SizedDocument],
    eos_id: int,
    pad_id: int,
    text: np.ndarray | None = None,
) -> dict[str, Score]:
    """Sums the loss of a text by corpus.

    Args:
      nll: [n, M] nats of each token (score_chunks).
      tokens: [n, M], the tokens themselves.
      documents: [n], the document number of each chunk; a document's chunks are consecutive.
      records: the documents by number; every one in `documents` is whole.
      text: [n, M] bool, the tokens that are scored; all of the documents' text by default.

    Returns:
      A Score per corpus, in the order of their names.
    """
    is_eos = tokens == eos_id
    is_text = text_mask(tokens, documents, eos_id=eos_id, pad_id=pad_id) if text is None else text
    nats = nll.astype(np.float64)
    per_chunk = {
        "chunks": np.ones(len(documents)),
        "tokens": is_text.sum(axis=1),
        "eos_tokens": is_eos.sum(axis=1),
        "nats": np.where(is_text, nats, 0.0).sum(axis=1),
        "eos_nats": np.where(is_eos, nats, 0.0).sum(axis=1),
    }
    numbers, document_of = np.unique(documents, return_inverse=True)
    sums = {name: np.bincount(document_of, weights=value) for name, value in per_chunk.items()}
    sized_documents = [records[int(number)] for number in numbers]
    corpora = np.array([record.corpus for record in sized_documents])
    names = sorted(set(corpora.tolist()))
    return {name: _score(sums, sized_documents, corpora == name) for name in names}


def documents_hit(hits: np.ndarray, text: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """[D] bool: of which documents every scored token is hit.

    Args:
      hits: [n, M] bool. text: [n, M] bool, the tokens that are scored. documents: [n].
    """
    missed = (text & ~hits).any(axis=1)
    numbers, owner = np.unique(documents, return_inverse=True)
    return np.bincount(owner, weights=missed, minlength=len(numbers)) == 0


def _score(sums: dict[str, np.ndarray], records: list[SizedDocument], mask: np.ndarray) -> Score:
    """The Score of the documents under the mask."""
    picked = [record for record, here in zip(records, mask, strict=True) if here]
    counts = {name: int(sums[name][mask].sum()) for name in ("chunks", "tokens", "eos_tokens")}
    return Score(
        documents=len(picked),
        bytes=sum(record.bytes for record in picked),
        words=sum(record.words for record in picked),
        lines=sum(record.lines for record in picked),
        nats=float(sums["nats"][mask].sum()),
        eos_nats=float(sums["eos_nats"][mask].sum()),
        **counts,
    )


def total(scores: Iterable[Score]) -> Score:
    """The Score of several corpora together."""
    rows = [dataclasses.asdict(score) for score in scores]
    return Score(
        **{field.name: sum(row[field.name] for row in rows) for field in dataclasses.fields(Score)}
    )
