"""Opens a trained run of a workdir to generate, score and retrieve from Python; no flag, no gin.

from launch.runs.text_generator import Generator

generator = Generator.open("W")
"""

import pathlib

from flax import nnx

from data_pipelines.artefacts.manifest import Manifest, Path
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.retriever.live_database import LiveDatabases
from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.generate.text_generator import TextGenerator
from retro_jax.storage import files
from retro_jax.train import trained_model
from retro_jax.train.checkpoint import CHECKPOINTS
from retro_jax.train.record import CONFIG_FILE, PARENTS_FILE, read_settings


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
        folder = pathlib.Path(workdir) / run
        if not (folder / CONFIG_FILE).is_file():
            raise UserError(f"{folder} has no {CONFIG_FILE}: expected a trained model")
        text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
        retro, batches = read_settings(text, RetroConfig), read_settings(text, BatchConfig)
        execution = read_settings(text, ExecutionConfig)
        data = pathlib.Path(workdir if database is None else database)
        _check_tokens(folder, data)
        step, graphdef, params = trained_model.load_model(
            folder / CHECKPOINTS, retro, execution, averaged=averaged
        )
        databases = None
        if retro.has_retrieval and batches.neighbours:
            part = batches.neighbour_part
            databases = LiveDatabases(data, revision, model=bert_folder, part=part)
        return cls(
            nnx.merge(graphdef, params),
            Tokenizer.open(data / "tokenizer"),
            chunks=batches.sequence_length // retro.chunk_length,
            databases=databases,
            neighbours=batches.neighbours,
            name=f"{run}-{step}",
        )


def _check_tokens(run: pathlib.Path, data: pathlib.Path) -> None:
    """Refuses a database whose chunks are neither the run's own nor of the same tokeniser."""
    recorded = files.read_json(run / PARENTS_FILE).get("chunks/train", "(none)")
    chunks = Manifest.read(data / "chunks" / "train")
    own = run.parent / "tokenizer"
    same = own.is_dir() and Manifest.read(own).hash == chunks.parents.get("tokenizer")
    if chunks.hash != recorded and not same:
        raise UserError(
            f"{run} and {data / 'chunks' / 'train'} do not belong together: expected chunks"
            f" {recorded[:12]}, or others of {own}; found {chunks.hash[:12]}"
        )
