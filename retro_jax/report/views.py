"""The contents of a report, as values: chunks with spans, samples, curves, tables, charts."""

import codecs
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Span:
    """A piece of text: one token, or several that form one character.

    Attributes:
      gain: bits that retrieval saved on it (negative: that it cost); None where it is not known.
      shared: whether it is in a run of tokens that another text has too.
    """

    text: str
    gain: float | None = None
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class NeighbourView:
    """A retrieved neighbour: its document, its corpus, its distance to the query, and its text.

    Attributes:
      score: the name of the distance, where it is a score: "BM25".
    """

    document: str
    corpus: str
    distance: float
    chunk: Sequence[Span]
    continuation: Sequence[Span]
    score: str = "distance"


@dataclasses.dataclass(frozen=True)
class SourceDocument:
    """A document that a page names: its id, its corpus, and what gives all its tokens [m]."""

    id: str
    corpus: str
    tokens: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class NeighbourSource:
    """Where a retrieved neighbour stands.

    Attributes:
      document: which contains it. chunk: which of the document's `chunks` it is, from 1.
      score: to the query. kind: what the score is called: "distance" or "BM25".
      revision: of the database.
    """

    document: SourceDocument
    chunk: int
    chunks: int
    score: float
    kind: str = "distance"
    revision: int = 0


@dataclasses.dataclass(frozen=True)
class ChunkView:
    """A test chunk: the gain from retrieval on each of its tokens, and the neighbours.

    Attributes:
      heading: why it is shown. source: its document and place.
      gain: bits that retrieval saved on it, out of `bits` without retrieval.
      query: the chunk before it, with which the neighbours were retrieved.
      spans: the chunk's text, with the gain of each token.
    """

    heading: str
    source: str
    gain: float
    bits: float
    query: Sequence[Span]
    spans: Sequence[Span]
    neighbours: Sequence[NeighbourView]


@dataclasses.dataclass(frozen=True)
class SampleChunk:
    """A chunk of a sample: its prompt part, its generated part, and the neighbours it retrieved."""

    prompt: str
    generated: str
    neighbours: Sequence[NeighbourView]


@dataclasses.dataclass(frozen=True)
class SampleView:
    """A sample: a heading, its origin, and its chunks."""

    heading: str
    settings: str
    chunks: Sequence[SampleChunk]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A run's training loss in nats per token, by tokens seen."""

    name: str
    tokens: Sequence[float]
    loss: Sequence[float]


@dataclasses.dataclass(frozen=True)
class OverlapPoint:
    """Figures among the chunks that share at most a share `at_most` with the training data."""

    at_most: float
    chunks: int
    bits_per_byte: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class ChartView:
    """A chart: its heading, its caption, and the SVG of line_chart."""

    title: str
    caption: str
    svg: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of plain texts (report/tables.py has its forms).

    Attributes:
      header, rows: its cells. title, caption: its heading, and the text below.
      best: the column to emphasise in each row, if any. total: whether the last row sums all rows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    best: Sequence[int | None] = ()
    total: bool = False


@dataclasses.dataclass(frozen=True)
class PublishedFigures:
    """The paper's figures of a text, beside which ours are shown.

    Attributes:
      title: the text's name. label: of the figure. figure: its name in our results.
      layout: "sets" where columns are whole sets, ours in that of the same `words`; "corpora" where
        rows are corpora, ours in further columns; "sizes" where rows are sizes of the paper's models
        and columns conditions, ours in the last row.
      columns: of the paper's figures. rows: name -> a figure for each column.
      words: of "sets", column -> words of the whole set, line ends counted.
    """

    title: str
    label: str
    figure: str
    layout: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    words: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything the page shows; a section without content is left out.

    Attributes:
      facts: (name, value) pairs about the run.
      scores: condition -> corpus -> Score.to_dict(), where the corpus "" is all of them.
      curves: training losses.
      chunks, samples: the gain from retrieval, and generated text.
      charts: further ones, of the factors behind retrieval. tables: further ones, behind the scores.
      overlap: corpus ("" for all) -> the figures by overlap with the training data.
    """

    title: str
    summary: str
    facts: Sequence[tuple[str, str]]
    scores: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    curves: Sequence[Curve]
    chunks: Sequence[ChunkView]
    samples: Sequence[SampleView]
    charts: Sequence[ChartView] = ()
    tables: Sequence[Table] = ()
    overlap: Mapping[str, Sequence[OverlapPoint]] = dataclasses.field(default_factory=dict)


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
    """[n] bool: which `tokens` [n] are in a run of at least `length` that `other` [m] has too."""
    runs = {tuple(other[i : i + length].tolist()) for i in range(len(other) - length + 1)}
    mask = np.zeros(len(tokens), bool)
    for i in range(len(tokens) - length + 1):
        if tuple(tokens[i : i + length].tolist()) in runs:
            mask[i : i + length] = True
    return mask
