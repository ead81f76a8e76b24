"""Prepares what training reads: corpora in, chunks with their neighbours out.

    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W
    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W --stages=documents,leakage
    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W --runner=ray --ray_address=HOST:6379
    python -m launch.prepare --gin_file=more.gin --workdir=W --append
    python -m launch.prepare --workdir=W --remove=wikipedia/Lobster
    python -m launch.prepare --gin_file=experiments/quickstart.gin --workdir=W --materialise=1000
    python -m launch.prepare --workdir=W --stats
    python -m launch.prepare --workdir=W --verify

Runs the stages documents, leakage, tokenizer, chunks, duplicates, keys, index, bm25 and neighbours,
those that the settings ask for, each into its own directory of W. What is there already is not made
again; interrupted or killed, the same command goes on where it was. A directory that was made with
other settings is refused, and never deleted.
"""

import contextlib
import dataclasses
import fcntl
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Manifest
from data_pipelines.artefacts.ray_runner import RayCluster
from data_pipelines.artefacts.runner import InProcess, LocalProcesses, Runner
from data_pipelines.batches.batches import BatchConfig
from data_pipelines.chunk_database.database import prepare_chunks
from data_pipelines.chunk_database.tokenizer import TokenizerConfig, train_tokenizer
from data_pipelines.corpora import SPLITS
from data_pipelines.documents.documents import DocumentsConfig, prepare_documents
from data_pipelines.leakage.near_documents import LeakageConfig
from data_pipelines.retriever import revisions
from data_pipelines.retriever.bm25 import Bm25Config, prepare_bm25
from data_pipelines.retriever.index import IndexConfig, prepare_index
from data_pipelines.retriever.keys import KeysConfig, prepare_keys
from data_pipelines.retriever.neighbours import NeighboursConfig
from data_pipelines.retriever.retriever import Retriever
from data_pipelines.workdir import leakage_report, summary, update, verify
from data_pipelines.workdir.preparation import Preparation, materialise, open_keys, prepare_table
from launch.common import app, configurables
from retro_jax.errors import UserError
from retro_jax.storage import files
from retro_jax.train import record

STAGES = flags.DEFINE_list("stages", None, "Only these stages, in their own order. Default: all.")
SKIP_BAD = flags.DEFINE_bool(
    "skip_bad_documents", False, "Count documents that cannot be read and go on."
)
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

MATERIALISE = flags.DEFINE_integer(
    "materialise",
    None,
    "Also write the batches of so many training steps, neighbours included, to W/materialised.",
    lower_bound=1,
)

CONFIG_FILE = "prepare.gin"
_LOCK_FILE = ".prepare.lock"


@dataclasses.dataclass(frozen=True)
class StageOf:
    """A stage of the preparation.

    Attributes:
      places: the directories in W that it fills.
      run: makes what is missing of them, and returns a line of what they hold and a count for the
        rate with its unit.
      wanted: whether the settings ask for it.
    """

    places: tuple[str, ...]
    run: Callable[[Preparation], tuple[str, int, str]]
    wanted: Callable[[Preparation], bool] = lambda p: True


def main() -> None:
    """Runs the stages that are asked for."""
    directory = pathlib.Path(app.required(app.WORKDIR, "the directory of the run"))
    if STATS.value:
        print(summary.table(directory))
        return
    if VERIFY.value:
        _verify(directory)
        return
    chosen = _chosen(STAGES.value)
    updating = APPEND.value or bool(REMOVE.value)
    if updating:
        _load_over(directory)
    else:
        configurables.load_from_flags()
    if SKIP_BAD.value:
        configurables.override("DocumentsConfig.skip_bad_documents", True)
    preparation = make_preparation(directory)
    if configurables.PRINT_CONFIG.value:
        print(configurables.operative_config(), end="")
        return
    with only_one(directory):
        if updating:
            update.update(preparation, append=APPEND.value, remove=REMOVE.value)
            return
        steps = MATERIALISE.value or 0
        batches = configurables.make(BatchConfig) if steps else None
        made = [name for name in chosen if run_stage(name, preparation)]
        if made:
            settings = configurables.operative_config()
            files.write_atomically(directory / CONFIG_FILE, settings.encode())
            record.record_versions(directory)
        if batches is not None:
            line = materialise(directory, batches, steps, preparation.runner)
            print(f"materialised: {line}", flush=True)


def _load_over(directory: pathlib.Path) -> None:
    """Loads the flags' settings over those that W was prepared with."""
    recorded = directory / CONFIG_FILE
    base = str(recorded) if recorded.is_file() else None
    configurables.load(configurables.GIN_FILE.value, configurables.GIN_BINDINGS.value, base=base)


def _verify(directory: pathlib.Path) -> None:
    """Checks W, with the BERT that it was prepared with."""
    _load_over(directory)
    verify.verify(
        directory,
        sample=VERIFY_SAMPLE.value,
        seed=VERIFY_SEED.value,
        model=configurables.make(KeysConfig).folder,
        report=functools.partial(print, flush=True),
    )


def make_preparation(directory: pathlib.Path) -> Preparation:
    """Every setting from the configuration that was loaded.

    Raises:
      UserError: a setting is missing or wrong.
    """
    return Preparation(
        directory=directory,
        documents=configurables.make(DocumentsConfig),
        tokenizer=configurables.make(TokenizerConfig),
        keys=configurables.make(KeysConfig),
        index=configurables.make(IndexConfig),
        neighbours=configurables.make(NeighboursConfig),
        leakage=configurables.make(LeakageConfig),
        bm25=configurables.make(Bm25Config),
        runner=make_runner(),
    )


def make_runner() -> Runner:
    """What --runner and its flags ask for."""
    if RUNNER.value == "ray":
        return RayCluster(
            address=RAY_ADDRESS.value, cpus=RAY_CPUS.value, accelerators=RAY_ACCELERATORS.value
        )
    return LocalProcesses(PROCESSES.value) if PROCESSES.value > 1 else InProcess()


def run_stage(name: str, preparation: Preparation) -> bool:
    """Runs one stage and prints a line about it; returns whether there was anything to do."""
    stage, start = ALL_STAGES[name], time.perf_counter()
    if not stage.wanted(preparation):
        return False
    done = all((preparation.directory / p / MANIFEST_FILE).is_file() for p in stage.places)
    if not done:
        print(f"{name}: ...", flush=True)
    line, count, unit = stage.run(preparation)
    seconds = time.perf_counter() - start
    took = "there already" if done else f"{seconds:.1f} s, {count / seconds:,.0f} {unit} a second"
    print(f"{name}: {line} ({took})", flush=True)
    return not done


@contextlib.contextmanager
def only_one(directory: pathlib.Path) -> Iterator[None]:
    """Makes W, and keeps other preparations out of it until the end.

    Raises:
      UserError: another one is running.
    """
    with files.writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / _LOCK_FILE, "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory} is being prepared by another process: expected none"
            ) from None
        yield


def _chosen(names: Sequence[str] | None) -> list[str]:
    """The stages of --stages, in the order in which they run."""
    if names is None:
        return list(ALL_STAGES)
    for name in names:
        if name not in ALL_STAGES:
            raise flags.Error(f"--stages={name}: expected some of {','.join(ALL_STAGES)}")
    if not names:
        raise flags.Error(f"--stages is empty: expected some of {','.join(ALL_STAGES)}")
    return [name for name in ALL_STAGES if name in names]


def _documents(p: Preparation) -> tuple[str, int, str]:
    """Reads the corpora into splits."""
    manifests = prepare_documents(p.directory / "documents", p.documents, runner=p.runner)
    counts = {split: manifest.fact("documents") for split, manifest in manifests.items()}
    size = sum(manifest.fact("bytes") for manifest in manifests.values())
    left_out = _left_out(manifests["train"])
    told = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return f"{told}; {size / 1e6:,.1f} MB{left_out}", size // 1000, "kB"


def _left_out(manifest: Manifest) -> str:
    """How many documents were read and not taken, by reason."""
    reading = manifest.fact("reading").values()
    reasons = ("bad", "empty", "duplicates", "beyond_limit")
    sums = {reason: sum(counts[reason] for counts in reading) for reason in reasons}
    told = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in sums.items() if n)
    return f"; left out: {told}" if told else ""


def _leakage(p: Preparation) -> tuple[str, int, str]:
    """Withdraws training documents that nearly are held-out ones."""
    leakage_report.refuse_late(p.directory)
    manifest = leakage_report.withdraw(p, p.directory)
    assert manifest is not None
    count = manifest.fact("documents")
    if manifest.fact("withdrawn") == count:
        raise UserError(
            f"{p.directory / 'leakage'}: all {count} training documents are near-copies of held-out"
            " ones: expected some that are not"
        )
    leakage_report.write_report(p.directory)
    return leakage_report.told(manifest), count, "documents"


def _duplicates(p: Preparation) -> tuple[str, int, str]:
    """Counts held-out chunks that stand in the training split all but word for word."""
    manifest = leakage_report.count(p, p.directory)
    leakage_report.write_report(p.directory)
    return leakage_report.told_of_chunks(manifest), manifest.fact("chunks"), "chunks"


def _tokenizer(p: Preparation) -> tuple[str, int, str]:
    """Trains the tokeniser on the training split."""
    manifest = train_tokenizer(
        p.directory / "tokenizer", p.directory / "documents" / "train", p.tokenizer
    )
    size = manifest.fact("training_bytes")
    line = f"{manifest.fact('vocab_size'):,} tokens, trained on {size / 1e6:,.1f} MB"
    return line, size // 1000, "kB"


def _chunks(p: Preparation) -> tuple[str, int, str]:
    """Cuts every split's documents into chunks."""
    counts = {}
    for split in SPLITS:
        manifest = prepare_chunks(
            p.directory / "chunks" / split,
            p.directory / "documents" / split,
            p.directory / "tokenizer",
            leakage_directory=leakage_report.directory_of(p, p.directory)
            if split == "train"
            else None,
            runner=p.runner,
        )
        counts[split] = manifest.fact("chunks")
    told = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return told, sum(counts.values()), "chunks"


def _keys(p: Preparation) -> tuple[str, int, str]:
    """Embeds every split: the training split is the retrieval database, the others ask it."""
    manifests = {
        split: prepare_keys(
            p.directory / "keys" / split,
            p.directory / "chunks" / split,
            p.directory / "tokenizer",
            p.keys,
            runner=p.runner,
        )
        for split in SPLITS
    }
    told = ", ".join(f"{m.fact('keys'):,} {split}" for split, m in manifests.items())
    chunks = sum(manifest.fact("chunks") for manifest in manifests.values())
    return f"{told}; {manifests['train'].fact('dimension')} dimensions", chunks, "chunks"


def _index(p: Preparation) -> tuple[str, int, str]:
    """Builds the index over the keys."""
    keys = open_keys(p.directory, "train")
    manifest = prepare_index(p.directory / "index", keys, p.index, runner=p.runner)
    count, plan = manifest.fact("keys"), manifest.fact("plan")
    return f"{count:,} keys, {plan['kind'].replace('_', ' ')}", count, "keys"


def _bm25(p: Preparation) -> tuple[str, int, str]:
    """Computes the scores of terms in the database's chunks."""
    database = revisions.open_database(p.directory, 0)
    manifest = prepare_bm25(p.directory / "bm25", database, p.bm25)
    count, postings = manifest.fact("indexed"), manifest.fact("postings")
    return f"{count:,} chunks, {postings:,} terms in them", count, "chunks"


def _neighbours(p: Preparation) -> tuple[str, int, str]:
    """Finds the neighbours of every split's chunks."""
    retriever = Retriever.open(p.directory, revision=0, ranking=p.neighbours.ranking)
    told, total = [], 0
    for split in SPLITS:
        manifest = prepare_table(p, split, retriever)
        total += manifest.fact("chunks")
        recall = manifest.fact("recall")
        told.append(f"{split} {recall['k']} a chunk, recall {recall['recall']:.3f}")
    return "; ".join(told), total, "chunks"


def _checks_leakage(p: Preparation) -> bool:
    """Whether training documents are compared with held-out ones."""
    return p.leakage.threshold is not None


def _splits(folder: str) -> tuple[str, ...]:
    """A folder's directory for each split."""
    return tuple(f"{folder}/{split}" for split in SPLITS)


ALL_STAGES = {
    "documents": StageOf(_splits("documents"), _documents),
    "leakage": StageOf(("leakage",), _leakage, _checks_leakage),
    "tokenizer": StageOf(("tokenizer",), _tokenizer),
    "chunks": StageOf(_splits("chunks"), _chunks),
    "duplicates": StageOf(("duplicates",), _duplicates, _checks_leakage),
    "keys": StageOf(_splits("keys"), _keys, lambda p: p.neighbours.ranking.by_keys),
    "index": StageOf(("index",), _index, lambda p: p.neighbours.ranking.by_keys),
    "bm25": StageOf(("bm25",), _bm25, lambda p: p.neighbours.ranking.by_terms),
    "neighbours": StageOf(_splits("neighbours"), _neighbours),
}

if __name__ == "__main__":
    app.run(main)
