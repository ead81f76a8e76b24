"""The recorded run that --replay names, and where its data was; retro_jax/train/replay.py does the rest."""

import pathlib

from absl import flags

from data_pipelines.artefacts.manifest import MANIFEST_FILE
from retro_jax.errors import UserError
from retro_jax.storage import urls
from retro_jax.train import record
from retro_jax.train.replay import last_start


def find_run(replay: str, name: str, *, workdir: str, gin_file: str | None) -> pathlib.Path:
    """The run that --replay names.

    Args:
      replay: value of the flag: a workdir, or a run in it. name: of the run in a workdir.
      workdir, gin_file: values of these flags.

    Raises:
      flags.Error: --replay and --gin_file together, or into the directory of the run itself.
      UserError: there is no recorded run.
    """
    if gin_file is not None:
        raise flags.Error("--replay has settings of its own: expected no --gin_file beside it")
    given = pathlib.Path(replay)
    run = given if (given / record.CONFIG_FILE).is_file() else given / name
    for file in (record.CONFIG_FILE, record.PARENTS_FILE, record.VERSIONS_FILE):
        if not (run / file).is_file():
            raise UserError(f"--replay={given}: there is no {run / file}, expected a run's record")
    if pathlib.Path(workdir).resolve() == run.parent.resolve():
        raise flags.Error(f"--workdir={workdir} holds the run to replay: expected another")
    return run


def data_place(run: pathlib.Path) -> str:
    """Where the data of a recorded run was: a bucket or a directory as recorded, or the workdir around it.

    Raises:
      UserError: neither of them has it.
    """
    recorded = last_start(run).get("data", "")
    if urls.is_url(recorded):
        return recorded
    for path in (recorded, run.parent):
        folder = pathlib.Path(path)
        if path and ((folder / "chunks").is_dir() or (folder / MANIFEST_FILE).is_file()):
            return str(path)
    raise UserError(f"the data of {run} is no longer at {recorded or run.parent}: expected --data")
