"""Bits per byte of a copier that has a model's own neighbours: what a reader of them could reach.

    python -m launch.evaluate   --workdir=W --retrieval=on,off,oracle
    python -m benchmarks.copier --workdir=W --endings=1,2,3,32

The copier looks in the neighbours of the chunk before for the longest ending of the text that occurs
there, and votes for what follows it. Its votes are mixed with the losses that launch.evaluate wrote, by
weights tuned on one half of the documents and used on the other. An ending of 1 token is what a reader
sees that compares single tokens. "text so far" has the last tokens of the text instead of neighbours,
and "both" has them beside the neighbours.

A second table tells by the length of the ending, and by whether what follows it in the neighbours is the
next token, what each model pays for a token: where a reader does not copy, and where it copies wrongly.
"""

import itertools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import flags

from benchmarks.timing import table
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.splits import Split, open_split
from launch.common import app
from launch.common.flags import DATA, NUM_NEIGHBOURS, SPLIT
from retro_jax.errors import UserError
from retro_jax.evaluate.token_mixture import Votes, mixed_nll, tune_weights
from retro_jax.report.result_files import EVALUATION
from retro_jax.storage.files import read_array, read_json

ENDINGS = flags.DEFINE_list("endings", ["1", "2", "3", "32"], "Tokens of an ending at most.")

__all__ = ["DATA", "NUM_NEIGHBOURS", "SPLIT", "main"]

_BEFORE = 192  # tokens of the text so far: about what a position of a window of 256 sees
_CLASSES = (0, 1, 2, 3, 4, 6, 11)  # the least length of each class of endings
_LONGEST = 32
_NONE = -1  # between passages, and where a passage is padding

_NOTHING = np.zeros((0, 1), np.int32)

Passages = Callable[[int], np.ndarray]  # row of the text -> passages [k, R] that it may copy from


def main() -> None:
    """Prints bits per byte for each model, what is copied from, and the length of endings."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    path = workdir / EVALUATION / f"{SPLIT.value}.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the results of launch.evaluate")
    data = pathlib.Path(DATA.value or workdir)
    split = open_split(data, SPLIT.value, neighbours=NUM_NEIGHBOURS.value or 2)
    mask = split.text_mask(Tokenizer.open(data / "tokenizer").byte_lengths)
    losses = {}
    for name, result in read_json(path).items():
        losses[name] = read_array(workdir / EVALUATION / result["nll"])
        if losses[name].shape != mask.shape:
            raise UserError(
                f"{path} is of other documents: expected all of the {SPLIT.value} split"
            )
    rows, places = [], _places(split)
    for place, (passages, before) in places.items():
        rows += _rows(split, mask, losses, place, passages, before)
    print(table(rows))
    by_length = _by_length(split, mask, losses, next(iter(places.values()))[0])
    print("\nnats of a token by the longest ending in the neighbours, and what follows it there")
    print(table(by_length))


def _endings() -> list[int]:
    """The lengths that the flag names.

    Raises:
      flags.Error: one is no positive number.
    """
    for value in ENDINGS.value:
        if not value.isdigit() or int(value) < 1:
            raise flags.Error(f"--endings={value}: expected whole numbers from 1")
    return sorted({int(value) for value in ENDINGS.value})


def _places(split: Split) -> dict[str, tuple[Passages, int]]:
    """What may be copied from, by name: passages for a row, and tokens of the text before it."""
    assert split.table is not None
    k = NUM_NEIGHBOURS.value or 2
    found, owners = split.table.ids(split.ids, k), split.database.documents(split.ids)

    def of(row: int) -> np.ndarray:
        return split.values(split.ids[[row]], found[[row]])[0]

    def neighbours(row: int) -> np.ndarray:
        return of(row - 1) if row and owners[row - 1] == owners[row] else _NOTHING

    return {
        f"{k} neighbours": (neighbours, 0),
        f"{k} of the oracle": (of, 0),
        "text so far": (lambda row: _NOTHING, _BEFORE),
        "both": (neighbours, _BEFORE),
    }


def _rows(
    split: Split,
    mask: np.ndarray,
    losses: Mapping[str, np.ndarray],
    place: str,
    passages: Passages,
    before: int,
) -> list[dict[str, Any]]:
    """The table's rows of one place: for each model, each corpus."""
    database, records = split.database, split.records()
    tokens, owners = database.chunks(split.ids), database.documents(split.ids)
    owner_of = np.broadcast_to(owners[:, None], mask.shape)[mask]
    corpora = sorted({record.corpus for record in records.values()})
    votes = {
        most: copier_votes(
            tokens, owners, mask, passages, pad_id=database.pad_id, most=most, before=before
        )
        for most in _endings()
    }
    rows = []
    for name, nll in losses.items():
        columns = {"alone": nll[mask]}
        for most, each in votes.items():
            columns[f"endings to {most}"] = cross_tuned(nll[mask], each, owner_of % 2 == 0)
        for corpus in corpora:
            numbers = [n for n, record in records.items() if record.corpus == corpus]
            size = sum(records[number].bytes for number in numbers)
            inside = np.isin(owner_of, numbers)
            bits = {c: nats[inside].sum() / np.log(2) / size for c, nats in columns.items()}
            row = {"copied from": place, "model": name, "corpus": corpus}
            rows.append(row | {column: f"{value:.4f}" for column, value in bits.items()})
    return rows


def _by_length(
    split: Split, mask: np.ndarray, losses: Mapping[str, np.ndarray], passages: Passages
) -> list[dict[str, Any]]:
    """Mean nats of each model by the longest ending that the neighbours have, and of a copier."""
    database = split.database
    tokens, owners = database.chunks(split.ids), database.documents(split.ids)
    votes = copier_votes(tokens, owners, mask, passages, pad_id=database.pad_id, most=_LONGEST)
    columns = {name: nll[mask] for name, nll in losses.items()}
    if "baseline" in losses:
        half = np.broadcast_to(owners[:, None], mask.shape)[mask] % 2 == 0
        columns["baseline and copier"] = cross_tuned(columns["baseline"], votes, half)
    return length_rows(votes, columns)


def length_rows(votes: Votes, columns: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Means of columns [t] by the length of an ending, and by whether the next token follows it."""
    followed = {"right": votes.shares >= 0.99, "wrong": votes.shares <= 0.01}
    followed["some"] = ~(followed["right"] | followed["wrong"])
    rows = []
    for least, most in itertools.pairwise((*_CLASSES, _LONGEST + 1)):
        for name, inside in followed.items():
            here = inside & (votes.lengths >= least) & (votes.lengths < most)
            if here.any():
                shown = f"{least}" if most == least + 1 else f"{least} to {most - 1}"
                row = {"ending": shown, "what follows": name, "count": int(here.sum())}
                rows.append(row | {n: float(nats[here].mean()) for n, nats in columns.items()})
    return rows


def cross_tuned(nll: np.ndarray, votes: Votes, half: np.ndarray) -> np.ndarray:
    """[t] nats of a model mixed with votes, by weights tuned on the other half of the tokens.

    Args:
      nll: [t] of the model. votes: on the same tokens. half: [t] bool, the tokens of one half.
    """
    mixed = np.zeros(len(nll))
    for part in (half, ~half):
        weights = tune_weights(nll[~part], _subset(votes, ~part))
        mixed[part] = mixed_nll(nll[part], _subset(votes, part), weights)
    return mixed


def _subset(votes: Votes, rows: np.ndarray) -> Votes:
    """The votes on some of the tokens."""
    return Votes(*(x[rows] for x in (votes.lengths, votes.counts, votes.agreements, votes.shares)))


def copier_votes(
    tokens: np.ndarray,
    owners: np.ndarray,
    mask: np.ndarray,
    passages: Passages,
    *,
    pad_id: int,
    most: int,
    before: int = 0,
) -> Votes:
    """What follows the longest ending of the text in the passages of each chunk, on the t masked tokens.

    Args:
      tokens: [n, 64] a text's chunks in order. owners: [n] the document of each.
      mask: [n, 64] bool. passages: gives for a row of tokens what it may copy from.
      pad_id: of tokens and passages. most: tokens of an ending that count.
      before: tokens of the text before the chunk, and those of the chunk so far, that it copies from too.
    """
    rows: list[tuple[int, int, float, float]] = []
    for row in range(len(tokens)):
        first = int(np.searchsorted(owners[: row + 1], owners[row]))
        text = tokens[max(first, row - 3) : row + 1].ravel()
        text, chunk = text[text != pad_id].astype(np.int64), tokens[row][tokens[row] != pad_id]
        start = len(text) - len(chunk)
        found = _chunk_votes(text, start, _joined(passages(row), pad_id), most, before)
        rows += [found[i] for i in np.flatnonzero(mask[row])]
    columns = np.array(rows, np.float64).reshape(-1, 4).T
    return Votes(columns[0].astype(int), columns[1].astype(int), columns[2], columns[3])


def _joined(passages: np.ndarray, pad_id: int) -> np.ndarray:
    """Passages [k, R] one after the other, with _NONE between them and for padding."""
    separated = np.pad(passages.astype(np.int64), ((0, 0), (0, 1)), constant_values=pad_id)
    return np.where(separated == pad_id, _NONE, separated).ravel()


def _chunk_votes(
    text: np.ndarray, start: int, source: np.ndarray, most: int, before: int
) -> list[tuple[int, int, float, float]]:
    """Length, votes, agreement and share of text[start:], each by what precedes it."""
    own = max(0, start - before) if before else len(text)
    places = np.concatenate([np.full(len(source) + 1, -1), np.arange(own, len(text))])
    source = np.concatenate([source, [_NONE], text[own:]])
    lengths, found = np.zeros(len(source), np.int64), []
    for at in range(len(text)):
        if at >= start:
            # What follows an ending must be known, and no part of a padded or other passage.
            known = (source[1:] != _NONE) & (places[1:] < at)
            reach = np.where(known, np.minimum(lengths[:-1], most), 0)
            found.append(_vote(reach, source[1:], text[at]))
        grown = np.concatenate([[0], lengths[:-1]]) + 1
        lengths = np.where(source == text[at], grown, 0)
    return found


def _vote(reach: np.ndarray, following: np.ndarray, token: int) -> tuple[int, int, float, float]:
    """The votes of the places that reach furthest."""
    longest = int(reach.max(initial=0))
    if not longest:
        return 0, 0, 0.0, 0.0
    votes = following[reach == longest]
    counts = np.unique(votes, return_counts=True)[1]
    return longest, len(votes), counts.max() / len(votes), float(np.mean(votes == token))


if __name__ == "__main__":
    app.run(main)
