"""Flags that more than one entry point has: absl defines a flag once a process."""

import pathlib
import re

import jax
from absl import flags

from data_pipelines.questions.reader import QuestionFile, read_questions
from launch.common import app
from retro_jax.compiler import keep_programs
from retro_jax.distributed import join, processes

DATA = flags.DEFINE_string("data", None, "Directory of the prepared data. Default: --workdir.")
SPLIT = flags.DEFINE_string("split", "test", "Which split of the documents.")
RETRIEVAL = flags.DEFINE_list(
    "retrieval",
    None,
    "With retrieval on or off; launch.evaluate scores both unless told otherwise, and knows "
    "random, oracle, in_context, random_in_context and tokens too.",
)
NUM_NEIGHBOURS = flags.DEFINE_integer(
    "num_neighbours",
    None,
    "Neighbours a chunk; as many as in training unless given.",
    lower_bound=1,
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 128, "Tokens of each sample at most.", lower_bound=1
)
SKIP_BAD = flags.DEFINE_bool("skip_bad_documents", False, "Count bad documents and go on.")
QUESTIONS = flags.DEFINE_multi_string(
    "questions", [], "Questions in the layout of DPR and FiD, as in NAME=questions.jsonl."
)
AVERAGED = flags.DEFINE_bool(
    "averaged", False, "Use the moving average of the parameters (TrainConfig.average_decay)."
)
BASE = flags.DEFINE_string("base", None, "The model: a Hugging Face folder or a .gguf file.")
BERT_FOLDER = flags.DEFINE_string(
    "bert_folder", None, "The BERT that made the database's keys, where it is no packaged one."
)
REVISION = flags.DEFINE_integer(
    "revision", None, "Of the database; the newest unless given.", lower_bound=0
)
COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where several processes train together."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0.", lower_bound=0
)
PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout",
    100,
    "Seconds without a sign of life after which another process counts as lost.",
    lower_bound=1,
)


def join_processes(
    address: str | None, count: int | None, index: int | None, *, peer_timeout: int
) -> None:
    """Joins the other processes of this run, where there are any. Before any other use of JAX.

    Args:
      address, count, index: values of the three flags; all None to read the environment
        instead. peer_timeout: that of --peer_timeout.

    Raises:
      flags.Error: only a part of the three flags was given, or they do not fit together.
      UserError: the environment contradicts itself, or the others cannot be reached.
    """
    join.join(_place(address, count, index), peer_timeout=peer_timeout)
    app.name_process(processes.name())
    keep_programs(jax.default_backend())


def _place(address: str | None, count: int | None, index: int | None) -> join.Place | None:
    """The process's place that the three flags give; None where they give none, or one process."""
    given = {COORDINATOR_ADDRESS.name: address, NUM_PROCESSES.name: count, PROCESS_ID.name: index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if address is None or count is None or index is None:
        names = ", --".join(given)
        raise flags.Error(f"--{missing[0]} is missing: expected all of --{names}")
    if not re.fullmatch(r".+:\d+", address):
        raise flags.Error(f"--coordinator_address={address}: expected HOST:PORT of process 0")
    if index >= count:
        raise flags.Error(f"--process_id={index}: expected less than --num_processes={count}")
    return join.Place(address, count, index) if count > 1 else None


def question_files() -> dict[str, QuestionFile]:
    """The files of --questions by their names.

    Raises:
      flags.Error: a value that is not NAME=FILE, or a second file of a name. UserError: a file that
        is missing or bad.
    """
    paths: dict[str, str] = {}
    for value in QUESTIONS.value:
        name, _, path = value.partition("=")
        if not re.fullmatch(r"[\w.-]+", name) or not path:
            raise flags.Error(f"--questions={value}: expected NAME=FILE")
        if name in paths:
            raise flags.Error(f"--questions={value}: expected another name than {paths[name]}'s")
        paths[name] = path
    return {name: read_questions(path) for name, path in paths.items()}


def data_directory(place: str | pathlib.Path) -> pathlib.Path:
    """Where prepared data is, as --data or --workdir says.

    Raises:
      flags.Error: it is in a bucket, which launch.train alone reads.
    """
    if "://" in str(place):
        raise flags.Error(f"--data={place}: expected a directory; launch.train alone reads buckets")
    return pathlib.Path(place)
