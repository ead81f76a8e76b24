"""Checks of an artefact's files and settings, whose errors say what was found and what was expected."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines.artefacts.sharded_rows import header_of
from retro_jax.errors import UserError
from retro_jax.storage import files


def check_types(record: Any, **types: type) -> None:
    """Raises a TypeError unless attributes have these types."""
    for name, kind in types.items():
        value = getattr(record, name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!a}")


def shortened(parents: Mapping[str, str]) -> dict[str, str]:
    """Hashes as a reader can compare them."""
    return {role: digest[:12] for role, digest in parents.items()}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names whose values differ, each as "name: old -> new"; `prefix` goes before each."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for name in sorted(set(old) | set(new)):
            inner = f"{prefix}{name}"
            if name not in old or name not in new:
                was, now = (json.dumps(s[name]) if name in s else "absent" for s in (old, new))
                lines.append(f"{inner}: {was} -> {now}")
            else:
                deeper = isinstance(old[name], dict) and isinstance(new[name], dict)
                lines += differences(old[name], new[name], f"{inner}." if deeper else inner)
        return lines
    return [] if old == new else [f"{prefix}: {json.dumps(old)} -> {json.dumps(new)}"]


def check_shard(path: pathlib.Path, size: int, sha256: str, verify: bool) -> None:
    """Presence, size, .npy header and, on request, the hash.

    Raises:
      UserError: it is missing, truncated or changed.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: expected a shard of {size} bytes")
    length = path.stat().st_size
    if length != size:
        raise UserError(f"{path} has {length} bytes: expected {size}")
    if path.suffix == ".npy":
        _check_header(path, size)
    if verify:
        _, digest = files.measure(path)
        if digest != sha256:
            raise UserError(f"{path} has SHA-256 {digest[:12]}: expected {sha256[:12]}")


def _check_header(path: pathlib.Path, size: int) -> None:
    """Raises unless the .npy header describes a C-ordered array that fills the file exactly."""
    try:
        header = header_of(path)
    except ValueError as error:
        raise UserError(f"{path} has a bad .npy header ({error}): expected format 1.0") from error
    expected = header.offset + math.prod(header.shape) * header.dtype.itemsize
    if expected != size:
        raise UserError(
            f"{path} has {size} bytes: expected {expected}, a C-ordered {header.dtype} array of shape"
            f" {header.shape}"
        )
