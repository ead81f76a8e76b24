"""Writes chunks, neighbours, scores or a model in files that other programs read.

    python -m launch.export --workdir=W --what=chunks --split=train --to=chunks.parquet
    python -m launch.export --workdir=W --what=neighbours --split=test --to=neighbours.arrow
    python -m launch.export --workdir=W --what=scores --split=test --to=scores.parquet
    python -m launch.export --workdir=W --what=model --to=FOLDER

Tables are Parquet (.parquet) or Arrow (.arrow, .feather) by the name of the file. Scores are those that
launch.evaluate wrote last. A model is model.safetensors with config.json, of W/retro or, with
--run=baseline, of W/baseline; retro_jax.train.portable reads it again.
"""

import pathlib

from absl import flags

from data_pipelines.chunk_database.tokenizer import Tokenizer
from data_pipelines.evaluation.export import export_chunks, export_neighbours, export_scores
from data_pipelines.evaluation.splits import open_split
from launch.common import app
from launch.common.flags import AVERAGED, DATA, SPLIT, data_directory
from retro_jax.report.result_files import EVALUATION, read_results
from retro_jax.train.portable import save_portable
from retro_jax.train.trained_model import open_trained

WITHOUT_SETTINGS = True
WHAT = flags.DEFINE_enum(
    "what", None, ["chunks", "neighbours", "scores", "model"], "What is written."
)
TO = flags.DEFINE_string("to", None, "The file; the folder of a model.")
RUN = flags.DEFINE_enum("run", "retro", ["retro", "baseline"], "Whose model.")


def main() -> None:
    """Writes it, and prints a line."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    what = app.required(WHAT, "chunks, neighbours, scores or model")
    to, split = pathlib.Path(app.required(TO, "a file, or the folder of a model")), SPLIT.value
    data = data_directory(DATA.value or workdir)
    if what == "model":
        trained = open_trained(workdir / RUN.value, averaged=AVERAGED.value)
        print(f"{save_portable(to, trained):,} parameters of {trained.name} to {to}")
        return
    if what == "scores":
        folder = workdir / EVALUATION
        results = read_results(folder, split)
        most = {result["settings"]["max_documents"] for result in results.values()}
        opened = open_split(data, split, neighbours=0, max_documents=most.pop())
        mask = opened.text_mask(Tokenizer.open(data / "tokenizer").byte_lengths)
        count = export_scores(results, folder, opened, to, mask)
    else:
        count = (export_chunks if what == "chunks" else export_neighbours)(data, split, to)
    print(f"{count:,} rows of {what} of {split} to {to}")


if __name__ == "__main__":
    app.run(main)
