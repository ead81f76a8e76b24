"""What a run leaves in its directory about itself, and the refusal to mix two runs in one.

config.gin      every setting in force, defaults included, sorted; can be given as --gin_file
parents.json    hashes of the artefacts that the run reads
versions.json   for each start that differs from the one before: Python, packages, git revision
                (and whether the working tree differed from it), hardware, where the data lies
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Collection, Mapping
from typing import Any

import jax

from launch.common.configurables import default_of, parse_bindings
from retro_jax.errors import UserError

CONFIG_FILE, PARENTS_FILE, VERSIONS_FILE = "config.gin", "parents.json", "versions.json"
# Variables that change what is computed, or how.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "JAX_ENABLE_X64")
_SHOWN = 5  # differences in an error
_HASH_DIGITS = 12


def claim(
    directory: str | os.PathLike,
    settings: str,
    *,
    parents: Mapping[str, str],
    free: Collection[str] = (),
    begun: bool = True,
    data: str = "",
) -> None:
    """Records a run's settings in its directory, or checks them against those recorded.

    Args:
      directory: the run's; made when it is not there.
      settings: configurables.operative_config().
      parents: hash of each artefact that the run reads, by name.
      free: settings ("Class.field", or "Class" for all of it) that may differ from those recorded;
        the new values are then recorded.
      begun: whether the directory holds results; where not, what is recorded is replaced.
      data: where the artefacts lie.

    Raises:
      UserError: the directory belongs to a run of other settings or data; says which, old -> new.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config, lineage = directory / CONFIG_FILE, directory / PARENTS_FILE
    new = parse_bindings(settings)
    if begun and config.exists():
        old = parse_bindings(config.read_text(encoding="utf-8"))
        fixed = {n for n in old | new if n not in free and n.split(".")[0] not in free}
        # A setting that came after the run began was its default then: it could not be otherwise.
        fixed -= {n for n in new if n not in old and new[n] == default_of(n)}
        _refuse(directory, "settings", _only(old, fixed), _only(new, fixed))
    if begun and lineage.exists():
        short = {n: h[:_HASH_DIGITS] for n, h in parents.items()}
        recorded = {n: h[:_HASH_DIGITS] for n, h in _read_json(lineage).items()}
        _refuse(directory, "data", recorded, short)
    _write(config, settings)
    _write(lineage, json.dumps(dict(parents), indent=1, sort_keys=True) + "\n")
    record_versions(directory, data)


def record_versions(directory: str | os.PathLike, data: str = "") -> None:
    """Appends this start to versions.json, unless it is like the one before it."""
    path = pathlib.Path(directory) / VERSIONS_FILE
    starts = _read_json(path)["starts"] if path.exists() else []
    now = versions() | ({"data": data} if data else {})
    if not starts or starts[-1] != now:
        _write(path, json.dumps({"starts": [*starts, now]}, indent=1, sort_keys=True) + "\n")


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
    """The commit this code is of and whether tracked files differ from it; None outside of git."""
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
    directory: pathlib.Path, what: str, old: Mapping[str, str], new: Mapping[str, str]
) -> None:
    """Raises when old and new differ."""
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    if not names:
        return
    shown = [f"{n} {old.get(n, '(absent)')} -> {new.get(n, '(absent)')}" for n in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise UserError(
        f"{directory} belongs to a run of other {what}: {'; '.join(shown)}{more}; expected "
        "the same, or another --workdir"
    )


def _only(values: Mapping[str, str], names: Collection[str]) -> dict[str, str]:
    """The entries of some names."""
    return {name: value for name, value in values.items() if name in names}


def _read_json(path: pathlib.Path) -> Any:
    """A JSON file of ours."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: expected JSON as this project writes it ({error})") from error


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
