"""Which documents of a database are worth keeping: the bits that each saved on a text.

A chunk's gain by retrieval is divided among the documents of its neighbours. A token's gain by the token
memory belongs to one document that voted for it, or, where none did, to nobody: the cost of a wrong vote
is the mixture's. Of several that say the same, one has the credit, so a copy can go.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.chunk_database.database import ChunkDatabase, DocumentRecord
from data_pipelines.evaluation.splits import Split
from data_pipelines.token_memory.text_votes import TextVotes
from retro_jax.errors import UserError
from retro_jax.report.result_files import read_losses
from retro_jax.storage import files

_OF_TEST = (
    "\n(The test split chose them, so its figures without them say nothing of other texts: expected"
    " --split=validation or train.)"
)


@dataclasses.dataclass(frozen=True)
class Credit:
    """The bits saved by each of D documents.

    Attributes:
      neighbours: [D] by being retrieved; negative where they misled. votes: [D] by voting.
    """

    neighbours: np.ndarray
    votes: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """[D], both together."""
        return self.neighbours + self.votes


def neighbour_credit(gains: np.ndarray, documents: np.ndarray, count: int) -> np.ndarray:
    """[count] bits by document.

    Args:
      gains: [n] bits that retrieval saved on what each chunk's neighbours are read for.
      documents: [n, k] of these neighbours; -1 for none. count: documents of the database.
    """
    there = documents >= 0
    share = gains / np.maximum(there.sum(axis=1), 1)
    spread = np.broadcast_to(share[:, None], documents.shape)
    return np.bincount(documents[there], spread[there], minlength=count)


def vote_credit(gains: np.ndarray, documents: np.ndarray, count: int) -> np.ndarray:
    """[count] bits by document.

    Args:
      gains: [t] bits that the memory saved on each token. documents: [t] one that voted for it; -1.
      count: documents of the database.
    """
    there = documents >= 0
    return np.bincount(documents[there], gains[there], minlength=count)


def least_useful(credit: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """Numbers of the documents to remove, ascending: a share of those that are there, of least credit.

    Of equal credit the larger ones go first.

    Args:
      credit: [D] bits. sizes: [D] chunks; 0 for documents that are gone. share: from 0 to 1.
    """
    live = np.flatnonzero(sizes > 0)
    order = live[np.lexsort((live, -sizes[live], credit[live]))]
    return np.sort(order[: round(share * len(live))])


def removal_list(names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Lines of a file for launch.prepare --remove=@FILE.

    Args:
      names: CORPUS/ID each.

    Returns:
      The lines with their ends, and [n] bool: which names they have. A name with a line's end in it,
      or without an id, is of no line; one that ends as lines of some editors do gets another such
      end, which is cut.
    """
    fit = ["\n" not in name and bool(name.partition("/")[2]) for name in names]
    listed, rest = np.array(fit, bool), [n for n, fits in zip(names, fit, strict=True) if fits]
    return [f"{name}\r\n" if name.endswith("\r") else f"{name}\n" for name in rest], listed


def credited_pairs(conditions: Collection[str]) -> list[tuple[str, str]]:
    """The conditions whose difference is credited to documents: before and after.

    Raises:
      UserError: neither "on" and "off" nor "on" and "tokens" are among them.
    """
    pairs = [pair for pair in (("off", "on"), ("on", "tokens")) if set(pair) <= set(conditions)]
    if not pairs:
        raise UserError("--credit: expected --retrieval=on,off, with tokens or without")
    return pairs


def write_credit(
    folder: pathlib.Path,
    database: ChunkDatabase,
    split: Split,
    text: np.ndarray,
    results: Mapping[str, Any],
    votes: TextVotes | None,
    *,
    share: float,
) -> str:
    """Writes W/evaluation/SPLIT-credit.csv, and SPLIT-remove.txt for launch.prepare --remove.

    SPLIT-credit.json has the hashes of both, and of what they were made from.

    Args:
      folder: W/evaluation. database: that was retrieved from. split: that was scored, with its table.
      text: [n, 64] bool, its tokens that count. results: of launch.evaluate by condition.
      votes: of the database's token memory on the split; None where "tokens" was not scored.
      share: of the documents that the list has, those of least credit.

    Returns:
      A line about both.

    Raises:
      UserError: neither "on" and "off" nor "on" and "tokens" were scored.
    """
    pairs = credited_pairs(results)
    credit = _credit_of(folder, pairs, results, split, text, votes, database.num_documents)
    records = list(database.records())
    sizes = np.array([record.chunks for record in records])
    sizes[database.removed] = 0
    removed = least_useful(credit.total, sizes, share)
    lines, listed = removal_list([f"{records[i].corpus}/{records[i].id}" for i in removed.tolist()])
    unnamed, removed = int((~listed).sum()), removed[listed]
    path = folder / f"{split.name}-remove.txt"
    written = {
        folder / f"{split.name}-credit.csv": _csv(credit, records, sizes),
        path: "".join(lines),
    }
    for file, content in written.items():
        files.write_atomically(file, content.encode())
    about: dict[str, Any] = {
        "database": database.manifest.hash,
        "chunks": split.database.manifest.hash,
    }
    about |= {"share": share, "sha256": {file.name: files.measure(file)[1] for file in written}}
    about["nll"] = {name: results[name]["nll"] for pair in pairs for name in pair}
    files.write_atomically(folder / f"{split.name}-credit.json", files.to_json(about))
    without = f", without {unnamed:,} whose id is no line of text" if unnamed else ""
    helping, live = int(((credit.total > 0) & (sizes > 0)).sum()), int((sizes > 0).sum())
    return (
        f"{helping:,} of {live:,} documents of the database saved bits; {len(lines):,} of least credit,"
        f" {int(sizes[removed].sum()):,} of {int(sizes.sum()):,} chunks{without}: launch.prepare --remove=@{path}"
        f"{_OF_TEST if split.name == 'test' else ''}"
    )


def _csv(credit: Credit, records: Sequence[DocumentRecord], sizes: np.ndarray) -> str:
    """A line for each document that is there, those of least credit first."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["corpus", "id", "chunks", "bits_by_neighbours", "bits_by_votes"])
    for number in np.argsort(credit.total, kind="stable").tolist():
        if sizes[number]:
            record = records[number]
            of_each = [f"{each[number]:.3f}" for each in (credit.neighbours, credit.votes)]
            writer.writerow([record.corpus, record.id, record.chunks, *of_each])
    return table.getvalue()


def _credit_of(
    folder: pathlib.Path,
    pairs: Sequence[tuple[str, str]],
    results: Mapping[str, Any],
    split: Split,
    text: np.ndarray,
    votes: TextVotes | None,
    count: int,
) -> Credit:
    """What each of `count` documents saved between the conditions of each pair; as `write_credit`."""
    bits = [np.zeros(count)] * 2
    for before, after in pairs:
        nats = [read_losses(folder, results[name]) for name in (before, after)]
        gains = np.where(text, nats[0] - nats[1], 0.0) / np.log(2)
        if after == "tokens":
            assert votes is not None
            bits[1] = vote_credit(gains[text], votes.documents, count)
        else:
            k = results[after]["settings"]["neighbours"]
            bits[0] = neighbour_credit(gains.sum(axis=1), split.read_documents(k), count)
    return Credit(*bits)
