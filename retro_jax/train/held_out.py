"""Losses of held-out batches while a run trains, with retrieval on and off."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from retro_jax.batch import RetroBatch
from retro_jax.train.global_batches import BatchSource, global_batch, local_rows
from retro_jax.train.loop import Hook
from retro_jax.train.step import Model, TrainState

ON, OFF = "validation/on", "validation/off"

Evaluate = Callable[[TrainState], dict[str, float]]


def make_evaluation(
    graphdef: nnx.GraphDef, batches: Callable[[], Iterable[RetroBatch]], pad_id: int
) -> Evaluate:
    """Builds the function that the loop calls now and then.

    Args:
      graphdef: of the model. batches: gives the same global batches each time.
      pad_id: RetroConfig.pad_id.

    Returns:
      A function of the state: mean nats per token, by ON (where batches have neighbours) and OFF.
    """

    @jax.jit
    def sums(params: Any, batch: RetroBatch) -> jax.Array:
        model: Model = nnx.merge(graphdef, params)
        present_BxN = batch.targets != pad_id
        losses_BxN = jnp.where(present_BxN, model.token_losses(batch), 0.0)
        return jnp.stack([jnp.sum(losses_BxN), jnp.sum(present_BxN, dtype=jnp.float32)])

    def evaluate(state: TrainState) -> dict[str, float]:
        totals: dict[str, list[jax.Array]] = {}
        for batch in batches():
            if batch.neighbours is not None:
                totals.setdefault(ON, []).append(sums(state.params, batch))
            totals.setdefault(OFF, []).append(sums(state.params, batch.without_neighbours()))
        loss_sums = {name: sum(jax.device_get(parts)) for name, parts in totals.items()}
        return {name: float(loss / max(tokens, 1)) for name, (loss, tokens) in loss_sums.items()}

    return evaluate


def held_out_evaluation(
    graphdef: nnx.GraphDef, batches: BatchSource, mesh: Mesh, *, count: int, pad_id: int
) -> Evaluate:
    """Evaluation on the first `count` batches of a split; each process builds its own rows."""
    size = batches.config.batch_size
    rows = local_rows(mesh, size)

    def made() -> Iterator[RetroBatch]:
        for number in range(count):
            yield global_batch(batches.rows(number, rows), mesh, size, rows)

    return make_evaluation(graphdef, made, pad_id)


def evaluation_hook(
    evaluate: Evaluate, every: int, note: Callable[[dict[str, float]], object]
) -> Hook:
    """A hook of the loop that evaluates.

    Args:
      evaluate: as above. every: steps between evaluations.
      note: receives the losses (Observer.note).
    """

    def call(number: int, state: TrainState) -> None:
        note(evaluate(state))

    return Hook(every, call, phase="evaluation")
