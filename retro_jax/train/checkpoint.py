"""Checkpoints: written in the background by Orbax, sealed, and restored exactly.

    checkpoints/
      1000/default/...   the arrays of a TrainState, flat, by name ("params.layers.attention.query")
      1000/sealed.json   shape and dtype of every array; size and sha256 of every file of default/
      2000.damaged/      a checkpoint whose files differ from its seal

Orbax writes into a temporary directory, each process hashes what it wrote (hashed_files.py), the seal is
added when all arrays are there, and a rename makes the checkpoint appear: a killed run leaves whole
checkpoints only. Later damage (a disk, a copy cut short) is found by the seal before anything is
read, each process checking its share; the one before is used then.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Set
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from retro_jax.distributed.processes import first_answer, from_first, is_first, together
from retro_jax.errors import UserError
from retro_jax.storage import files
from retro_jax.train import hashed_files, sealed_parts
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.sealed_parts import SEAL as SEAL
from retro_jax.train.sealed_parts import DamagedError
from retro_jax.train.step import TrainState

CHECKPOINTS = "checkpoints"

FORMAT_VERSION = 1
_ITEM = "default"
_COMMIT_SECONDS = 2 * 3600  # for the others' arrays and the seal's hashes, of terabytes too
_WRITTEN = "async_write_complete"  # where Orbax's processes meet, each with its own arrays on disk
_MERGED = "manifest.ocdbt"  # of the arrays of all processes
_RECENT_LOSS = "recent_loss"  # the one array that a checkpoint may lack or have too much

_logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one training run.

    Attributes:
      directory: where they are.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        keep_every: int = 0,
        left_out: Callable[[str], bool] | None = None,
    ):
        """Opens the directory, and creates it when it is not there.

        Args:
          directory: of the checkpoints.
          keep: how many of the newest stay. keep_every: those at multiples of it stay for ever; 0
            for none.
          left_out: arrays by name ("params.norm.scale") that are not written, as they are known; None
            for none.

        Raises:
          UserError: Orbax cannot save under this path.
        """
        self._left_out = left_out or (lambda name: False)
        self.directory = pathlib.Path(directory).absolute()
        check_path(self.directory)
        self._arrays: dict[str, list[Any]] = {}
        self._saving = -1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every or None,
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=_COMMIT_SECONDS,
                barrier_sync_fn=self._hash_and_meet,
                post_finalization_callback=self._seal,
            ),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState) -> None:
        """Starts writing the state under its step, once the write before it has ended.

        Raises:
          OSError: the write before this one failed, as on a full disk.
        """
        self.wait()
        leaves = {n: leaf for n, leaf in named_leaves(state).items() if not self._left_out(n)}
        self._arrays = describe_arrays(leaves)
        self._saving = int(state.step)
        self._manager.save(self._saving, args=ocp.args.StandardSave(leaves), force=True)

    @property
    def writing(self) -> bool:
        """Whether the last save is not on disk yet."""
        return self._manager.is_saving_in_progress()

    def must_stop(self, step: int, signalled: bool) -> bool:
        """Whether to save and stop after this step: the same answer in every process.

        Args:
          step: updates made. signalled: whether this process was asked to stop; with several
            processes JAX's own preemption service is asked, which makes them agree on a step.
        """
        if jax.process_count() == 1:
            return signalled
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          OSError: it could not be written.
        """
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as error:
            # With several processes the others may still be writing: the next start removes it then.
            for path in self._temporary() if jax.process_count() == 1 else ():
                shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, OSError):
                raise
            # TensorStore reports a full disk as a ValueError.
            reason = "No space left on device" if "o space left" in str(error) else str(error)
            raise OSError(f"{self.directory / str(self._saving)}: {reason}") from error

    def close(self) -> None:
        """Waits for the last write and frees Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """The newest undamaged checkpoint, or None where there is none.

        Damaged ones are renamed to STEP.damaged, with a warning for each.

        Args:
          abstract: shapes, dtypes and shardings of the state, as step.abstract_state gives them.

        Returns:
          The state; arrays that were left out are those of `abstract`.

        Raises:
          UserError: it belongs to another model or optimiser; names the array that differs.
        """
        step = self._newest_undamaged()
        self._manager.reload()
        if not step:
            return None
        there = saved_arrays(self.directory, int(step))
        known = {n for n in named_leaves(abstract) if self._left_out(n) and n not in there}
        return restore_state(self.directory / step, abstract, known)

    def _newest_undamaged(self) -> str:
        """The newest checkpoint that is as it was sealed, or nothing; sets damaged ones aside."""
        while step := from_first(lambda: str(latest_step(self.directory) or "")):
            path = self.directory / step
            share = (jax.process_index(), jax.process_count())
            problem = first_answer(lambda: find_damage(path, share) or "")  # noqa: B023
            if not problem:
                break
            together(lambda: set_aside(path, problem) if is_first() else None)  # noqa: B023
        return step

    def _temporary(self) -> list[pathlib.Path]:
        """Where Orbax is writing, if it is."""
        return list(self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*"))

    def _hash_and_meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barrier of all processes; before that of the written arrays, each hashes its own."""
        if _WRITTEN in key:
            with contextlib.suppress(OSError, UserError):  # the first process hashes what lacks
                for path in self._temporary():
                    hashed_files.write_list(path, jax.process_index())
        ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _seal(self) -> None:
        """Adds the seal to the checkpoint that is about to be renamed to its final name."""
        if jax.process_index() != 0:
            return
        (path,) = self._temporary()
        if not (path / _ITEM / _MERGED).is_file():  # nothing could be restored
            raise OSError(f"Orbax did not merge the arrays of {path / _ITEM}: expected {_MERGED}")
        entries = hashed_files.collect(path)
        seal = {"format_version": FORMAT_VERSION, "arrays": self._arrays, "files": entries}
        files.write_atomically(path / SEAL, json.dumps(seal, indent=1).encode())


def check_path(path: pathlib.Path) -> None:
    """Refuses a path that Orbax takes for a pattern: it would save there, but not find its files.

    Raises:
      UserError: the path contains one of * ? [ and the backslash.
    """
    for character in "*?[\\":
        if character in str(path):
            raise UserError(f"{path}: Orbax cannot save there, expected a path without {character}")


def latest_step(directory: str | os.PathLike) -> int | None:
    """The step of the newest checkpoint in a directory, damaged or not; None without any."""
    folder = pathlib.Path(directory)
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return max(steps, default=None)


def restore_params(
    directory: str | os.PathLike,
    abstract_params: Any,
    step: int | None = None,
    *,
    part: str = "params",
    all_of_it: bool = True,
    may_lack: bool = False,
) -> tuple[int, Any]:
    """The parameters alone of a run's newest undamaged checkpoint; writes and renames nothing.

    Args:
      directory: the run's checkpoints.
      abstract_params: a tree of jax.ShapeDtypeStruct with shardings; other shapes are refused.
      step: of which step, or None for the newest.
      part: "params", or "average" for the moving average of them.
      all_of_it: whether parameters that the tree does not have are refused.
      may_lack: whether parameters that the checkpoint does not have stay as they are in the tree.

    Returns:
      The step, and a tree like `abstract_params` of arrays.

    Raises:
      UserError: there is no such checkpoint, or it belongs to another model.
    """
    directory = pathlib.Path(directory).absolute()
    steps = sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())
    candidates = steps[::-1] if step is None else [step]
    if step is not None and step not in steps:
        raise UserError(f"{directory}: no checkpoint of step {step}, expected one of {steps}")
    for candidate in candidates:
        path = directory / str(candidate)
        problem = find_damage(path)
        if problem is None:
            if not any(name.startswith(f"{part}.") for name in _read_arrays(path)):
                raise UserError(f"{path} holds no {part}: expected TrainConfig.average_decay there")
            whole, tree = f"{part}." if all_of_it else None, {part: abstract_params}
            there = _read_arrays(path)
            known = {name for name in named_leaves(tree) if may_lack and name not in there}
            try:
                return candidate, _restore(path, tree, whole, known)[part]
            except DamagedError as error:  # found as it was read from a bucket
                problem = str(error)
        warn_damaged(path, problem)
    raise UserError(f"{directory}: no undamaged checkpoint, expected that of a training run")


def find_damage(path: pathlib.Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """The damage to a checkpoint's files, or None: they are those that were sealed.

    Args:
      path: of the checkpoint. share: (i, n) for the content of every n-th file only, from i on.

    Raises:
      UserError: it was written in another format than this code reads.
    """
    try:
        seal = files.read_json(path / SEAL)
        sealed = seal["files"]
    except (OSError, ValueError, KeyError):
        return f"no readable {SEAL}"
    if seal.get("format_version") == sealed_parts.FORMAT_VERSION:
        return sealed_parts.find_damage(path, sealed)
    if seal.get("format_version") != FORMAT_VERSION:
        version = seal.get("format_version")
        raise UserError(f"checkpoint {path} has format {version}: expected {FORMAT_VERSION}")
    return hashed_files.find_damage(path, sealed, share)


def saved_arrays(directory: str | os.PathLike, step: int) -> set[str]:
    """Names of the arrays in a checkpoint, as in "params.norm.scale"."""
    return set(_read_arrays(pathlib.Path(directory) / str(step)))


def restore_state(path: pathlib.Path, abstract: TrainState, known: Set[str]) -> TrainState:
    """Reads a state; recent losses begin again where the checkpoint was written without."""
    begun = abstract.recent_loss
    if begun is None or _RECENT_LOSS in _read_arrays(path):
        return _restore(path, abstract, known=known)
    state = _restore(path, dataclasses.replace(abstract, recent_loss=None), known=known)
    zeros = np.zeros(begun.shape, begun.dtype)
    spread = jax.make_array_from_callback(begun.shape, begun.sharding, lambda i: zeros[i])
    return dataclasses.replace(state, recent_loss=spread)


def _read_arrays(path: pathlib.Path) -> dict[str, list[Any]]:
    """{name: [shape, dtype]} of a checkpoint."""
    return files.read_json(path / SEAL)["arrays"]


def _restore(
    path: pathlib.Path, abstract: Any, whole: str | None = "", known: Set[str] = frozenset()
) -> Any:
    """Reads the arrays of a tree from an undamaged checkpoint.

    All those whose names begin with `whole` have to be in the tree; none has to for None. Those that
    are `known` stay as they are in `abstract`.
    """
    every = named_leaves(abstract)
    leaves = {name: leaf for name, leaf in every.items() if name not in known}
    together(lambda: check_arrays(path, describe_arrays(leaves), whole))
    seal = files.read_json(path / SEAL)
    if seal["format_version"] == sealed_parts.FORMAT_VERSION:
        arrays = together(lambda: sealed_parts.load(path, seal, leaves))
    else:
        arrays = _restore_with_orbax(path, leaves, whole)
    values = [arrays[name] if name in leaves else leaf for name, leaf in every.items()]
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


def _restore_with_orbax(
    path: pathlib.Path, leaves: dict[str, Any], whole: str | None
) -> dict[str, Any]:
    """Reads arrays by name."""
    args = ocp.args.PyTreeRestore(
        item=leaves,
        restore_args=ocp.checkpoint_utils.construct_restore_args(leaves),
        partial_restore=whole != "" or _RECENT_LOSS not in leaves,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path / _ITEM, args=args)


def check_arrays(path: pathlib.Path, expected: dict[str, list[Any]], whole: str | None) -> None:
    """Refuses a checkpoint whose arrays are not those of the model and optimiser."""
    arrays = _read_arrays(path)
    for name, (shape, dtype) in expected.items():
        if name not in arrays:
            raise UserError(f"checkpoint {path} lacks {name}: expected {dtype}{shape}")
        if arrays[name] != [shape, dtype]:
            actual = f"{arrays[name][1]}{arrays[name][0]}"
            raise UserError(f"checkpoint {path}: {name} is {actual}, expected {dtype}{shape}")
    for name in arrays:
        inside = whole is not None and name.startswith(whole) and name != _RECENT_LOSS
        if inside and name not in expected:
            raise UserError(f"checkpoint {path} holds {name}, which this model does not have")


def describe_arrays(leaves: dict[str, Any]) -> dict[str, list[Any]]:
    """{name: [shape, dtype]} as JSON gives it back."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves.items()}


def warn_damaged(path: pathlib.Path, problem: str) -> None:
    """Says that a checkpoint is not used."""
    _logger.warning("checkpoint %s is damaged (%s): using the one before it", path, problem)


def set_aside(path: pathlib.Path, problem: str) -> None:
    """Renames a damaged checkpoint, with a warning, so that its step can be written again."""
    warn_damaged(path, problem)
    target = path.with_name(f"{path.name}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(target)
