"""Conditions of scoring: which model, and which neighbours it is given.

baseline      the transformer of equal decoder
off, on       RETRO without neighbours, and with those that were retrieved
random        with random chunks of the retrieval database: the worth of any text beside it
oracle        with the neighbours of the predicted chunk, which no model could know: a bound
k_4           as on, with 4 neighbours; all such conditions are scored in one pass
context       retrieval off, with the neighbours before the text (--retrieval=in_context); context_4
              with 4 of them
database_0.1  as on, from a tenth of the retrieval database's documents (smaller shares are part
              of larger ones)
tokens        as on, mixed with the votes of the token memory (launch/evaluation/tokens.py);
              baseline+tokens is the baseline with it
ngrams_0.5    as on, without neighbours that contain more than half of the 13-grams of the chunk
              and the one after it
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from data_pipelines.batches.batches import keep_part
from data_pipelines.corpora import SPLITS
from data_pipelines.evaluation import database_share
from data_pipelines.evaluation.splits import Split
from data_pipelines.token_memory.memory import LONGEST, MOST_VOTES
from launch.runs import trained_run
from retro_jax.errors import UserError
from retro_jax.evaluate import overlap
from retro_jax.evaluate.scorer import ScoredModel
from retro_jax.retrofit.kept_states import kept_of

TOKENS = "tokens"
TUNING_CHUNKS = 1024  # of the validation split, by which a token mixture is tuned
IN_CONTEXT = "in_context"
KINDS = ("on", "off", "random", "oracle", IN_CONTEXT, TOKENS)  # of --retrieval

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


def scored_model(run: trained_run.Run) -> ScoredModel:
    """A run's model, as the scorer takes it."""
    kept = kept_of(run.directory, run.base, run.model, run.execution.kept_states)
    return ScoredModel(
        str(run.directory), run.mesh, lambda mesh: trained_run.load_model(run, mesh), kept
    )


def swept_conditions(
    retro: trained_run.Run,
    k: int,
    *,
    counts: Sequence[float],
    shares: Sequence[float],
    limits: Sequence[float],
    in_context: Sequence[float] = (),
) -> list[Condition]:
    """The conditions that vary RETRO[ON]: by k, by database, by the neighbours that are dropped.

    Args:
      retro: the model. k: neighbours a chunk, of those that do not vary them.
      counts: of neighbours. shares: of the database. limits: of shared 13-grams.
      in_context: counts of neighbours before the text.
    """
    by_count = [Condition(f"k_{count:g}", retro, int(count), "k", count) for count in counts]
    by_share = [Condition(f"database_{s:g}", retro, k, "database", s) for s in shares]
    by_share += [Condition(f"ngrams_{x:g}", retro, k, "ngrams", x) for x in limits]
    return by_count + by_share + [context_condition(retro, int(n), n) for n in in_context]


def context_condition(retro: trained_run.Run, k: int, value: float = 0.0) -> Condition:
    """Retrieval off, with k neighbours before the text; one of several k where a value is given."""
    return Condition(f"context_{k}" if value else "context", retro, k, "context", value)


def passes(conditions: Sequence[Condition]) -> list[list[Condition]]:
    """The conditions as they are scored: those that differ in k alone together, others alone."""
    swept = [c for c in conditions if c.kind == "k"]
    return [[c] for c in conditions if c.kind != "k"] + ([swept] if swept else [])


def neighbour_tokens(
    split: Split, condition: Condition, folder: pathlib.Path, data: pathlib.Path
) -> NeighbourTokens | None:
    """The neighbours of a condition's chunks: for ids [n] (-1 for padding) tokens [n, k, R].

    Args:
      split: opened with enough neighbours. condition: which.
      folder: for tables that had to be made. data: of the prepared data.
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
    """A result's facts about a condition beyond its number of neighbours."""
    if condition.kind == "database":
        return {"database_share": condition.value}
    if condition.kind == "ngrams":
        return {"ngram_limit": condition.value, "ngram": _GRAM}
    if condition.kind == TOKENS:
        return {"longest_ending": LONGEST, "most_votes": MOST_VOTES, "tuning_chunks": TUNING_CHUNKS}
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
    """The first k of the table's neighbours that share few 13-grams with their chunk and its successor."""
    assert split.table is not None and split.retrieval is not None
    table, database, retrieval = split.table, split.database, split.retrieval
    ignored = {database.pad_id, database.bos_id, database.eos_id}

    def read(ids: np.ndarray) -> np.ndarray:
        neighbours = table.ids(np.maximum(ids, 0), table.k)
        shares = overlap.shared_ngrams(
            database.values(ids), retrieval.values(neighbours), ignored, _GRAM
        )
        mask = (neighbours >= 0) & (shares <= condition.value)
        order = np.argsort(~mask, axis=1, kind="stable")[:, : condition.neighbours]
        subset = np.take_along_axis(np.where(mask, neighbours, -1), order, axis=1)
        return split.values(ids, subset)

    return read


def check_split(split: Split, conditions: Sequence[Condition]) -> None:
    """Refuses shares of the database for its own documents, or for tables not made by keys.

    Raises:
      UserError: the database's own split, or a table of BM25, with --database_shares.
    """
    shares = any(condition.kind == "database" for condition in conditions)
    if shares and split.table is not None and split.table.retriever != "dense":
        raise UserError(
            f"--database_shares: {split.table.directory} was made by the retriever"
            f" {split.table.retriever!r}: expected 'dense'"
        )
    is_database = split.retrieval and split.retrieval.manifest.hash == split.database.manifest.hash
    if is_database and shares:
        others = ", ".join(name for name in SPLITS if name != "train")
        raise UserError(f"--database_shares of the training split itself: expected {others}")
