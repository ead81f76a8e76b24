"""Opens a trained run of a workdir to generate, score and retrieve from Python; no flag, no gin."""

import functools
import pathlib

from data_pipelines.artefacts.manifest import Path
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.live.database import LiveDatabases, tokenizer_for
from retro_jax.evaluate.token_mixture import tuned_weights
from retro_jax.generate.text_generator import TextGenerator
from retro_jax.train.record import read_settings
from retro_jax.train.trained_model import open_trained


class Generator(TextGenerator):
    """A TextGenerator of a workdir."""

    @classmethod
    def open(
        cls,
        workdir: Path,
        *,
        database: Path | None = None,
        revision: int | None = None,
        run: str = "retro",
        averaged: bool = False,
        bert_folder: str | None = None,
    ) -> "Generator":
        """Opens the newest checkpoint of W/retro.

        Args:
          workdir: W.
          database: the prepared workdir whose database is read; None for W's own. One that the run
            was not trained on has to have W's tokeniser.
          revision: of the database; None for the newest.
          run: "retro" or "baseline". averaged: the moving average of the parameters.
          bert_folder: the BERT that made the database's keys, where it is no packaged one.

        Raises:
          UserError: no trained run, no prepared data, or such as do not belong together.
        """
        folder, data = pathlib.Path(workdir), workdir if database is None else database
        trained = open_trained(folder / run, averaged=averaged)
        tokenizer = tokenizer_for(
            data,
            trained_on=trained.parents.get("chunks/train"),
            own=folder / "tokenizer",
            run=folder / run,
        )
        batches, databases = read_settings(trained.settings, BatchConfig), None
        if trained.model.config.has_retrieval and batches.neighbours:
            part = batches.neighbour_part
            databases = LiveDatabases(data, revision, model=bert_folder, part=part)
        return cls(
            trained.model,
            tokenizer,
            chunks=batches.sequence_length // trained.model.config.chunk_length,
            databases=databases,
            neighbours=batches.neighbours,
            name=trained.name,
            weights=functools.partial(tuned_weights, folder / "evaluation", trained.identity),
        )
