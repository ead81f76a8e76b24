"""The fixture `prepared_workdir`: a small slice of the real corpora, prepared once a test session.

W = prepared_workdir is what `launch.prepare` makes of W.parent / "slice.gin": MiniLM's keys, a ScaNN
index, and neighbour tables of every split, of 60 Wikipedia introductions and some short files of
Python's library; about 500 chunks, two thirds of which are training. Do not write into W: copy it, or
train elsewhere with --data.
"""

import fcntl
import os
import pathlib

import pytest

SLICE = """
wikipedia/CorpusConfig.name = 'wikipedia'
wikipedia/CorpusConfig.kind = 'wikipedia'
wikipedia/CorpusConfig.max_documents = 60
python/CorpusConfig.name = 'python'
python/CorpusConfig.kind = 'stdlib'
python/CorpusConfig.include = ('email/mime/*.py', 'importlib/*/*.py', 'wsgiref/*.py')
python/CorpusConfig.max_bytes = 60_000
DocumentsConfig.corpora = (@wikipedia/CorpusConfig(), @python/CorpusConfig())
DocumentsConfig.validation = 0.2
DocumentsConfig.test = 0.2
TokenizerConfig.vocab_size = 1024
NeighboursConfig.train = 4
NeighboursConfig.validation = 10
NeighboursConfig.test = 10
NeighboursConfig.recall_queries = 50
"""


@pytest.fixture(scope="session")
def prepared_workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A workdir in which every stage of launch.prepare has run; read only."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # workers share one
        root = root.parent
    folder = root / "prepared"
    folder.mkdir(exist_ok=True)
    settings = write_slice(folder)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():  # else a test of this worker may be preparing W just now
            assert run_prepare(folder / "W", settings) == 0
            (folder / "done").touch()
    return folder / "W"


def write_slice(folder: pathlib.Path, *more: str) -> pathlib.Path:
    """Writes the slice's settings, and further ones that override them, into FOLDER/slice.gin."""
    path = folder / "slice.gin"
    path.write_text("\n".join([SLICE, *more, ""]))
    return path


def run_prepare(workdir: pathlib.Path, settings: pathlib.Path | None, *more: str) -> int:
    """Runs launch.prepare in this process and returns its exit status."""
    from launch import prepare
    from launch.common import app

    arguments = [f"--workdir={workdir}", *more]
    if settings is not None:
        arguments.append(f"--gin_file={settings}")
    return app.execute(prepare.main, ["prepare", *arguments])
