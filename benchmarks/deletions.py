"""Whether a trace tells the truth: neighbours that it holds responsible are deleted.

    python -m benchmarks.deletions --workdir=W
    python -m benchmarks.deletions --workdir=W --deleted_tokens=2000 --output=deletions.json

Texts are the beginnings of a split's documents, with the neighbours of its table. Of all tokens for
which a neighbour is named, so many are drawn at random. What the trace shows is compared with what
happens, as launch.evaluate scores it:

    neighbour    that one neighbour is gone, and the chunk has one less
    document     its document is gone from all neighbours of the text, with nothing in its place
    replaced     its document is gone from the database, which is searched again: the next one moves up

Each gives a rank correlation (Spearman's) and the share of tokens that change in the direction shown.
Of every span of 8 tokens or more that a document is named for, the text is looked for in the
document's text.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from flax import nnx
from scipy.stats import spearmanr

from benchmarks.timing import table, write_json
from benchmarks.training import OUTPUT
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.splits import Split, open_split
from data_pipelines.evaluation.trace_sources import DatabaseLibrary
from data_pipelines.retriever.retriever import Retriever
from launch.common import app
from launch.common.flags import DATA, SPLIT, data_directory
from launch.runs import trained_run
from retro_jax.batch import ChunkText
from retro_jax.errors import UserError
from retro_jax.evaluate.score import TokenLosses, WindowConfig, compiled_token_losses, score_chunks
from retro_jax.generate.trace import LEAST_EFFECT, Trace, largest_effect, trace
from retro_jax.report.trace_value import LEAST_COPY, trace_value

TOKENS = flags.DEFINE_integer("deleted_tokens", 500, "Tokens that are compared.", lower_bound=2)
LEAST = flags.DEFINE_float("least_effect", LEAST_EFFECT, "Nats from which a neighbour is named.")

_MOST_CHUNKS = 4  # of a text
_MOST_TEXTS = 64

__all__ = ["DATA", "OUTPUT", "SPLIT", "main"]  # flags of other modules that --help shows too


@dataclasses.dataclass(frozen=True)
class Text:
    """The beginning of a document: its chunks [C] by id, their neighbours [C, K] by id, its trace."""

    chunks: np.ndarray
    neighbours: np.ndarray
    trace: Trace


@dataclasses.dataclass(frozen=True)
class Named:
    """A token for which a trace names a neighbour: which text, place and slot, and the effect shown."""

    text: int
    place: int
    slot: int
    effect: float

    @property
    def chunk(self) -> int:
        """The chunk whose neighbour it is."""
        return self.place // CHUNK_LENGTH - 1


def main() -> None:
    """Prints a row for each kind of deletion."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    data = data_directory(DATA.value or workdir)
    run = trained_run.open_run(workdir / "retro")
    trained_run.check_data(run, data)
    graphdef, params = trained_run.load_model(run)
    split = open_split(data, SPLIT.value, neighbours=run.batches.neighbours)
    texts = traced_texts(nnx.merge(graphdef, params), split, run.batches.neighbours, run.chunks)
    named = drawn(texts, TOKENS.value, LEAST.value)
    if len(named) < 2:
        raise UserError(f"--least_effect={LEAST.value}: no token has a neighbour of this effect")
    deletions = Deletions(split, compiled_token_losses(graphdef, params), texts)
    without_neighbour = deletions.of_neighbours(named)
    without_document = deletions.of_documents(named)
    replaced = deletions.of_documents(named, Retriever.open(data))
    rows = [
        {"deleted": name, **agreement(named, falls)}
        for name, falls in (
            ("neighbour", without_neighbour),
            ("document", without_document),
            ("replaced", replaced),
        )
    ]
    print(table(rows))
    spans, right = copied_spans(texts, split, Tokenizer.open(data / "tokenizer"))
    print(f"copied spans of {LEAST_COPY} tokens or more: {spans}, in the document named: {right}")
    if OUTPUT.value:
        facts = {"run": run.identity(), "split": split.hashes(True), "texts": len(texts)}
        found = {"rows": rows, "copied_spans": spans, "in_the_document": right}
        write_json(pathlib.Path(OUTPUT.value), {**facts, **found})


def traced_texts(model: Any, split: Split, k: int, chunks: int) -> list[Text]:
    """The beginnings of documents that have enough chunks, traced with K neighbours a chunk."""
    length = min(chunks, _MOST_CHUNKS)
    owners = split.database.documents(split.ids)
    firsts = np.flatnonzero(np.diff(owners, prepend=-1))
    long = [i for i in firsts if i + length <= len(owners) and owners[i + length - 1] == owners[i]]
    assert split.table is not None
    texts = []
    for first in long[:_MOST_TEXTS]:
        ids = split.ids[first : first + length]
        found = split.table.ids(ids, k)
        tokens = split.database.chunks(ids).ravel()
        tokens = tokens[tokens != split.database.pad_id]
        complete = len(tokens) // CHUNK_LENGTH
        neighbours = split.values(ids, found)[:complete]
        texts.append(Text(ids, found, trace(model, tokens, neighbours, chunks=length)))
    return texts


def drawn(texts: Sequence[Text], count: int, least: float) -> list[Named]:
    """Tokens of all texts for which a neighbour is named, `count` of them at random."""
    every = []
    for number, text in enumerate(texts):
        slots = largest_effect(text.trace.effects, least)
        for place in np.flatnonzero(slots >= 0).tolist():
            slot = int(slots[place])
            every.append(Named(number, place, slot, float(text.trace.effects[place, slot])))
    chosen = np.random.default_rng(0).permutation(len(every))[:count]
    return [every[i] for i in sorted(chosen.tolist())]


class Deletions:
    """Scores texts again after something was deleted, by the code of launch.evaluate."""

    def __init__(self, split: Split, losses: TokenLosses, texts: Sequence[Text]):
        """Scores the texts as they are first; `losses` are of the model."""
        assert split.retrieval is not None
        self._split, self._losses, self._texts = split, losses, texts
        self._retrieval = split.retrieval
        self._whole = self._scored([(text, text.neighbours) for text in texts])

    def of_neighbours(self, named: Sequence[Named]) -> np.ndarray:
        """[n] nats by which the log-probability of each token falls without its neighbour."""
        keys = list(dict.fromkeys((one.text, one.chunk, one.slot) for one in named))
        cases = []
        for text, chunk, slot in keys:
            rest = self._texts[text].neighbours.copy()
            rest[chunk] = [*np.delete(rest[chunk], slot), -1]
            cases.append((self._texts[text], rest))
        scores = dict(zip(keys, self._scored(cases), strict=True))
        return np.array([self._fall(one, scores[one.text, one.chunk, one.slot]) for one in named])

    def of_documents(
        self, named: Sequence[Named], retriever: Retriever | None = None
    ) -> np.ndarray:
        """[n] the same without the neighbour's whole document; a retriever finds others instead."""
        owners = [self._owner(one) for one in named]
        keys = list(dict.fromkeys(zip((one.text for one in named), owners, strict=True)))
        cases = []
        for text, document in keys:
            known = self._texts[text]
            if retriever is None:
                gone = self._retrieval.documents(known.neighbours) == document
                cases.append((known, np.where(gone, -1, known.neighbours)))
                continue
            queries = self._split.database.chunks(known.chunks)
            without = np.full(len(queries), document)
            ids, _ = retriever.neighbours(queries, known.neighbours.shape[1], without)
            cases.append((known, ids))
        scores = dict(zip(keys, self._scored(cases), strict=True))
        pairs = zip(named, owners, strict=True)
        return np.array([self._fall(one, scores[one.text, owner]) for one, owner in pairs])

    def _owner(self, one: Named) -> int:
        """The document of the neighbour that is named."""
        return self._retrieval.document(int(self._texts[one.text].neighbours[one.chunk, one.slot]))

    def _fall(self, one: Named, scores: np.ndarray) -> float:
        """How much less likely a token is in other scores of its text."""
        return float((scores - self._whole[one.text]).ravel()[one.place])

    def _scored(self, cases: Sequence[tuple[Text, np.ndarray]]) -> np.ndarray:
        """[cases, C, 64] nats of texts with some neighbours [C, K] by id."""
        tokens = np.stack([self._split.database.chunks(text.chunks) for text, _ in cases])
        found = np.concatenate([ids for _, ids in cases])
        count, chunks = tokens.shape[:2]
        flat = tokens.reshape(count * chunks, -1)
        text = ChunkText(
            ids=np.arange(len(flat)),
            documents=np.repeat(np.arange(count), chunks),
            chunks=lambda ids: np.where(ids[:, None] < 0, self._split.database.pad_id, flat[ids]),
            neighbours=lambda ids: self._split.values(ids, found[ids]),
            pad_id=self._split.database.pad_id,
        )
        windows = WindowConfig(chunks=chunks, stride=chunks, batch_size=min(8, count))
        return score_chunks(self._losses, text, windows).reshape(count, chunks, -1)


def agreement(named: Sequence[Named], falls: np.ndarray) -> Mapping[str, Any]:
    """How far what happened agrees with what was shown."""
    shown = np.array([one.effect for one in named])
    return {
        "tokens": len(named),
        "rank correlation": float(spearmanr(shown, falls).statistic),
        "same direction": float(np.mean((shown > 0) == (falls > 0))),
        "shown nats": float(np.abs(shown).mean()),
        "measured nats": float(np.abs(falls).mean()),
        "largest difference": float(np.abs(shown - falls).max()),
    }


def copied_spans(texts: Sequence[Text], split: Split, tokenizer: Tokenizer) -> tuple[int, int]:
    """Spans for which a page names a document, and those that its text contains as characters."""
    assert split.retrieval is not None
    assert split.table is not None
    library = DatabaseLibrary(tokenizer, split.retrieval)
    spans = right = 0
    for text in texts:
        sources = [library.sources(ids, np.zeros(len(ids))) for ids in text.neighbours]
        value = trace_value(text.trace, sources, library)
        by_id = {s.document.id: s.document for row in sources for s in row if s is not None}
        for span in (span for chunk in value["chunks"] for span in chunk["spans"]):
            if span["length"] < LEAST_COPY:
                continue
            inside = text.trace.tokens[span["start"] : span["start"] + span["length"]]
            document = tokenizer.decode_bytes(by_id[span["document"]].tokens())
            spans += 1
            right += tokenizer.decode_bytes(inside) in document
    return spans, right


if __name__ == "__main__":
    app.run(main)
