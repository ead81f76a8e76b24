"""Prepares the data of training: corpora in, chunks with their neighbours out.

    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W
    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W --stages=documents,leakage
    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W --runner=ray --ray_address=HOST:6379
    python -m launch.prepare --gin_file=more.gin --workdir=W --append
    python -m launch.prepare --workdir=W --remove=wikipedia/Lobster
    python -m launch.prepare --workdir=W --purge
    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W --materialise=1000
    python -m launch.prepare --workdir=W --questions=NAME=questions.jsonl
    python -m launch.prepare --workdir=W --stats
    python -m launch.prepare --workdir=W --verify

Runs the stages documents, leakage, tokenizer, chunks, duplicates, keys, index, bm25 and neighbours,
those that the settings ask for, each into its own directory of W. Existing parts are not made again;
after an interruption or a kill, the same command resumes. A directory that was made with other
settings is refused, and never deleted.
"""

import functools
import pathlib

from absl import flags

from data_pipelines.artefacts.ray_runner import RayCluster
from data_pipelines.artefacts.runner import InProcess, LocalProcesses, Runner
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.chunk_database.tokenizer import TokenizerConfig
from data_pipelines.documents.documents import DocumentsConfig
from data_pipelines.leakage.near_documents import LeakageConfig
from data_pipelines.questions.prepared import prepare_questions
from data_pipelines.retriever.bm25 import Bm25Config
from data_pipelines.retriever.index_config import IndexConfig
from data_pipelines.retriever.keys import KeysConfig
from data_pipelines.retriever.neighbours import NeighboursConfig
from data_pipelines.workdir import PrepareConfig, compaction, prepare, summary, update, verify
from data_pipelines.workdir.preparation import Preparation, materialise
from data_pipelines.workdir.settings_file import SETTINGS_FILE
from data_pipelines.workdir.stages import chosen_stages, only_one
from launch.common import app, configurables
from launch.common.flags import QUESTIONS, SKIP_BAD, question_files
from retro_jax.errors import UserError
from retro_jax.report.tables import as_text
from retro_jax.train import record

STAGES = flags.DEFINE_list("stages", None, "Only these stages, in their own order. Default: all.")
VERIFY = flags.DEFINE_bool(
    "verify", False, "Hash every file again, compute a sample again, print each check, and stop."
)
VERIFY_SAMPLE = flags.DEFINE_integer(
    "verify_sample", 100, "Documents, keys and table rows that --verify computes.", lower_bound=0
)
VERIFY_SEED = flags.DEFINE_integer("verify_seed", 0, "Which ones.", lower_bound=0)
STATS = flags.DEFINE_bool("stats", False, "Print what W holds as a table, and stop.")
RUNNER = flags.DEFINE_enum(
    "runner",
    "local",
    ["local", "ray"],
    "Make shards on this machine, or as tasks of a Ray cluster.",
)
PROCESSES = flags.DEFINE_integer(
    "processes", 1, "Processes of the local runner; the bytes are the same.", lower_bound=1
)
RAY_ADDRESS = flags.DEFINE_string(
    "ray_address",
    None,
    "Head of the Ray cluster. Default: RAY_ADDRESS, or a new one of this machine.",
)
RAY_CPUS = flags.DEFINE_integer("ray_cpus", 1, "Cores that each Ray task asks for.", lower_bound=1)
RAY_ACCELERATORS = flags.DEFINE_string(
    "ray_accelerators",
    "",
    "What Ray tasks that embed and search ask for: GPU, TPU:4. Default: none.",
)

APPEND = flags.DEFINE_bool(
    "append", False, "Add the gin file's documents that W lacks, as a new revision of the database."
)
REMOVE = flags.DEFINE_multi_string(
    "remove", [], "Withdraw the document CORPUS/ID from the database, or each of @FILE's lines."
)

COMPACT = flags.DEFINE_bool(
    "compact", False, "Copy the database of all revisions into one, without removed documents."
)
PURGE = flags.DEFINE_bool(
    "purge",
    False,
    "As --compact, then delete what that replaces: removed text is gone from the disk.",
)

MATERIALISE = flags.DEFINE_integer(
    "materialise",
    None,
    "Also write the batches of so many training steps, neighbours included, to W/materialised.",
    lower_bound=1,
)

_report = functools.partial(print, flush=True)


def main() -> None:
    """Runs the stages that are asked for."""
    stages = _stages()
    directory = pathlib.Path(app.required(app.WORKDIR, "the directory of the run"))
    if STATS.value:
        print(as_text(summary.table(directory)))
        return
    if VERIFY.value:
        _verify(directory)
        return
    if QUESTIONS.value:
        _prepare_questions(directory)
        return
    compacting = COMPACT.value or PURGE.value
    updating = APPEND.value or bool(REMOVE.value) or compacting
    if updating:
        _load_over(directory)
    else:
        configurables.load_from_flags()
    if SKIP_BAD.value:
        configurables.override("DocumentsConfig.skip_bad_documents", True)
    config, runner = make_config(), make_runner()
    if configurables.PRINT_CONFIG.value:
        print(configurables.operative_config(), end="")
        return
    if updating:
        with only_one(directory):
            preparation = Preparation(directory, config, runner, _report)
            if APPEND.value or REMOVE.value:
                update.update(preparation, append=APPEND.value, remove=REMOVE.value)
            if compacting:
                (compaction.purge if PURGE.value else compaction.compact)(preparation)
        return
    steps = MATERIALISE.value or 0
    batches = configurables.make(BatchConfig) if steps else None
    settings = configurables.operative_config()
    if prepare(directory, config, runner=runner, stages=stages, report=_report, settings=settings):
        record.record_versions(directory)
    if batches is not None:
        with only_one(directory):
            _report(f"materialised: {materialise(directory, batches, steps, runner)}")


def _stages() -> list[str]:
    """The stages of --stages, in the order in which they run; refuses flags that would be ignored."""
    alone = [flag for flag in (STATS, VERIFY, QUESTIONS) if flag.value]
    updates = [flag for flag in (APPEND, REMOVE, COMPACT, PURGE) if flag.value]
    making = (STAGES, MATERIALISE, *([configurables.PRINT_CONFIG] if alone else []))
    others = [flag for flag in making if flag.value not in (None, False)]
    given = [*alone, *updates[:1], *others[:1]]
    if len(given) > 1:
        raise flags.Error(f"--{given[0].name} and --{given[1].name}: expected one of them")
    try:
        return chosen_stages(STAGES.value)
    except UserError as error:
        raise flags.Error(f"--{error}") from error


def _load_over(directory: pathlib.Path) -> None:
    """Loads the flags' settings over those that W was prepared with."""
    recorded = directory / SETTINGS_FILE
    base = str(recorded) if recorded.is_file() else None
    configurables.load(configurables.GIN_FILE.value, configurables.GIN_BINDINGS.value, base=base)


def _prepare_questions(directory: pathlib.Path) -> None:
    """Makes W/questions/NAME of each file, with as many neighbours as W's training split has."""
    _load_over(directory)
    k = configurables.make(NeighboursConfig).train
    for name, file in question_files().items():
        manifest = prepare_questions(directory, name, file, k)
        _report(f"questions/{name}: {manifest.fact('questions'):,} questions, {k} passages each")


def _verify(directory: pathlib.Path) -> None:
    """Checks W, with the BERT that it was prepared with."""
    _load_over(directory)
    verify.verify(
        directory,
        sample=VERIFY_SAMPLE.value,
        seed=VERIFY_SEED.value,
        model=configurables.make(KeysConfig).folder,
        report=_report,
    )


def make_config() -> PrepareConfig:
    """Every setting from the configuration that was loaded.

    Raises:
      UserError: a setting is missing or wrong.
    """
    return PrepareConfig(
        documents=configurables.make(DocumentsConfig),
        tokenizer=configurables.make(TokenizerConfig),
        keys=configurables.make(KeysConfig),
        index=configurables.make(IndexConfig),
        neighbours=configurables.make(NeighboursConfig),
        leakage=configurables.make(LeakageConfig),
        bm25=configurables.make(Bm25Config),
    )


def make_runner() -> Runner:
    """The runner that --runner and its flags ask for."""
    if RUNNER.value == "ray":
        return RayCluster(
            address=RAY_ADDRESS.value, cpus=RAY_CPUS.value, accelerators=RAY_ACCELERATORS.value
        )
    return LocalProcesses(PROCESSES.value) if PROCESSES.value > 1 else InProcess()


if __name__ == "__main__":
    app.run(main)
