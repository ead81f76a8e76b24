"""What each condition costs a token: operations of the model and of its look-ups, bytes of memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.evaluation.lookup_cost import (
    LookupCost,
    datastore_cost,
    neighbour_cost,
    token_memory_cost,
)
from data_pipelines.retriever.retrieval_database import Database
from data_pipelines.retriever.retriever import Ranking
from data_pipelines.retriever.revisions import open_database
from data_pipelines.token_memory.workdir_memory import prepare_and_open
from launch.evaluation.conditions import TOKENS, Condition, uses_knn
from launch.evaluation.knn import plan_of
from launch.evaluation.results import Work
from launch.evaluation.settings import EvaluationSettings
from retro_jax.errors import UserError
from retro_jax.evaluate.conditions import MIXED_WITH_TOKENS
from retro_jax.model.flops import forward_flops


def with_costs(
    work: Work,
    settings: EvaluationSettings,
    conditions: Sequence[Condition],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    """The results by name, each with its "cost"."""
    costs = {c.name: _cost(work, settings, c, results) for c in conditions if c.name in results}
    return {name: {**result, "cost": costs[name]} for name, result in results.items()}


def _cost(
    work: Work, settings: EvaluationSettings, condition: Condition, results: Mapping[str, Any]
) -> dict[str, float | None]:
    """Figures a token; None where the parts of the database that are looked up are not there."""
    model = condition.run.model
    length = settings.windows(condition.run.chunks).chunks * model.chunk_length
    operations = forward_flops(model, length, condition.neighbours).total
    try:
        lookup = _lookup(work, settings, condition, results)
    except UserError:
        names = ("lookup_operations", "bytes_read", "bytes_kept", "memory_bytes", "memory_tokens")
        return {"operations": operations} | dict.fromkeys(names)
    return {
        "operations": operations,
        "lookup_operations": lookup.operations,
        "bytes_read": lookup.bytes_read,
        "bytes_kept": lookup.bytes_kept / lookup.tokens if lookup.tokens else 0.0,
        "memory_bytes": lookup.bytes_kept,
        "memory_tokens": lookup.tokens,
    }


def _lookup(
    work: Work, settings: EvaluationSettings, condition: Condition, results: Mapping[str, Any]
) -> LookupCost:
    """All memories of a condition together."""
    cost, k = LookupCost(), condition.neighbours
    if k:
        share = condition.value if condition.kind == "database" else 1.0
        searched = condition.kind != "random"
        database, ranking = Database.open(work.data), Ranking.of(work.data)
        cost += neighbour_cost(database, ranking, k, share=share, searched=searched)
    if condition.kind == TOKENS:
        cost += token_memory_cost(prepare_and_open(open_database(work.data)))
    if uses_knn(condition):
        facts = results[MIXED_WITH_TOKENS.get(condition.name, condition.name)]["knn"]
        count, width = facts["datastore_tokens"], condition.run.model.d_model
        plan = plan_of(count, width, settings.knn)
        cost += datastore_cost(
            count, width, plan, 2 if work.split.database.vocab_size <= 1 << 16 else 4
        )
    return cost
