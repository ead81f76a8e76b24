"""What each condition costs a token: operations of the model and of its look-ups, bytes of memory."""

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.evaluation.lookup_cost import (
    NEIGHBOUR_LENGTH,
    LookupCost,
    condition_cost,
    datastore_cost,
)
from data_pipelines.retriever.datastore import plan_datastore
from launch.evaluation.conditions import TOKENS, Condition, is_in_context, is_random, uses_knn
from launch.evaluation.results import Work
from launch.evaluation.settings import EvaluationSettings
from retro_jax.evaluate.conditions import MIXED_WITH_TOKENS
from retro_jax.model.flops import forward_flops, in_context_flops
from retro_jax.retrofit.kept_states import state_bytes

_LOOKUP = ("lookup_operations", "bytes_read", "bytes_kept", "memory_bytes", "memory_tokens")


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
    """Figures a token; those of look-ups are None where parts of the database are not there."""
    model, store = condition.run.model, LookupCost()
    length = settings.windows(condition.run.chunks).chunks * model.chunk_length
    in_context = is_in_context(condition)
    form = "" if in_context else condition.run.execution.kept_states
    operations = forward_flops(model, length, condition.neighbours, kept=bool(form)).total
    if in_context:
        # A row of neighbours and text for each chunk that is read out.
        row = condition.neighbours * NEIGHBOUR_LENGTH + max(length, 2 * model.chunk_length)
        operations = in_context_flops(model, row).total
    if uses_knn(condition):
        facts = results[MIXED_WITH_TOKENS.get(condition.name, condition.name)]["knn"]
        count, knn = facts["datastore_tokens"], settings.knn
        plan = plan_datastore(count, model.d_model, knn.neighbours, exact=knn.exact)
        store = datastore_cost(count, model.d_model, plan, work.split.database)
    lookup = condition_cost(
        work.data,
        work.revision,
        neighbours=condition.neighbours,
        share=condition.value if condition.kind == "database" else 1.0,
        searched=not is_random(condition),
        states=state_bytes(model, form) if form else 0,
        tokens=condition.kind == TOKENS,
        beside=store,
    )
    found: list[float | None] = [None] * len(_LOOKUP)
    if lookup is not None:
        each = lookup.bytes_kept / lookup.tokens if lookup.tokens else 0.0
        found = [lookup.operations, lookup.bytes_read, each, lookup.bytes_kept, lookup.tokens]
    return {"operations": operations, **dict(zip(_LOOKUP, found, strict=True))}
