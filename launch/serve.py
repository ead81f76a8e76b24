"""Serves a trained RETRO over HTTP: OpenAI's completions, with live retrieval.

    python -m launch.serve --workdir=W --port=8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "The city"}'
    python -m launch.serve --workdir=W --host=0.0.0.0 --api_key=KEY --documents

A new revision of the database is taken up while it serves. SIGTERM refuses new requests, finishes
the running ones and ends with status 0. docs/serving.md has every path and limit.
"""

import logging
import os
import pathlib
import signal
from collections.abc import Callable, Sequence

from absl import flags

from data_pipelines.corpora import TextCorpus
from data_pipelines.documents.documents import DocumentsConfig
from data_pipelines.workdir.served_documents import change_documents
from data_pipelines.workdir.settings_file import SETTINGS_FILE
from launch import prepare
from launch.common import app, configurables
from launch.common.flags import AVERAGED, DATA, data_directory
from launch.runs.text_generator import Generator
from retro_jax.errors import UserError
from retro_jax.serve.limits import Limits

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; others need --api_key.")
PORT = flags.DEFINE_integer("port", 8000, "Port to listen at.", lower_bound=1, upper_bound=65535)
API_KEY = flags.DEFINE_string(
    "api_key", None, "Key that requests must bring. Default: the variable RETRO_API_KEY."
)
REVISION = flags.DEFINE_integer(
    "revision", None, "Revision of the database. Default: always the newest.", lower_bound=0
)
DOCUMENTS = flags.DEFINE_bool("documents", False, "Allow /documents to change the database.")
ROWS = flags.DEFINE_integer("rows", Limits.rows, "Texts continued at once.", lower_bound=1)
LENGTH = flags.DEFINE_integer(
    "max_length",
    0,
    "Tokens of a text, prompt included. Default: the trained length.",
    lower_bound=0,
)
QUEUE = flags.DEFINE_integer("max_queue", Limits.queue, "Texts that may wait.", lower_bound=1)
SECONDS = flags.DEFINE_float("max_seconds", Limits.seconds, "Of a request.", lower_bound=0.1)
_LOCAL = ("127.0.0.1", "localhost", "::1")


def main() -> None:
    """Serves until it is asked to stop."""
    workdir = pathlib.Path(app.required(app.WORKDIR, "the directory of a run"))
    data = data_directory(DATA.value or workdir)
    try:
        import uvicorn

        from retro_jax.serve.app import Server
    except ImportError as error:
        message = "launch.serve needs the extra serve: expected pip install 'retro-jax[serve]'"
        raise UserError(f"{error.name} is not installed; {message}") from error
    key = API_KEY.value or os.environ.get("RETRO_API_KEY")
    if HOST.value not in _LOCAL and not key:
        raise flags.Error(f"--host={HOST.value}: expected --api_key, as others can reach it")
    limits = Limits(rows=ROWS.value, length=LENGTH.value, queue=QUEUE.value, seconds=SECONDS.value)
    generator = Generator.open(
        workdir,
        database=DATA.value and data,
        revision=REVISION.value,
        averaged=AVERAGED.value,
    )
    change = _change(data) if DOCUMENTS.value else None
    server = Server(generator, limits, api_key=key, change=change)
    logging.getLogger("retro_jax.serve").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when all is done
    print(f"{generator.name} at http://{HOST.value}:{PORT.value} (compiling first)", flush=True)
    uvicorn.run(
        server.app,
        host=HOST.value,
        port=PORT.value,
        log_level="warning",
        timeout_graceful_shutdown=int(limits.stop_seconds),
    )


def _change(data: pathlib.Path) -> Callable[..., list[str]]:
    """What changes the documents of W, by the settings that W was prepared with."""
    path = data / SETTINGS_FILE
    configurables.load(None, base=str(path) if path.is_file() else None)
    configurables.make(DocumentsConfig, corpora=(TextCorpus("served", ("",)),))
    config = prepare.make_config()

    def change(corpus: str, append: Sequence[tuple[str, str]], remove: Sequence[str]) -> list[str]:
        return change_documents(data, config, corpus=corpus, append=append, remove=remove)

    return change


if __name__ == "__main__":
    app.run(main)
