"""Arrays that a stage keeps for its workers: each maps them, so all of a machine share the memory."""

import pathlib
from collections.abc import Sequence

import numpy as np

from retro_jax.storage import files


def write(path: pathlib.Path, arrays: Sequence[np.ndarray]) -> None:
    """Writes PATH-0.npy, PATH-1.npy and so on."""
    for i, array in enumerate(arrays):
        files.write_arrays(_path(path, i), [array])


def there(path: pathlib.Path, count: int) -> bool:
    """Whether `write` has written so many arrays."""
    return all(_path(path, i).is_file() for i in range(count))


def mapped(path: pathlib.Path, count: int) -> list[np.ndarray]:
    """The arrays that `write` wrote."""
    return [np.load(_path(path, i), mmap_mode="r") for i in range(count)]


def _path(path: pathlib.Path, index: int) -> pathlib.Path:
    """Where one of several arrays is."""
    return path.with_name(f"{path.name}-{index}.npy")
