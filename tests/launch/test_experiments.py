"""experiments/*.gin: every setting loads, and the published sizes are the paper's."""

import pathlib
import re

import pytest

from data_pipelines.batches.batches import BatchConfig
from data_pipelines.chunk_database.database import CHUNK_LENGTH
from data_pipelines.chunk_database.tokenizer import TokenizerConfig
from launch.common import configurables
from retro_jax.config import PRESETS, RetroConfig
from retro_jax.train.loop import TrainConfig
from retro_jax.train.optimizer import OptimizerConfig, learning_rate

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"
RUNS = sorted(path.name for path in FOLDER.glob("*.gin") if path.name != "published.gin")
# The paper's table of sizes: maximum learning rate and sequences a batch.
PUBLISHED = {"172m": (2e-4, 256), "425m": (2e-4, 256), "1.5b": (2e-4, 256), "7.5b": (1e-4, 1024)}

# What the base of an experiment in fitting decides.
OF_SMOLLM2 = {"d_model": 576, "num_layers": 30, "num_heads": 9, "head_dim": 64, "d_ff": 1536}


def bound_text(path: pathlib.Path) -> str:
    """The text of a file and of those that it includes."""
    text = path.read_text()
    included = re.findall("^include '(.*)'", text, re.MULTILINE)
    return "\n".join([text, *(bound_text(path.parent / name) for name in included)])


@pytest.mark.parametrize("name", RUNS)
def test_every_configuration_that_an_experiment_binds_can_be_made(name):
    configurables.load(str(FOLDER / name))
    text = bound_text(FOLDER / name)
    tokenizer = configurables.make(TokenizerConfig)
    made = {"TokenizerConfig": tokenizer}
    for each in set(configurables.TABLE) - {"CorpusConfig"}:  # those are made with DocumentsConfig
        if f"\n{each}." in text:
            open_fields = {"vocab_size": tokenizer.vocab_size} if each == "RetroConfig" else {}
            if each == "RetroConfig" and "RetroConfig.d_model" not in text:
                open_fields |= OF_SMOLLM2  # as launch.retrofit gives them
            made[each] = configurables.make(configurables.configurable(each), **open_fields)
    assert made["DocumentsConfig"].corpora
    if "RetroConfig" in made:
        assert made["RetroConfig"].vocab_size == tokenizer.vocab_size
        assert made["RetroConfig"].chunk_length == CHUNK_LENGTH
        neighbours = made["BatchConfig"].neighbours
        assert neighbours <= made["NeighboursConfig"].train
        assert bool(neighbours) == made["RetroConfig"].has_retrieval


@pytest.mark.parametrize("name", [name for name in RUNS if re.match("facts.gin|.*smollm2", name)])
def test_a_fit_states_the_distance_of_its_figures(name):
    """launch.retrofit's default may change; figures of an experiment then remain its own."""
    assert "\nDecoderForm.neighbour_distance =" in bound_text(FOLDER / name)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_the_papers(size):
    configurables.load(str(FOLDER / f"retro_{size.replace('.', '_')}.gin"))
    assert configurables.make(RetroConfig) == PRESETS[size]
    batches, training = configurables.make(BatchConfig), configurables.make(TrainConfig)
    highest, rows = PUBLISHED[size]
    assert (batches.batch_size, batches.sequence_length, batches.neighbours) == (rows, 2048, 2)
    tokens = training.steps * batches.batch_size * batches.sequence_length
    assert tokens == 419_430_400_000
    rates = learning_rate(configurables.make(OptimizerConfig), training.steps)
    for step, rate in {0: 1e-7, 750: highest, training.steps: highest / 10}.items():
        assert rates(step) == pytest.approx(rate, rel=1e-5)
