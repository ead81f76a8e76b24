"""What a bad batch was made of, for whoever has to find out why."""

import json
import pathlib

from data_pipelines.batches.batches import Batches
from retro_jax.distributed import processes
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step

FILE = "bad_batches.jsonl"
_SHOWN = 3


class Autopsy:
    """Writes the documents of a bad batch to RUN/bad_batches.jsonl and names some of them."""

    def __init__(self, run: pathlib.Path, batches: Batches):
        """Of a run's directory and the batches that it trains on."""
        self._run, self._batches = run, batches

    def __call__(self, step: int) -> str:
        """The batch of a step, counted from 1, and the last good checkpoint, to follow "at step 7"."""
        documents = self._batches.document_ids(step - 1)
        if processes.is_first():
            line = json.dumps({"step": step, "documents": documents}, ensure_ascii=False)
            with open(self._run / FILE, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        shown = ", ".join(map(repr, documents[:_SHOWN]))
        more = f" and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else ""
        good = latest_step(self._run / CHECKPOINTS)
        last = "none" if good is None else str(self._run / CHECKPOINTS / str(good))
        return f" (documents {shown}{more}: {self._run / FILE}); the last good checkpoint is {last}"
