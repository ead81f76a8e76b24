"""Conditions of scoring: which model, and which neighbours it is given.

baseline      the transformer of equal decoder
off, on       RETRO without neighbours, and with those that were retrieved
random        with random chunks of the retrieval database: the worth of any text beside it
oracle        with the neighbours of the predicted chunk, which no model could know: a bound
k_4           as on, with 4 neighbours; all such conditions are scored in one pass
context       retrieval off, with the neighbours before the text (--retrieval=in_context); context_4
              with 4 of them; context+random with random ones (--retrieval=random_in_context)
database_0.1  as on, from a tenth of the retrieval database's documents (smaller shares are part
              of larger ones)
tokens        as on, mixed with the votes of the token memory (launch/evaluation/tokens.py);
              baseline+tokens and context+tokens are baseline and context with it
knn, on+knn   kNN-LM on the baseline and on RETRO[ON] (launch/evaluation/knn.py); knn+tokens and
              on+knn+tokens are these with the token memory
ngrams_0.5    as on, without neighbours that contain more than half of the 13-grams of the chunk
              and the one after it
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.batches.batches import keep_part
from data_pipelines.evaluation import database_share
from data_pipelines.evaluation.neighbour_choice import (
    NeighbourTokens,
    oracle_neighbours,
    random_neighbours,
    unlike_neighbours,
)
from data_pipelines.evaluation.splits import Split
from data_pipelines.token_memory.memory import LONGEST, MOST_VOTES
from launch.runs import trained_run
from retro_jax.evaluate import overlap
from retro_jax.evaluate.conditions import MIXED_WITH_TOKENS
from retro_jax.evaluate.scorer import ScoredModel
from retro_jax.retrofit.kept_states import kept_of

TOKENS, KNN = "tokens", "knn"
TUNING_CHUNKS = 1024  # of the validation split, by which a token mixture is tuned
IN_CONTEXT, RANDOM_IN_CONTEXT = "in_context", "random_in_context"
KINDS = ("on", "off", "random", "oracle", IN_CONTEXT, RANDOM_IN_CONTEXT, TOKENS)  # of --retrieval
_CONTEXTS = {IN_CONTEXT: "context", RANDOM_IN_CONTEXT: "context+random"}

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
    by_context = [Condition(f"context_{n:g}", retro, int(n), "context", n) for n in in_context]
    return by_count + by_share + by_context


def asked_condition(name: str, retro: trained_run.Run, k: int) -> Condition:
    """The condition of a name of --retrieval, with k neighbours where it has some."""
    if name in _CONTEXTS:
        return Condition(_CONTEXTS[name], retro, k, "context")
    return Condition(name, retro, k if name != "off" else 0, name)


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
    if is_in_context(condition):  # the base reads them, not what was trained
        return whole
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
    if is_random(condition):
        return random_neighbours(split, k)
    if condition.kind == "oracle":
        return oracle_neighbours(split, k)
    if condition.kind == "ngrams":
        grams = overlap.shared_ngrams
        return unlike_neighbours(split, k, limit=condition.value, size=_GRAM, shared_ngrams=grams)
    return lambda ids: split.neighbours(ids, k)


def is_in_context(condition: Condition) -> bool:
    """Whether neighbours are before the text, whole."""
    return MIXED_WITH_TOKENS.get(condition.name, condition.kind) == "context"


def is_random(condition: Condition) -> bool:
    """Whether neighbours are random chunks, which nothing looks up."""
    return condition.kind == "random" or condition.name == _CONTEXTS[RANDOM_IN_CONTEXT]


def uses_knn(condition: Condition) -> bool:
    """Whether kNN-LM is a part of a condition."""
    return KNN in condition.name.split("+")


def condition_settings(condition: Condition) -> dict[str, Any]:
    """A result's facts about a condition beyond its number of neighbours."""
    whole = is_in_context(condition) and condition.run.batches.neighbour_part != "both"
    facts: dict[str, Any] = {"neighbours_are": "whole"} if whole else {}
    if condition.kind == "database":
        facts["database_share"] = condition.value
    if condition.kind == "ngrams":
        facts |= {"ngram_limit": condition.value, "ngram": _GRAM}
    if condition.kind == TOKENS:
        facts |= {"longest_ending": LONGEST, "most_votes": MOST_VOTES}
        facts["tuning_chunks"] = TUNING_CHUNKS
    if is_random(condition):
        facts["neighbours_are"] = "random"
    if condition.kind == "oracle":
        facts["neighbours_are"] = "oracle"
    return facts
