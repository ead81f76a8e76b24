"""The record of a run in its directory, and the refusal to mix two runs in one.

config.gin      every setting in force, defaults included, sorted: Class.field = value
parents.json    hashes of the artefacts that the run reads
versions.json   for each start that differs from the one before: Python, packages, git revision
                (and whether the working tree differed from it), hardware, where the data is
"""

import ast
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import pprint
import subprocess
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax

from retro_jax.errors import UserError
from retro_jax.storage import files
from retro_jax.train.checkpoint import CHECKPOINTS, latest_step

CONFIG_FILE, PARENTS_FILE, VERSIONS_FILE = "config.gin", "parents.json", "versions.json"
# Variables that change the results, or how they are computed.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "JAX_ENABLE_X64")
_SHOWN = 5  # differences in an error
_HASH_DIGITS = 12
_WIDE = 1_000_000  # keeps a value in one line

T = TypeVar("T")


def settings_text(configs: Iterable[Any]) -> str:
    """Every field of some dataclasses, one "Class.field = value" per line, sorted; gin reads it.

    A field that is a dataclass is a reference to its own lines, and left out at its default.
    """
    lines = []
    for config in configs:
        name = type(config).__name__
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if not dataclasses.is_dataclass(value):
                lines.append(f"{name}.{field.name} = {pprint.pformat(value, width=_WIDE)}\n")
            elif value != field.default:
                lines.append(f"{name}.{field.name} = @{type(value).__name__}()\n")
                lines += settings_text([value]).splitlines(keepends=True)
    return "".join(sorted(lines))


def read_settings(text: str, cls: type[T]) -> T:
    """A dataclass from a settings text, as `settings_text` or gin wrote it; other lines are ignored.

    Raises:
      UserError: a value that is no literal and no reference, or one that the dataclass refuses.
    """
    settings = parse_settings(text)
    values: dict[str, Any] = {}
    types = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = f"{cls.__name__}.{field.name}"
        if name not in settings:
            continue
        if settings[name].startswith("@") and dataclasses.is_dataclass(types[field.name]):
            values[field.name] = read_settings(text, typing.cast(type, types[field.name]))
            continue
        try:
            values[field.name] = ast.literal_eval(settings[name])
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{name} is {settings[name]}: expected a literal") from error
    return cls(**values)


def changed_settings(
    directory: pathlib.Path, configs: Iterable[Any], names: tuple[str, ...]
) -> dict[str, str | None]:
    """The settings that differ from those recorded of a run: {"Class.field": "value"}.

    Args:
      directory: of the run. configs: dataclasses, which may have other values than config.gin has.
      names: what the settings' names begin with; others are left out.

    Returns:
      None as the value of a setting that is left out now, as a form at its default is.
    """
    configs = list(configs)
    text = (directory / CONFIG_FILE).read_text(encoding="utf-8")
    old = parse_settings(settings_text(read_settings(text, type(each)) for each in configs))
    new = parse_settings(settings_text(configs))
    changed = {n: new.get(n) for n in sorted(old | new) if old.get(n) != new.get(n)}
    return {name: value for name, value in changed.items() if name.startswith(names)}


def default_settings(configs: Iterable[Any]) -> dict[str, str]:
    """The defaults of some dataclasses' fields, as `settings_text` writes them."""
    defaults: dict[str, str] = {}
    for config in configs:
        for field in dataclasses.fields(config):
            if dataclasses.is_dataclass(field.default):
                defaults |= default_settings([field.default])
            elif field.default is not dataclasses.MISSING:
                defaults[f"{type(config).__name__}.{field.name}"] = repr(field.default)
    return defaults


def parse_settings(text: str) -> dict[str, str]:
    """The lines of a settings text: {"Class.field": "value"}."""
    pairs = (line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    return dict(pairs)


def recorded_parents(directory: str | os.PathLike) -> dict[str, str] | None:
    """The hashes that a run recorded of its data; None where no run has a checkpoint yet."""
    path = pathlib.Path(directory) / PARENTS_FILE
    if latest_step(pathlib.Path(directory) / CHECKPOINTS) is None or not path.is_file():
        return None
    return files.read_json(path)


def claim(
    directory: str | os.PathLike,
    settings: str,
    *,
    parents: Mapping[str, str],
    free: Collection[str] = (),
    defaults: Mapping[str, str] | None = None,
    begun: bool = True,
    data: str = "",
) -> None:
    """Records a run's settings in its directory, or checks them against those recorded.

    Args:
      directory: the run's; created when it does not exist.
      settings: as `settings_text` writes them.
      parents: hash of each artefact that the run reads, by name.
      free: settings ("Class.field", or "Class" for all of it) that may differ from those recorded;
        the new values are then recorded.
      defaults: of the settings; one that was not recorded had its default.
      begun: whether the directory has results; where not, the record is replaced.
      data: where the artefacts are.

    Raises:
      UserError: the directory belongs to a run of other settings or data; says which, old -> new.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config, lineage = directory / CONFIG_FILE, directory / PARENTS_FILE
    new = parse_settings(settings)
    if begun and config.exists():
        old = parse_settings(config.read_text(encoding="utf-8"))
        fixed = {n for n in old | new if n not in free and n.split(".")[0] not in free}
        # A setting that came after the run began was its default then: it could not be otherwise.
        fixed -= {n for n in new if n not in old and new[n] == (defaults or {}).get(n)}
        _refuse(directory, "settings", _only(old, fixed), _only(new, fixed))
    if begun and lineage.exists():
        short = {n: h[:_HASH_DIGITS] for n, h in parents.items()}
        recorded = {n: h[:_HASH_DIGITS] for n, h in files.read_json(lineage).items()}
        _refuse(directory, "data", recorded, short)
    files.write_atomically(config, settings.encode())
    files.write_atomically(lineage, files.to_json(dict(parents)))
    record_versions(directory, data)


def record_versions(directory: str | os.PathLike, data: str = "") -> None:
    """Appends this start to versions.json, unless it is like the one before it."""
    path = pathlib.Path(directory) / VERSIONS_FILE
    starts = files.read_json(path)["starts"] if path.exists() else []
    now = versions() | ({"data": data} if data else {})
    if not starts or starts[-1] != now:
        files.write_atomically(path, files.to_json({"starts": [*starts, now]}))


def versions() -> dict[str, Any]:
    """Python, packages, git revision, XLA's flags and hardware of this process."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "packages": {
            dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()
        },
        "git": git_revision(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "processes": jax.process_count(),
            "platform": devices[0].platform,
            "devices": len(devices),
            "device_kind": devices[0].device_kind,
        },
    }


def git_revision() -> dict[str, Any] | None:
    """The commit of this code and whether tracked files differ from it; None outside of git."""
    folder = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        return {
            "revision": git("rev-parse", "HEAD").strip(),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no").strip()),
        }
    except (OSError, subprocess.CalledProcessError):
        return None


def _refuse(
    directory: pathlib.Path, subject: str, old: Mapping[str, str], new: Mapping[str, str]
) -> None:
    """Raises when old and new differ."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if not names:
        return
    shown = [f"{n} {old.get(n, '(absent)')} -> {new.get(n, '(absent)')}" for n in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UserError(
        f"{directory} belongs to a run of other {subject}: {'; '.join(shown)}{more}; expected "
        "the same, or another --workdir"
    )


def _only(values: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """The entries of some names."""
    return {name: value for name, value in values.items() if name in names}
