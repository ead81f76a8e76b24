"""Serves a trained RETRO over HTTP: OpenAI's completions, with live retrieval.

    python -m launch.serve --workdir=W --port=8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The city"}'
    python -m launch.serve --workdir=W --host=0.0.0.0 --api_key=KEY --documents

A new revision of the database is taken up while it serves. SIGTERM refuses new requests, finishes
the running ones and ends with status 0. docs/serving.md has every path and limit.
"""

import functools
import os

from absl import flags

from data_pipelines.corpora import TextCorpus
from data_pipelines.documents.documents import DocumentsConfig
from data_pipelines.workdir.served_documents import change_documents
from data_pipelines.workdir.settings_file import SETTINGS_FILE
from launch import prepare
from launch.common import app, configurables, workdirs
from launch.common.flags import AVERAGED, BERT_FOLDER, DATA, REVISION
from launch.runs.text_generator import Generator
from retro_jax.serve.limits import Limits
from retro_jax.serve.listening import listen

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; others need --api_key.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen at.", lower_bound=1, upper_bound=65535)
API_KEY = flags.DEFINE_string("api_key", None, "Of requests. Default: $RETRO_API_KEY, or none.")
DOCUMENTS = flags.DEFINE_bool("documents", False, "Allow /documents to change the database.")
ROWS = flags.DEFINE_integer("max_rows", Limits.rows, "Texts continued at once.", lower_bound=1)
LENGTH = flags.DEFINE_integer("max_length", 0, "Tokens of a text. Default: the trained length.")
QUEUE = flags.DEFINE_integer("max_queue", Limits.queue, "Texts that may wait.", lower_bound=1)
SECONDS = flags.DEFINE_float("max_seconds", Limits.seconds, "Of a request.", lower_bound=0.1)
STRIDES = flags.DEFINE_list("retrieval_strides", [], "Strides of retrieval to allow, as in 32,16.")
WARM_UP = flags.DEFINE_bool("warm_up", True, "Compile everything before the first request.")


def main() -> None:
    """Serves until it is asked to stop."""
    workdir, data = workdirs.open_to_read(DATA)
    key = API_KEY.value or os.environ.get("RETRO_API_KEY")
    if HOST.value not in ("127.0.0.1", "localhost", "::1") and not key:
        raise flags.Error(f"--host={HOST.value}: expected --api_key, as others can reach it")
    if DOCUMENTS.value and REVISION.value is not None:
        raise flags.Error("--documents and --revision: expected one, as a change makes a revision")
    for stride in STRIDES.value:
        if not stride.isdecimal():
            raise flags.Error(f"--retrieval_strides={stride}: expected divisors of 64")
    limits = Limits(
        ROWS.value, LENGTH.value, QUEUE.value, SECONDS.value, strides=tuple(map(int, STRIDES.value))
    )
    database = data if DATA.value else None
    generator = Generator.open(
        workdir,
        database=database,
        revision=REVISION.value,
        averaged=AVERAGED.value,
        bert_folder=BERT_FOLDER.value,
    )
    change = None
    if DOCUMENTS.value:
        path = data / SETTINGS_FILE
        configurables.load(None, base=str(path) if path.is_file() else None)
        configurables.make(DocumentsConfig, corpora=(TextCorpus("served", ("",)),))
        change = functools.partial(change_documents, data, prepare.make_config())
    host, port, warm = HOST.value, PORT.value, WARM_UP.value
    listen(generator, limits, host=host, port=port, api_key=key, change=change, warm_up=warm)


if __name__ == "__main__":
    app.run(main)
