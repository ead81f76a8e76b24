"""A text that was scored, summed by document: intervals, overlap and comparisons need no more of it.

launch.evaluate writes W/evaluation/SPLIT-documents.npz once per evaluation, of the losses of every
condition. Readers of the file need neither these losses nor the prepared data.
"""

import dataclasses
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from retro_jax.batch import SizedDocument
from retro_jax.errors import UserError
from retro_jax.evaluate.conditions import condition_order
from retro_jax.evaluate.overlap import OverlapSums
from retro_jax.storage import files

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """Sums of a text over each of its D documents, under several conditions.

    Attributes:
      source: where they come from: "split", "max_documents", the hash of the "chunks", that of the
        table of "neighbours" behind `overlap` (None without one), and for each of the "conditions"
        the "nll" file and its "sha256".
      corpora: [D] names. bytes, words, tokens: [D] int64 of the text that is scored; line ends count
        as words.
      nats: condition -> [D] float64, the loss. overlap: the sums by r(C); None without neighbours.
    """

    source: Mapping[str, Any]
    corpora: np.ndarray
    bytes: np.ndarray
    words: np.ndarray
    tokens: np.ndarray
    nats: Mapping[str, np.ndarray]
    overlap: OverlapSums | None = None

    @property
    def conditions(self) -> list[str]:
        """The conditions in the order in which they are shown."""
        return sorted(self.nats, key=condition_order)

    def is_of(self, source: Mapping[str, Any]) -> bool:
        """Whether these are the sums of a source, whose files need not be hashed."""
        return _names(self.source) == _names(source)

    def has(self, result: Mapping[str, Any]) -> bool:
        """Whether one result of launch.evaluate is among them."""
        condition = self.source["conditions"].get(result["condition"], {})
        return condition.get("nll") == result["nll"]


def documents_file(folder: pathlib.Path, split: str) -> pathlib.Path:
    """Where the sums of a split are, in W/evaluation."""
    return folder / f"{split}-documents.npz"


def sum_documents(
    nats: Mapping[str, np.ndarray],
    documents: np.ndarray,
    *,
    tokens: np.ndarray,
    records: Mapping[int, SizedDocument],
    source: Mapping[str, Any],
    overlap: OverlapSums | None = None,
) -> ScoredText:
    """Sums chunks by document.

    Args:
      nats: condition -> [n] float64, the loss of each chunk's text.
      documents: [n] number of the document of each chunk. tokens: [n] that are scored.
      records: the documents by number. source, overlap: see ScoredText.
    """
    numbers, owner = np.unique(documents, return_inverse=True)
    sized_documents = [records[number] for number in numbers.tolist()]
    return ScoredText(
        source,
        corpora=np.array([record.corpus for record in sized_documents]),
        bytes=np.array([record.bytes for record in sized_documents], np.int64),
        words=np.array([record.words + record.lines for record in sized_documents], np.int64),
        tokens=np.bincount(owner, tokens).astype(np.int64),
        nats={name: np.bincount(owner, values) for name, values in nats.items()},
        overlap=overlap,
    )


def write_scored_text(path: pathlib.Path, scored: ScoredText) -> None:
    """Writes the sums, whole or not at all; equal sums give equal bytes."""
    names = scored.conditions
    about: dict[str, Any] = {"format": _FORMAT, "source": scored.source}
    arrays = {name: getattr(scored, name) for name in ("corpora", "bytes", "words", "tokens")}
    arrays["nats"] = np.stack([scored.nats[name] for name in names])
    if scored.overlap is not None:
        sums = scored.overlap
        about["overlap"] = {"chunk_length": sums.chunk_length, "neighbours": sums.neighbours}
        arrays |= {f"overlap_{n}": getattr(sums, n) for n in ("thresholds", "chunks", "bytes")}
        arrays["overlap_bits"] = np.stack([sums.bits[name] for name in names])
    buffer = io.BytesIO()
    np.savez(buffer, about=np.array(json.dumps(about, sort_keys=True)), **arrays)
    files.write_atomically(path, buffer.getvalue())


def read_scored_text(path: pathlib.Path) -> ScoredText:
    """Reads the sums.

    Raises:
      UserError: the file is damaged, or of another format.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays["about"]))
        if about["format"] != _FORMAT:
            raise UserError(f"{path} has format {about['format']!r}: expected {_FORMAT}")
        return _scored_text(about, arrays)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: move it away and run launch.evaluate again") from error


def _scored_text(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> ScoredText:
    """The sums in the arrays of a file."""
    names = sorted(about["source"]["conditions"], key=condition_order)
    overlap = None
    if "overlap" in about:
        overlap = OverlapSums(
            **about["overlap"],
            corpora=arrays["corpora"],
            thresholds=arrays["overlap_thresholds"],
            chunks=arrays["overlap_chunks"],
            bytes=arrays["overlap_bytes"],
            bits=dict(zip(names, arrays["overlap_bits"], strict=True)),
        )
    return ScoredText(
        about["source"],
        corpora=arrays["corpora"],
        bytes=arrays["bytes"],
        words=arrays["words"],
        tokens=arrays["tokens"],
        nats=dict(zip(names, arrays["nats"], strict=True)),
        overlap=overlap,
    )


def _names(source: Mapping[str, Any]) -> dict[str, Any]:
    """A source without the hashes of its files, whose names have one already."""
    conditions = {name: each["nll"] for name, each in source["conditions"].items()}
    return {**source, "conditions": conditions}


@dataclasses.dataclass(frozen=True)
class TokenGains:
    """The gain from retrieval on each token of n chunks of M.

    Attributes:
      gains: [n, M] bits that it saved; 0 for tokens that are not scored.
      counted: [n, M] bool, the tokens that are scored. bits: [n] of the chunk without retrieval.
    """

    gains: np.ndarray
    counted: np.ndarray
    bits: np.ndarray


def token_gains(on: np.ndarray, off: np.ndarray, counted: np.ndarray) -> TokenGains:
    """Compares losses in nats [n, M] with and without retrieval; counted as in TokenGains."""
    gains = np.where(counted, (off - on) / math.log(2), 0.0)
    bits = np.where(counted, off, 0.0).sum(axis=1) / math.log(2)
    return TokenGains(gains, counted, bits)
