"""Whether a run can be made again from its record, and whether the result is the same.

A run's directory is enough. config.gin has every setting, parents.json the hashes of the data, and
metrics.jsonl the losses to compare with. versions.json has the data's path, the code's revision, the
packages and the hardware.
"""

import logging
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from retro_jax.errors import UserError
from retro_jax.storage import files
from retro_jax.train import record
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step
from retro_jax.train.curves import METRICS_FILE, read_curve, without_clock

_SHOWN = 5  # differences in a message


def check(
    run: pathlib.Path, settings: str, *, parents: Mapping[str, str], free: Collection[str]
) -> None:
    """Refuses other data and settings than a recorded run had; warns of other versions.

    Args:
      run: the recorded one. settings: of this run, as record.settings_text writes them.
      parents: hashes of the data that was opened.
      free: settings that may differ, as in record.claim.

    Raises:
      UserError: the run cannot be replayed with them.
    """
    recorded = files.read_json(run / record.PARENTS_FILE)
    for name in sorted({*recorded, *parents}):
        then, value = recorded.get(name, "(none)")[:12], parents.get(name, "(none)")[:12]
        if then != value:
            raise UserError(f"{run} was trained on {name} {then}: expected that, found {value}")
    old = record.parse_settings((run / record.CONFIG_FILE).read_text(encoding="utf-8"))
    new = record.parse_settings(settings)
    for name in sorted({*old, *new}):
        if old.get(name) == new.get(name) or name in free or name.split(".")[0] in free:
            continue
        if name in old:
            value = new.get(name, "no such")
            raise UserError(f"{run} has {name} = {old[name]}: expected the same, found {value}")
        _warn(f"{run} is older than the setting {name}: {new[name]} is taken")
    for line in differences(last_start(run), record.versions()):
        _warn(f"not as in {run}: {line}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences between two entries of versions.json, a line each: "packages.jax 0.9 -> 0.10"."""
    lines = []
    for part in ("python", "git", "hardware", "environment", "packages"):
        before, after = _flat(part, old.get(part)), _flat(part, new.get(part))
        names = sorted(n for n in {*before, *after} if before.get(n) != after.get(n))
        lines += [
            f"{n} {before.get(n, '(none)')} -> {after.get(n, '(none)')}" for n in names[:_SHOWN]
        ]
        if len(names) > _SHOWN:
            lines.append(f"{part}: {len(names) - _SHOWN} more")
    return lines


def compare(run: pathlib.Path, again: pathlib.Path) -> str:
    """Compares the curves of a run and of its replay.

    Returns:
      The message when they are the same bit for bit.

    Raises:
      UserError: they differ; names the first step and both values.
    """
    before = {line["step"]: without_clock(line) for line in read_curve(run / METRICS_FILE)}
    lines = 0
    for line in read_curve(again / METRICS_FILE):
        old, new = before.get(line["step"]), without_clock(line)
        if old is None or old["steps"] != new["steps"]:  # one of them was interrupted there
            continue
        lines += 1
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                raise UserError(
                    f"{again} is not as {run}: at step {line['step']} {name} was {old.get(name)} and "
                    f"is {new.get(name)}; expected the same bits"
                )
    if not lines and latest_step(run / CHECKPOINTS) == latest_step(again / CHECKPOINTS) == 0:
        return f"{again}: a run of 0 steps as {run}, begun with the same weights"
    if not lines:
        raise UserError(f"{again} and {run} have no line of {METRICS_FILE} to compare")
    return f"{again}: the same as {run} bit for bit, in all {lines} lines of {METRICS_FILE}"


def last_start(run: pathlib.Path) -> dict[str, Any]:
    """The newest entry of a run's versions.json."""
    path = run / record.VERSIONS_FILE
    try:
        return files.read_json(path)["starts"][-1]
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path}: expected what launch.train records") from error


def _flat(name: str, value: Any) -> dict[str, str]:
    """Nested entries as {"a.b": text}."""
    if not isinstance(value, Mapping):
        return {} if value is None else {name: str(value)}
    return {n: t for key, inner in value.items() for n, t in _flat(f"{name}.{key}", inner).items()}


def _warn(text: str) -> None:
    """A line on standard error."""
    logging.getLogger(__name__).warning("%s", text)
