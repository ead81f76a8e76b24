"""Where the lines of a curve go beside metrics.jsonl: TensorBoard's event files, and Weights & Biases.

A tracker is opened once a start, by the first process only. After a kill the steps since the last
checkpoint are made, and written, again.
"""

import contextlib
import importlib
import logging
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import tensorboardX

from retro_jax.config import require
from retro_jax.errors import UserError
from retro_jax.storage import files

WANDB_FILE = "wandb.json"  # the id under which Weights & Biases knows a run
_PROJECT = "retro-jax"

_logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """A place for curves."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the values of a line: after `step` updates."""

    def close(self) -> None:
        """Writes what is not written yet."""


class TensorBoard:
    """Event files in the run's directory."""

    def __init__(self, directory: pathlib.Path, start_step: int):
        """Opens a file of its own. start_step: steps after it were written before, and do not count."""
        # A file's name has its second only: a start within the same one would replace the other's.
        self._events = tensorboardX.SummaryWriter(
            str(directory), purge_step=start_step + 1, filename_suffix=f".{start_step}"
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One scalar a value."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class WeightsAndBiases:
    """A run there, which every start continues; WANDB_PROJECT, WANDB_MODE and WANDB_API_KEY are its own.

    A service that fails is a warning: curves are in metrics.jsonl in any case.
    """

    def __init__(self, directory: pathlib.Path, start_step: int):
        """Begins or continues the run. start_step: updates made already."""
        wandb = importlib.import_module("wandb")
        path = directory / WANDB_FILE
        known = files.read_json(path)["id"] if path.is_file() else uuid.uuid4().hex[:12]
        files.write_atomically(path, files.to_json({"id": known}))
        self._run: Any = None
        self._warned = False
        with self._guarded():
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                id=known,
                name=os.environ.get("WANDB_NAME", f"{directory.parent.name}/{directory.name}"),
                resume="allow",
                dir=str(directory.parent),
                config={"resumed_at": start_step},
            )
            run.define_metric("*", step_metric="step")
            self._run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; its step is a value, as a line may be made again after a kill."""
        if self._run is not None:
            with self._guarded():
                self._run.log({"step": step, **values})

    def close(self) -> None:
        """Waits until the service has all lines."""
        if self._run is not None:
            with self._guarded():
                self._run.finish()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Makes a failure a warning, once."""
        try:
            yield
        except Exception as error:  # of a service that training does not need
            if not self._warned:
                _logger.warning("Weights & Biases: %s; metrics.jsonl has the curves", error)
            self._warned = True


TRACKERS: dict[str, Callable[[pathlib.Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def open_trackers(
    names: Sequence[str], directory: str | os.PathLike, start_step: int
) -> list[Tracker]:
    """The trackers of some names, for a run that has made `start_step` updates."""
    return [TRACKERS[name](pathlib.Path(directory), start_step) for name in names]


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
      UserError: names the setting and the package.
    """
    if "wandb" in names:
        try:
            importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                "TrainConfig.trackers has 'wandb', whose package is not installed: expected"
                " pip install 'retro-jax[wandb]'"
            ) from error


def require_trackers(names: Sequence[str], config: Any) -> None:
    """Refuses names that are no trackers, as a configuration's __post_init__ does."""
    known = len(set(names)) == len(names) and set(names) <= set(TRACKERS)
    require(known, config, "trackers", f"some of {tuple(TRACKERS)}, each once")
