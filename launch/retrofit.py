"""Gives an existing language model a memory: fits gates and CCA beside its frozen weights.

    python -m launch.prepare  --gin_file=experiments/fit_smollm2_code.gin --workdir=W
    python -m launch.retrofit --gin_file=experiments/fit_smollm2_code.gin --workdir=W --base=MODEL

MODEL is a Hugging Face folder or a GGUF file; W was prepared with its tokeniser
(TokenizerConfig.base = 'MODEL'). The run is W/retro, with all that launch.train writes and its flags;
launch.evaluate scores it. With retrieval off it is the base, bit for bit.

Unless the settings say otherwise, CCA is in every layer, made of the layer's own weights
(DecoderForm.gated_cca), one softmax reads neighbours and text (DecoderForm.shared_softmax), neighbours are
before the text (DecoderForm.neighbour_distance), and the gates alone are trained, from 0.
StartConfig.trained = ('cca.*',) trains CCA's copies too. DecoderForm.gated_cca = False is the paper's start.

    python -m launch.retrofit --workdir=W --base=MODEL --export=DIRECTORY

writes the additions of W/retro to the base, two files to share; of a run that trains the base itself, with
RetroConfig.cca_layers = (), a Hugging Face folder. Who has base and adapter reads documents of their own:

    python -m launch.retrofit --workdir=V --base=MODEL --adapter=DIRECTORY

V was prepared with the base's tokeniser too. V/retro is the fitted model; nothing is trained. To train on
from an adapter, give StartConfig.adapter = 'DIRECTORY' and TrainConfig.steps instead.
"""

import dataclasses
import pathlib

from absl import flags
from flax import nnx

from data_pipelines.batches.training_data import TrainingData
from data_pipelines.chunk_database.base_tokenizer import check_base_tokenizer, tokenizer_files
from launch import train
from launch.common import app, configurables
from launch.common.flags import BASE
from launch.runs.settings import make_settings
from launch.runs.trained_run import load_model, open_run, refuse_gin_file
from retro_jax.errors import UserError
from retro_jax.host_memory import keep_freed_memory
from retro_jax.retrofit import BaseModel, open_base
from retro_jax.retrofit.adapter import Adapter, export_adapter, open_adapter
from retro_jax.retrofit.decoder import (
    changed_tensors,
    check_decoder,
    decoder_form,
    decoder_settings,
)
from retro_jax.retrofit.saving import save_hugging_face
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.plan import Settings

EXPORT = flags.DEFINE_string(
    "export", None, "Write what W/retro adds to the base, or a trained base, into this directory."
)
ADAPTER = flags.DEFINE_string(
    "adapter", None, "Make W/retro of the base and this adapter, a directory; nothing is trained."
)

HELP_ALSO = ("launch.train",)
_DISTANCE = 192  # where neighbours end before the last chunk of a window of 256 tokens


def main() -> None:
    """Fits, or says that there is nothing left to train; or exports the adapter."""
    if EXPORT.value is not None and ADAPTER.value is not None:
        raise flags.Error("--export and --adapter: expected one of them")
    if EXPORT.value is not None:
        export(pathlib.Path(EXPORT.value))
        return
    train.train(train.RETRO_RUN, settings_of_base, read_as_the_adapter)


def export(directory: pathlib.Path) -> None:
    """Writes the adapter of W/retro into a directory; of a run without CCA the trained model.

    Raises:
      UserError: there is no trained run or no base, or they do not belong together.
    """
    refuse_gin_file()
    run = open_run(pathlib.Path(app.required(app.WORKDIR, "a workdir")) / train.RETRO_RUN)
    base = _base()
    check_decoder(run.model, base)
    if not run.model.has_retrieval:
        changed = changed_tensors(base, named_leaves(load_model(run)[1]))
        save_hugging_face(base, directory, changed, tokenizer_files(base.path))
        print(f"{directory}: {base.path} with {len(changed)} tensors of {run.directory}")
        return
    read = dataclasses.asdict(run.batches)
    size = export_adapter(directory, base, nnx.merge(*load_model(run)), read)
    print(f"{directory}: {size / 1e3:,.1f} kB, what {run.directory} adds to {base.path}")


def read_as_the_adapter() -> None:
    """Binds what gin leaves open to what the run's adapter was trained with, if it has one.

    Raises:
      UserError: there is no such adapter or base, or they do not belong together.
    """
    if ADAPTER.value is not None:
        configurables.override("StartConfig.adapter", ADAPTER.value)
        configurables.override("StartConfig.gates", 0.0)  # they are the adapter's
        configurables.override("TrainConfig.steps", 0)
    if (adapter := _adapter(_base())) is not None:
        length = configurables.bound("BatchConfig.sequence_length", None)
        if not adapter.read and length is None:
            raise UserError(
                f"{adapter.directory} does not say how texts were read: expected"
                " BatchConfig.sequence_length in the settings"
            )
        for field, value in adapter.read.items():
            name = f"BatchConfig.{field}"
            configurables.override(name, configurables.bound(name, value))


def settings_of_base(data: TrainingData) -> Settings:
    """The settings of gin, with those that the data and the base decide.

    Raises:
      UserError: there is no such base, or the tokeniser of the data is another one.
    """
    base = _base()
    tokenizer = check_base_tokenizer(
        data.directory / "tokenizer", base.path, vocab_size=base.config.vocab_size
    )
    configurables.override("StartConfig.base", str(base.path))
    gated = configurables.bound("DecoderForm.gated_cca", True)
    far = _DISTANCE if gated and base.config.positions == "rotary" else 0
    fitted = {"gated_cca": gated, "shared_softmax": gated, "neighbour_distance": far}
    fitted["sink_id"] = tokenizer.fact("bos_id")
    form = decoder_form(base.config, **fitted)
    decoder = decoder_settings(base.config)
    decoder |= {"cca_layers": tuple(range(1, base.config.num_layers + 1)), "form": form}
    if (adapter := _adapter(base)) is not None:
        config = adapter.config
        gated = config.form.gated_cca
        decoder = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    trained = ("cca.gate",) if gated else ("encoder.*", "cca.*")
    return make_settings({"trained": trained}, **{**decoder, "pad_id": data.pad_id})


def _base() -> BaseModel:
    """The model of --base."""
    return open_base(app.required(BASE, "a Hugging Face folder or a .gguf file"))


def _adapter(base: BaseModel) -> Adapter | None:
    """The adapter that the run begins with, as gin has it."""
    place = configurables.bound("StartConfig.adapter", "")
    return open_adapter(place, base) if place else None


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
