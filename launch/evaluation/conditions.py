"""What a text is scored under: which model, and which neighbours it is given.

baseline      the transformer of equal decoder
off, on       RETRO without neighbours, and with those that were retrieved
random        with random chunks of the retrieval database: what any text beside it is worth
oracle        with the neighbours of the chunk that is predicted, which no model could know: a bound
k_4           as on, with 4 neighbours; all such conditions are scored in one pass
database_0.1  as on, from a tenth of the retrieval database's documents (smaller shares are part
              of larger ones)
ngrams_0.5    as on, without neighbours that hold more than half of the 13-grams of the chunk and
              the one after it
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.batches.batches import keep_part
from data_pipelines.corpora import SPLITS
from data_pipelines.evaluation import database_share
from data_pipelines.evaluation.splits import Split
from launch.runs import trained_run
from retro_jax.errors import UserError
from retro_jax.evaluate import overlap

KINDS = ("on", "off", "random", "oracle")  # of --retrieval
SWEEP = flags.DEFINE_list("sweep", [], "Also score with so many neighbours each, as in 1,2,5,10.")
DATABASES = flags.DEFINE_list(
    "database_shares", [], "Also retrieve from these shares of the database, as in 0.01,0.1."
)
NGRAMS = flags.DEFINE_list(
    "ngram_limits", [], "Also drop neighbours that hold more than this share of the 13-grams."
)

NeighbourTokens = Callable[[np.ndarray], np.ndarray]
_GRAM = 13


@dataclasses.dataclass(frozen=True)
class Condition:
    """A column of the tables.

    Attributes:
      name: as above. run: the model. neighbours: a chunk's; 0 for retrieval off.
      kind: the name's first part. value: its second part.
    """

    name: str
    run: trained_run.Run
    neighbours: int
    kind: str
    value: float = 0.0


def swept_conditions(retro: trained_run.Run, k: int) -> list[Condition]:
    """The conditions that vary what --retrieval=on is: by k, by database, by what is dropped.

    Args:
      retro: the model. k: neighbours a chunk, of those that do not say.

    Raises:
      flags.Error: a value out of its range.
    """
    found = []
    for count in _numbers("sweep", SWEEP.value, 1, 1000, whole=True):
        found.append(Condition(f"k_{count:g}", retro, int(count), "k", count))
    for share in _numbers("database_shares", DATABASES.value, 0, 1):
        found.append(Condition(f"database_{share:g}", retro, k, "database", share))
    for limit in _numbers("ngram_limits", NGRAMS.value, 0, 1):
        found.append(Condition(f"ngrams_{limit:g}", retro, k, "ngrams", limit))
    return found


def _numbers(
    flag: str, values: Sequence[str], low: float, high: float, *, whole: bool = False
) -> list[float]:
    """The values of a flag, ascending."""
    found = set()
    for value in values:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not low <= number <= high or (whole and number != int(number)):
            kind = "whole numbers" if whole else "numbers"
            raise flags.Error(f"--{flag}={value}: expected {kind} from {low:g} to {high:g}")
        found.add(number)
    return sorted(found)


def passes(conditions: Sequence[Condition]) -> list[list[Condition]]:
    """The conditions as they are scored: those that differ in k alone together, others alone."""
    swept = [c for c in conditions if c.kind == "k"]
    return [[c] for c in conditions if c.kind != "k"] + ([swept] if swept else [])


def neighbour_tokens(
    split: Split, condition: Condition, folder: pathlib.Path, data: pathlib.Path
) -> NeighbourTokens | None:
    """What a condition's chunks are given: for ids [n] (-1 for padding) tokens [n, k, R].

    Args:
      split: opened with enough neighbours. condition: which.
      folder: where a table that had to be made is kept. data: of the prepared data.
    """
    if not condition.neighbours:
        return None
    whole = _whole_neighbours(split, condition, folder, data)
    part, pad_id = condition.run.batches.neighbour_part, split.database.pad_id
    return lambda ids: keep_part(whole(ids), part, pad_id)


def _whole_neighbours(
    split: Split, condition: Condition, folder: pathlib.Path, data: pathlib.Path
) -> NeighbourTokens:
    """As above, each neighbour with both of its parts."""
    k = condition.neighbours
    if condition.kind == "database":
        table = database_share.subsampled(split, condition.value, k, folder=folder, data=data)
        return lambda ids: split.values(ids, table[np.searchsorted(split.ids, np.maximum(ids, 0))])
    makers: dict[str, Callable[[Split, Condition], NeighbourTokens]] = {
        "random": _random,
        "oracle": _oracle,
        "ngrams": _unlike,
    }
    if condition.kind in makers:
        return makers[condition.kind](split, condition)
    return lambda ids: split.neighbours(ids, k)


def condition_settings(condition: Condition) -> dict[str, Any]:
    """What a result says of a condition beyond its number of neighbours."""
    if condition.kind == "database":
        return {"database_share": condition.value}
    if condition.kind == "ngrams":
        return {"ngram_limit": condition.value, "ngram": _GRAM}
    if condition.kind in ("random", "oracle"):
        return {"neighbours_are": condition.kind}
    return {}


def _random(split: Split, condition: Condition) -> NeighbourTokens:
    """Chunks drawn from the whole database as it is now; the same ones for a chunk each time."""
    assert split.retrieval is not None
    shape = (len(split.database), condition.neighbours)
    places = np.random.Generator(np.random.Philox(0)).integers(
        0, split.retrieval.live_chunks, shape
    )
    drawn = split.retrieval.live_ids(places)
    return lambda ids: split.values(ids, drawn[np.maximum(ids, 0)])


def _oracle(split: Split, condition: Condition) -> NeighbourTokens:
    """The neighbours of the chunk that follows in the same document; none for its last chunk."""
    assert split.table is not None
    table, database = split.table, split.database

    def read(ids: np.ndarray) -> np.ndarray:
        following = np.where((ids >= 0) & (ids + 1 < len(database)), ids + 1, -1)
        same = database.documents(following) == database.documents(ids)
        following = np.where(same, following, -1)
        return split.values(following, table.ids(np.maximum(following, 0), condition.neighbours))

    return read


def _unlike(split: Split, condition: Condition) -> NeighbourTokens:
    """The first k of the table's neighbours that hold few of the 13-grams of what they are read for."""
    assert split.table is not None and split.retrieval is not None
    table, database, retrieval = split.table, split.database, split.retrieval
    ignored = {database.pad_id, database.bos_id, database.eos_id}

    def read(ids: np.ndarray) -> np.ndarray:
        found = table.ids(np.maximum(ids, 0), table.k)
        shares = overlap.shared_ngrams(
            database.values(ids), retrieval.values(found), ignored, _GRAM
        )
        kept = (found >= 0) & (shares <= condition.value)
        order = np.argsort(~kept, axis=1, kind="stable")[:, : condition.neighbours]
        chosen = np.take_along_axis(np.where(kept, found, -1), order, axis=1)
        return split.values(ids, chosen)

    return read


def check_split(split: Split, conditions: Sequence[Condition]) -> None:
    """Refuses a part of the database as that of its own documents, or for tables not made by keys.

    Raises:
      UserError: the database's own split, or a table of BM25, with --database_shares.
    """
    shares = any(condition.kind == "database" for condition in conditions)
    if shares and split.table is not None and split.table.retriever != "dense":
        raise UserError(
            f"--database_shares: {split.table.directory} was made by the retriever"
            f" {split.table.retriever!r}: expected 'dense'"
        )
    own = split.retrieval and split.retrieval.manifest.hash == split.database.manifest.hash
    if own and shares:
        others = ", ".join(name for name in SPLITS if name != "train")
        raise UserError(f"--database_shares of the training split itself: expected {others}")
