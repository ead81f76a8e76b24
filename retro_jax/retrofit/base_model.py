"""An existing language model on disk, read one canonical tensor at a time.

    base = open_base("SmolLM2-135M")           a Hugging Face folder, or a .gguf file
    base.config                                BaseConfig
    parameters = base.load(place)              place(name, array) -> anything; {name: its result}

Opening checks the names and shapes of all tensors, and reads none but a tied read-out. See canonical.py
for the names.
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrofit.architectures import ARCHITECTURES
from retro_jax.retrofit.canonical import parameter_shapes
from retro_jax.retrofit.config import BaseConfig
from retro_jax.retrofit.fields import Fields, naming
from retro_jax.retrofit.gguf_names import ROPE_FACTORS, gguf_config, gguf_tensors
from retro_jax.retrofit.layout import FileTensor, parts_of, read_part
from retro_jax.retrofit.safetensors_files import StoredTensor, read_header, weight_files
from retro_jax.storage import files
from retro_jax.storage.gguf_file import open_gguf

CONFIG_FILE = "config.json"
READ_OUTS = ("lm_head.weight", "embed_out.weight")  # of folders, also of tied models
_BLOCK = 1 << 24  # bytes that are hashed or compared at once
Path = str | os.PathLike[str]
Placed = TypeVar("Placed")


class Stored(Protocol):
    """One tensor as a file stores it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    def rows(self, first: int, last: int) -> np.ndarray:
        """Rows [first, last), as numbers."""
        ...

    def data(self) -> np.ndarray:
        """Its bytes as they are in the file."""
        ...


class BaseModel:
    """A base model, opened by `open_base`.

    Attributes:
      path: the folder or the GGUF file.
      config: BaseConfig.
      tensors: where the canonical tensors are within the file's.
      stored: name of `tensors` -> the file's tensor.
    """

    def __init__(
        self,
        path: pathlib.Path,
        config: BaseConfig,
        tensors: list[FileTensor],
        stored: Mapping[str, Stored],
    ):
        self.path, self.config = path, config
        self.tensors, self.stored = tensors, stored
        self._parts = parts_of(tensors)

    def read(self, name: str, dtype: np.typing.DTypeLike = np.float32) -> np.ndarray:
        """One canonical tensor as a new array: converted block by block, without other copies.

        Args:
          name: a canonical name, with the number of its layer.
          dtype: of the result; ml_dtypes.bfloat16 too.
        """
        tensor, part = self._parts[name]
        return read_part(self.stored[tensor.name].rows, tensor.shape[0], part, dtype)

    def stream(self, dtype: np.typing.DTypeLike = np.float32) -> Iterator[tuple[str, np.ndarray]]:
        """Every canonical tensor with its name, in the order of parameter_shapes, each read when asked."""
        for name in parameter_shapes(self.config):
            yield name, self.read(name, dtype)

    def load(
        self,
        place: Callable[[str, np.ndarray], Placed],
        dtype: np.typing.DTypeLike = np.float32,
    ) -> dict[str, Placed]:
        """Gives every tensor to `place`, one at a time, and collects the results.

        The host's memory has one tensor, besides those that `place` keeps.

        Args:
          place: (canonical name, array of its shape) -> anything, a jax.Array on a mesh say. The array
            belongs to it.
          dtype: of the arrays.
        """
        return {name: place(name, self.read(name, dtype)) for name in parameter_shapes(self.config)}

    def fingerprint(self) -> str:
        """SHA-256 of all weights: names, shapes and bytes; equal for a folder that was sharded again."""
        digest = hashlib.sha256()
        for tensor in self.tensors:
            digest.update(f"{tensor.name} {tensor.shape}\n".encode())
            data = self.stored[tensor.name].data()
            for start in range(0, len(data), _BLOCK):
                digest.update(data[start : start + _BLOCK].data)
        return digest.hexdigest()


def open_base(path: Path) -> BaseModel:
    """Opens a Hugging Face folder or a GGUF file.

    Raises:
      UserError: nothing there, no JSON, an unknown architecture, setting or tensor, a missing tensor,
        a wrong shape, a truncated file. It names the file and the thing.
    """
    location = pathlib.Path(path)
    if location.is_dir():
        return _open_folder(location)
    if location.suffix != ".gguf":
        raise UserError(
            f"{location} is no base model: expected a Hugging Face folder or a .gguf file"
        )
    file = open_gguf(location)
    with naming(location):
        config, names = gguf_config(file)
    _check_layers(location, config, file.tensors)
    tensors = gguf_tensors(config, names)
    _check(location, tensors, file.tensors, re.escape(ROPE_FACTORS))
    with naming(location):
        for tensor in tensors:
            file.tensors[tensor.name].rows(0, 1)  # refuses types that cannot be dequantised
    return BaseModel(location, config, tensors, file.tensors)


def context_length(path: Path) -> int:
    """The longest context that a base model was trained for, in tokens."""
    return open_base(path).config.context_length


def read_config(folder: Path) -> BaseConfig:
    """The configuration in a Hugging Face folder's config.json.

    Raises:
      UserError: no such file, no JSON, an unknown architecture, or a setting that is not read.
    """
    path = pathlib.Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: expected that of a Hugging Face folder")
    fields = Fields(files.read_json(path), str(path))
    names = fields.values.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    if not (isinstance(first, str) and first in ARCHITECTURES):
        raise fields.error("architectures", f"one of {sorted(ARCHITECTURES)}")
    known = (ARCHITECTURES[first].model_type, *ARCHITECTURES[first].other_types)
    if fields.values.get("model_type", known[0]) not in known:
        raise fields.error("model_type", f"{' or '.join(map(repr, known))} with {first}")
    with naming(path):
        return BaseConfig(architecture=first, **ARCHITECTURES[first].read_config(fields))


def _open_folder(folder: pathlib.Path) -> BaseModel:
    """A Hugging Face folder."""
    config = read_config(folder)
    architecture = ARCHITECTURES[config.architecture]
    file_tensors: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        tensors_of_file = read_header(path)[1]
        if twice := file_tensors.keys() & tensors_of_file.keys():
            raise UserError(
                f"{path} has a tensor {min(twice)}, which another file has too: expected it once"
            )
        file_tensors |= tensors_of_file
    prefix = architecture.prefix
    if not any(name.startswith(prefix) for name in file_tensors):
        file_tensors = {
            name if name.startswith("lm_head") else prefix + name: t
            for name, t in file_tensors.items()
        }
    _check_layers(folder, config, file_tensors)
    tensors = architecture.tensors(config)
    ignored = architecture.ignored
    if config.tie_embeddings:
        ignored += "|" + "|".join(map(re.escape, READ_OUTS))
    _check(folder, tensors, file_tensors, ignored)
    for tensor in tensors:
        file_tensors[tensor.name].check_dtype(tensor.name)
    if config.tie_embeddings:
        (embedding,) = (t.name for t in tensors if t.parts[0].name == "embedding")
        _check_copies(folder, embedding, file_tensors)
    return BaseModel(folder, config, tensors, file_tensors)


def _check_copies(folder: pathlib.Path, embedding: str, stored: Mapping[str, StoredTensor]) -> None:
    """Refuses a read-out of its own where the settings tie it to the embedding."""
    for name in READ_OUTS:
        if name not in stored:
            continue
        same, copy = stored[embedding], stored[name]
        equal = (same.dtype, same.shape) == (copy.dtype, copy.shape)
        if not (equal and _equal_bytes(same.data(), copy.data())):
            raise UserError(
                f"{folder}: tensor {name} is not {embedding}: expected a copy of it, as"
                " tie_word_embeddings is true"
            )


def _equal_bytes(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether two maps of one size have the same bytes."""
    starts = range(0, len(left), _BLOCK)
    return all(np.array_equal(left[i : i + _BLOCK], right[i : i + _BLOCK]) for i in starts)


def _check_layers(path: pathlib.Path, config: BaseConfig, stored: Mapping[str, Stored]) -> None:
    """Refuses more layers than there are tensors, before their names are made."""
    if config.num_layers > len(stored):
        raise UserError(
            f"{path} has {len(stored)} tensors: expected those of {config.num_layers} layers, which its"
            " settings state"
        )


def _check(
    path: pathlib.Path, tensors: list[FileTensor], stored: Mapping[str, Stored], ignored: str
) -> None:
    """Raises unless the file has just these tensors, in their shapes."""
    expected = {tensor.name: tensor.shape for tensor in tensors}
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"{path} has no tensor {name}: expected one of shape {shape}")
        if stored[name].shape != shape:
            raise UserError(
                f"{path}: tensor {name} has shape {stored[name].shape}: expected {shape}"
            )
    for name in stored:
        if name not in expected and not re.fullmatch(ignored, name):
            raise UserError(
                f"{path} has a tensor {name}: expected none of this name in its architecture"
            )
