"""The tensors of a Hugging Face folder: one model.safetensors, or shards with an index."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from retro_jax.errors import UserError
from retro_jax.storage import files

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor: the file, its dtype there, its shape, and where its bytes are in the file."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def check_dtype(self, name: str) -> None:
        """Raises a UserError naming the tensor unless its dtype is one of DTYPES."""
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.path}: tensor {name} has dtype {self.dtype}: expected one of {sorted(DTYPES)}"
            )

    def map(self) -> np.ndarray:
        """The tensor as a read-only map of the file."""
        return self.data().view(DTYPES[self.dtype]).reshape(self.shape)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of the map."""
        return self.map()[first:last]

    def data(self) -> np.ndarray:
        """Its bytes as a read-only map."""
        return np.memmap(self.path, np.uint8, "r", self.start, (self.stop - self.start,))


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a folder.

    Raises:
      UserError: none is there, or the index names one that is not.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        names = files.read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{index} has no weight_map: expected tensor names with their files")
        for name in names.values():
            if not name or pathlib.PurePath(name).name != name:
                raise UserError(f"{index} names a file {name!r}: expected one beside it")
        if (folder / SINGLE_FILE).is_file() and SINGLE_FILE not in names.values():
            raise UserError(f"{folder} has {SINGLE_FILE} and {INDEX_FILE}: expected one of them")
        paths = [folder / name for name in sorted(set(names.values()))]
    else:
        paths = [folder / SINGLE_FILE]
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"{path} is missing: expected {SINGLE_FILE}, or shards with {INDEX_FILE}"
            )
    return paths


def read_header(path: pathlib.Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """The header's bytes, and every tensor in the order of their data.

    Raises:
      UserError: the file is no safetensors file, or truncated.
    """
    try:
        # The package checks that the header fits the file, and that the tensors fill it.
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): expected a safetensors file, not truncated"
        ) from error
    with open(path, "rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
    fields: dict[str, Any] = json.loads(header[8:])
    fields.pop("__metadata__", None)
    begin = len(header)
    tensors = {}
    for name, entry in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[name] = StoredTensor(path, entry["dtype"], shape, begin + start, begin + stop)
    return header, tensors
