"""The small-scale reproduction: every run and figure of docs/generated/code_small.md.

    python -m launch.results --workdir=W
    python -m launch.results --workdir=W --ablations=chunk_only,cca_first_layer --docs=docs/generated/code_small.md
    python -m launch.results --workdir=W --ablations=norm_conditioning,no_query_conditioning --seeds=3
    python -m launch.results --workdir=W --gin_file=experiments/quickstart.gin --headline --seeds=5

Prepares the data of experiments/code_small.gin. Trains and scores a RETRO, its baseline and the
ablations of experiments/ablations, each in its own directory on the same data. Writes W/results.md:
baseline, OFF, ON, the sweeps, kNN-LM, figures by overlap with the training data, and which signs of
the paper's ablations were reproduced. After a stop at any point, the same command resumes. With
--docs, the part of that file between its two markers is replaced.

--seeds=5 trains and scores both models and every ablation with four further seeds, in W/seeds.
--headline scores baseline, OFF and ON alone, and trains no ablation unless --ablations names some.
--num_neighbours=4 scores every model with that number, whatever it was trained with, and
--retrieval=on,off,oracle,tokens under these conditions.
Ablations are of experiments/code_small.gin, and refused with another --gin_file. They are trained in the
given order, or those that cost most in the paper first.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from data_pipelines.batches.batches import BatchConfig
from data_pipelines.retriever.neighbours import NeighboursConfig
from launch.common import app, configurables, experiments
from launch.common.flags import NUM_NEIGHBOURS, RETRIEVAL
from launch.evaluation.conditions import KINDS
from launch.quickstart import run_steps
from retro_jax.errors import UserError
from retro_jax.report import published
from retro_jax.report.generated_part import replaced
from retro_jax.report.seed_files import results_text
from retro_jax.storage import files

ABLATIONS = flags.DEFINE_list("ablations", None, "Which to train. Default: all; '' for none.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of each model.", lower_bound=1)
HEADLINE = flags.DEFINE_bool("headline", False, "Baseline, OFF and ON alone.")
DOCS = flags.DEFINE_string("docs", None, "A Markdown file of which the marked part is replaced.")

_GIN_FILE = "experiments/code_small.gin"
_FOLDER = "experiments/ablations"
_SPLIT = "test"
_SWEPT = (1, 2, 3, 4, 5, 10)
_EVALUATION = [
    "--retrieval=on,off,random,oracle",
    f"--sweep={','.join(map(str, _SWEPT))}",
    "--database_shares=0.01,0.1,0.5",
    "--ngram_limits=0",
    "--knn",
]
_HEADLINE = ["--retrieval=on,off"]
_FURTHER = ", ".join(name for name in KINDS if name != "on")


def main() -> None:
    """Runs the missing steps, and writes the figures."""
    workdir = app.required(app.WORKDIR, "the directory of all runs")
    gin_file = configurables.GIN_FILE.value or _GIN_FILE
    names = ablations([] if HEADLINE.value and ABLATIONS.value is None else ABLATIONS.value)
    if names and gin_file != _GIN_FILE:
        raise UserError(
            f"--gin_file={gin_file}: ablations are of {_GIN_FILE}; expected --ablations="
        )
    if DOCS.value is not None:
        replaced(pathlib.Path(DOCS.value), "")  # fails before hours of work, not after
    wanted = RETRIEVAL.value
    if wanted is not None and ("on" not in wanted or set(wanted) - set(KINDS)):
        raise flags.Error(f"--retrieval={','.join(wanted)}: expected on and some of {_FURTHER}")
    whole, scored = (False, _HEADLINE) if HEADLINE.value else (True, _EVALUATION)
    configurables.load(gin_file)
    count = NUM_NEIGHBOURS.value or configurables.make(BatchConfig).neighbours
    tuned = whole or "tokens" in (
        wanted or ()
    )  # on validation; kNN-LM reads the training split too
    needed = {"train": count * whole, "validation": count * tuned}
    needed["test"] = max(count, _SWEPT[-1] * whole)
    configurables.make(NeighboursConfig).check_scored(needed)
    every = steps(workdir, gin_file, scored) + seed_steps(workdir, gin_file, names, SEEDS.value)
    run_steps(scored_with(every, NUM_NEIGHBOURS.value, wanted))
    homes = [_home(workdir, seed) for seed in range(SEEDS.value)]
    text = results_text(pathlib.Path(workdir), homes, names, _SPLIT)
    files.write_atomically(pathlib.Path(workdir) / "results.md", text.encode())
    print(f"\nwritten to {workdir}/results.md")
    if DOCS.value is not None:
        path = pathlib.Path(DOCS.value)
        files.write_atomically(path, replaced(path, text).encode())
        print(f"written into {path}")


def ablations(wanted: Sequence[str] | None) -> list[str]:
    """The names of the ablations to train, in order.

    Raises:
      flags.Error: one that does not exist.
    """
    choices = sorted(path.stem for path in (experiments.FOLDER / "ablations").glob("*.gin"))
    for name in wanted or []:
        if name and name not in choices:
            raise flags.Error(f"--ablations={name}: expected some of {', '.join(choices)}")
    if wanted is None:
        return sorted(choices, key=published.ablation_loss, reverse=True)
    return [name for name in wanted if name]


def steps(
    workdir: str, gin_file: str, scored: Sequence[str] = _EVALUATION
) -> list[tuple[str, list[str]]]:
    """The description of each step of the first seed, and its module and arguments."""
    where, settings = f"--workdir={workdir}", f"--gin_file={gin_file}"
    return [
        ("Text to chunks, keys, index and neighbours", ["launch.prepare", settings, where]),
        ("Train the RETRO", ["launch.train", settings, where]),
        ("Train the baseline", ["launch.train", settings, where, "--baseline"]),
        ("Score every condition", ["launch.evaluate", where, *scored]),
        ("Write the report", ["launch.report", where]),
    ]


def seed_steps(
    workdir: str, gin_file: str, names: Sequence[str], count: int
) -> list[tuple[str, list[str]]]:
    """The steps of seeds 1 to count - 1 on the data of W, then each ablation with all seeds."""
    commands = []
    for seed in range(1, count):
        where = [f"--workdir={_home(workdir, seed)}", f"--data={workdir}"]
        train = ["launch.train", f"--gin_file={gin_file}", *_seed(seed), *where]
        commands.append((f"Train the RETRO of seed {seed}", train))
        commands.append((f"Train the baseline of seed {seed}", [*train, "--baseline"]))
        score = ["launch.evaluate", *where, *_HEADLINE]
        commands.append((f"Score the models of seed {seed}", score))
    for name in names:
        for seed in range(count):
            home = _home(workdir, seed) / "ablations" / name
            where = [f"--workdir={home}", f"--data={workdir}"]
            train = ["launch.train", f"--gin_file={_FOLDER}/{name}.gin", *_seed(seed), *where]
            about = f"the ablation {name}, seed {seed}"
            commands.append((f"Train {about}", train))
            commands.append((f"Score {about}", ["launch.evaluate", *where, *_HEADLINE]))
    return commands


def scored_with(
    commands: Sequence[tuple[str, list[str]]], count: int | None, conditions: Sequence[str] | None
) -> list[tuple[str, list[str]]]:
    """The steps with other settings of every score; None for those that they have.

    Args:
      commands: of `steps` and `seed_steps`. count: neighbours. conditions: those of --retrieval.
    """
    more = [] if count is None else [f"--num_neighbours={count}"]
    if conditions:
        more.append(f"--retrieval={','.join(conditions)}")

    def changed(command: list[str]) -> list[str]:
        if command[0] != "launch.evaluate":
            return command
        kept = [each for each in command if not (conditions and each.startswith("--retrieval="))]
        return [*kept, *more]

    return [(about, changed(command)) for about, command in commands]


def _home(workdir: str | pathlib.Path, seed: int) -> pathlib.Path:
    """Where the models of a seed are."""
    return pathlib.Path(workdir, *(("seeds", str(seed)) if seed else ()))


def _seed(seed: int) -> list[str]:
    """The bindings of a seed; those of 0 are the settings' own."""
    of = ("TrainConfig", "BatchConfig") if seed else ()
    return [f"--gin_bindings={each}.seed = {seed}" for each in of]


if __name__ == "__main__":
    app.run(main)
