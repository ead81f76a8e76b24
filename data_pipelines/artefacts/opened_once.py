"""Artefacts that a worker opens once, for all of its shards.

    tokenizer = opened_once(Tokenizer.open, directory, threads=1)

Opening a database of thousands of shards reads the header of each, so it is not done for every task.
"""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

from data_pipelines.artefacts.manifest import MANIFEST_FILE, Path, stamp_of
from retro_jax.storage import files

Opened = TypeVar("Opened")


def opened_once(opener: Callable[..., Opened], directory: Path, **options: Any) -> Opened:
    """What `opener(directory, **options)` returned the last time, if the manifest is the same file."""
    folder = pathlib.Path(files.absolute(directory))
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return opener(folder, **options)  # which reports that
    return _opened(opener, str(folder), stamp_of(manifest), tuple(sorted(options.items())))


@functools.lru_cache(maxsize=8)
def _opened(
    opener: Callable[..., Any],
    directory: str,
    stamp: tuple[int, int, int],
    options: tuple[tuple[str, Any], ...],
) -> Any:
    """As above; the stamp is part of the key only."""
    return opener(directory, **dict(options))
