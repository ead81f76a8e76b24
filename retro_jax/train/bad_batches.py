"""Batches whose loss is not finite or jumps: whether the run continues, and their documents."""

import dataclasses
import json
import pathlib
from collections.abc import Callable

from retro_jax.distributed import processes
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step
from retro_jax.train.global_batches import BatchSource

FILE = "bad_batches.jsonl"
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class BadBatches:
    """The response to a bad batch.

    Attributes:
      skip: whether the run continues. describe: reports the documents of a step's
        batch (steps count from 1) and the last good checkpoint.
    """

    skip: bool = False
    describe: Callable[[int], str] = lambda step: ""


def describe_documents(run: pathlib.Path, batches: BatchSource, step: int) -> str:
    """Writes the documents of a step's batch to RUN/bad_batches.jsonl and names a few of them.

    Args:
      run: the run's directory. batches: that it trains on. step: counted from 1.

    Returns:
      The documents and the last good checkpoint, to follow "at step 7".
    """
    documents = batches.document_ids(step - 1)
    if processes.is_first():
        line = json.dumps({"step": step, "documents": documents}, ensure_ascii=False)
        with open(run / FILE, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    shown = ", ".join(map(repr, documents[:_SHOWN]))
    more = f" and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else ""
    good = latest_step(run / CHECKPOINTS)
    last = "none" if good is None else str(run / CHECKPOINTS / str(good))
    return f" (documents {shown}{more}: {run / FILE}); the last good checkpoint is {last}"
