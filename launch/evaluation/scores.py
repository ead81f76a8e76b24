"""The sums of scores by document: read where launch.evaluate left them, else made."""

import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.sample import sampled
from data_pipelines.evaluation.splits import Split, open_split
from retro_jax.errors import UserError
from retro_jax.evaluate import overlap
from retro_jax.evaluate.conditions import condition_order
from retro_jax.evaluate.scored_text import (
    ScoredText,
    documents_file,
    read_scored_text,
    sum_documents,
    write_scored_text,
)
from retro_jax.evaluate.uncertainty import compare
from retro_jax.report.result_files import read_losses
from retro_jax.storage import files
from retro_jax.storage.files import read_array, write_array

_BLOCK = 4096  # chunks whose neighbours are in memory at once


def keep_scores(
    folder: pathlib.Path,
    results: Mapping[str, Any],
    *,
    split: Split,
    text: np.ndarray,
    lengths: np.ndarray,
) -> ScoredText:
    """The sums of results by condition, written beside them unless they are there.

    Args:
      folder: W/evaluation. results: of launch.evaluate. split: with its table, for r(C).
      text: [n, 64] bool, the tokens that are scored. lengths: [V] bytes of each token.
    """
    path = documents_file(folder, split.name)
    if path.is_file():
        stored = read_scored_text(path)
        if stored.is_of(_source(split, results)):
            return stored
    scored = sum_scores(folder, results, split=split, text=text, lengths=lengths)
    write_scored_text(path, scored)
    return scored


def scores_of(folder: pathlib.Path, result: Mapping[str, Any], data: pathlib.Path) -> ScoredText:
    """The sums of one result; made from its array and the data where no file has them.

    Args:
      folder: W/evaluation. result: of launch.evaluate. data: of the prepared data.

    Raises:
      UserError: the sums are not there, and the data has other chunks.
    """
    settings = result["settings"]
    path = documents_file(folder, settings["split"])
    if path.is_file():
        stored = read_scored_text(path)
        if stored.has(result):
            return stored
    split = open_split(
        data, settings["split"], neighbours=0, max_documents=settings["max_documents"]
    )
    tokenizer = Tokenizer.open(data / "tokenizer")
    if "sample_chunks" in settings:
        split = sampled(split, settings["sample_chunks"], tokenizer)
    if split.database.manifest.hash != result["manifests"]["chunks"]:
        raise UserError(f"{data} holds other chunks than were scored: expected --data")
    lengths = tokenizer.byte_lengths
    results = {result["condition"]: result}
    text = split.text_mask(lengths)
    return sum_scores(folder, results, split=split, text=text, lengths=lengths)


def compare_results(
    data: pathlib.Path, found: Sequence[tuple[pathlib.Path, Mapping[str, Any]]]
) -> dict[str, Any]:
    """Bits per byte of two results, the difference, its interval and the p-value.

    Args:
      data: of the prepared data, for results without sums by document. found: W/evaluation and the
        result of the two.

    Raises:
      UserError: they do not score the same text.
    """
    return compare([(result, scores_of(folder, result, data)) for folder, result in found])


def _source(split: Split, results: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of sums; the hashes of the files are missing."""
    first = next(iter(results.values()))
    return {
        "split": split.name,
        "max_documents": first["settings"]["max_documents"],
        "chunks": split.database.manifest.hash,
        "neighbours": split.table.manifest.hash if split.table is not None else None,
        "conditions": {name: {"nll": result["nll"]} for name, result in results.items()},
    }


def sum_scores(
    folder: pathlib.Path,
    results: Mapping[str, Any],
    *,
    split: Split,
    text: np.ndarray,
    lengths: np.ndarray,
) -> ScoredText:
    """Sums the arrays of results by document; arguments as `keep_scores` takes them."""
    tokens, owners = split.database.chunks(split.ids), split.database.documents(split.ids)
    source, nats = _source(split, results), {}
    for name in sorted(results, key=condition_order):
        path = folder / results[name]["nll"]
        nll = read_losses(folder, results[name])
        if nll.shape != tokens.shape:
            raise UserError(
                f"{path} is of other chunks: move it away and run launch.evaluate again"
            )
        nats[name] = np.where(text, nll.astype(np.float64), 0.0).sum(axis=1)
        source["conditions"][name]["sha256"] = files.measure(path)[1]
    records, by_overlap = split.records(), None
    if split.table is not None:
        corpora = np.array([records[number].corpus for number in owners.tolist()])
        size = np.where(text, lengths[tokens], 0).sum(axis=1)
        bits = {name: values / math.log(2) for name, values in nats.items()}
        runs, k = _runs(folder, split, tokens)
        chunks = overlap.ScoredChunks(bits, size, owners, corpora, runs, tokens.shape[1])
        by_overlap = overlap.overlap_sums(chunks, k)
    return sum_documents(
        nats, owners, tokens=text.sum(axis=1), records=records, source=source, overlap=by_overlap
    )


def _runs(folder: pathlib.Path, split: Split, tokens: np.ndarray) -> tuple[np.ndarray, int]:
    """[n] the longest shared runs, read where they are there already, and the neighbours looked at."""
    assert split.table is not None
    k = min(overlap.NEIGHBOURS, split.table.k)
    database = split.database
    ignored = {database.pad_id, database.bos_id, database.eos_id}
    digest = hashlib.sha256(split.ids.tobytes()).hexdigest()
    path = folder / f"{split.name}-runs-{k}-{split.table.manifest.hash[:12]}-{digest[:12]}.npy"
    if path.is_file():
        return read_array(path), k
    runs = np.zeros(len(tokens), np.int64)
    for first in range(0, len(tokens), _BLOCK):
        here = slice(first, first + _BLOCK)
        near = split.neighbours(split.ids[here], k)
        runs[here] = overlap.longest_shared_runs(tokens[here], near, ignored)
    write_array(path, runs)
    return runs, k
