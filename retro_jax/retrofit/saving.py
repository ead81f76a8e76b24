"""A base model saved in the Hugging Face layout, with some of its tensors changed.

From a folder, every file is written as it was: the same shards, headers, dtypes, and for untouched
tensors the same bytes. From a GGUF file, all tensors are dequantised into new files.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from retro_jax.errors import UserError
from retro_jax.retrofit.architectures import ARCHITECTURES
from retro_jax.retrofit.base_model import (
    CONFIG_FILE,
    READ_OUTS,
    BaseModel,
    Path,
    read_config,
)
from retro_jax.retrofit.canonical import parameter_shapes
from retro_jax.retrofit.layout import FileTensor, write_part
from retro_jax.retrofit.safetensors_files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    read_header,
    weight_files,
)
from retro_jax.storage import files

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot")
_SHARD_BYTES = 5_000_000_000
Changed = Mapping[str, Any]


def save_hugging_face(
    base: BaseModel,
    directory: Path,
    changed: Changed | None = None,
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a folder that transformers opens; one tensor is in memory at a time.

    Args:
      base: a model opened from a folder or a GGUF file.
      directory: where it goes: not there yet, or empty. It appears when it is whole.
      changed: canonical name (with the layer's number) -> array of its shape, NumPy's or JAX's.
        Rounded to the file's dtype.
      others: name -> bytes of files beside the weights, as a GGUF file's tokeniser.

    Raises:
      UserError: a name or shape that the base does not have, a value too large for the file's dtype,
        or a directory with something in it.
    """
    target, values = pathlib.Path(directory), changed or {}
    shapes = parameter_shapes(base.config)
    for name, value in values.items():
        if name not in shapes:
            raise UserError(f"{base.path} has no tensor {name}: expected a canonical name")
        if np.shape(value) != shapes[name]:
            raise UserError(f"{name} has shape {np.shape(value)}: expected {shapes[name]}")
        dtype = getattr(value, "dtype", None) or np.asarray(value).dtype
        if not jnp.issubdtype(dtype, jnp.number):
            raise UserError(f"{name} has dtype {dtype}: expected numbers")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is there already: expected no directory, or an empty one")
    with _appearing(target) as folder:
        if base.path.is_dir():
            _write_again(base, folder, values)
        else:
            _write_anew(base, folder, values)
        for name, data in (others or {}).items():
            files.write_atomically(folder / name, data)


def _write_again(base: BaseModel, folder: pathlib.Path, values: Changed) -> None:
    """All files of the base's folder, the changed tensors apart."""
    for path in sorted(base.path.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS:
            shutil.copyfile(path, folder / path.name)
    places = {}
    for tensor in (*base.tensors, *_tied_copies(base)):
        stored: Any = base.stored[tensor.name]
        places[stored.path, stored.start, stored.stop] = tensor  # an empty one may share the start
    for path in weight_files(base.path):
        header, tensors = read_header(path)

        def blocks(tensors: Any = tensors) -> Iterator[np.ndarray]:
            for stored in tensors.values():
                tensor = places.get((stored.path, stored.start, stored.stop))
                if tensor is None or not any(part.name in values for part in tensor.parts):
                    yield stored.data()
                    continue
                yield _filled(tensor, np.array(stored.map()), values)

        _write(folder / path.name, header, blocks())


def _tied_copies(base: BaseModel) -> list[FileTensor]:
    """The read-outs that a tied model's files have besides the embedding, as copies of it."""
    if not base.config.tie_embeddings:
        return []
    (embedding,) = (t for t in base.tensors if t.parts[0].name == "embedding")
    names = [name for name in READ_OUTS if name in base.stored]
    return [dataclasses.replace(embedding, name=name) for name in names]


def _write_anew(base: BaseModel, folder: pathlib.Path, values: Changed) -> None:
    """config.json and float32 weights of a GGUF file's model."""
    architecture = ARCHITECTURES[base.config.architecture]
    fields = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "dtype": "float32",
        **architecture.write_config(base.config),
    }
    files.write_atomically(folder / CONFIG_FILE, files.to_json(fields))
    if read_config(folder) != base.config:
        raise UserError(
            f"{base.path} has settings that no {CONFIG_FILE} of {architecture.name} states: expected"
            f" those of {architecture.model_type} in transformers"
        )
    shards = _shards(architecture.tensors(base.config))
    where: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = SINGLE_FILE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= {tensor.name: name for tensor in tensors}

        def blocks(tensors: list[FileTensor] = tensors) -> Iterator[np.ndarray]:
            for tensor in tensors:
                yield _filled(tensor, np.empty(tensor.shape, np.float32), _Read(base, values))

        _write(folder / name, _header(tensors), blocks())
    if len(shards) > 1:
        total = sum(4 * math.prod(t.shape) for tensors in shards for t in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        files.write_atomically(folder / INDEX_FILE, files.to_json(index))


class _Read(dict[str, Any]):
    """The changed tensors, and the base's own for other names."""

    def __init__(self, base: BaseModel, values: Changed):
        super().__init__(values)
        self.base = base

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> np.ndarray:
        return self.base.read(name)


def _filled(tensor: FileTensor, array: np.ndarray, values: Changed) -> np.ndarray:
    """A file's tensor with the values of its parts written into it, as bytes."""
    for part in tensor.parts:
        if part.name in values:
            with np.errstate(over="ignore"):
                value = np.asarray(values[part.name])
                write_part(part, value, array)
            if not np.isfinite(array).all() and np.isfinite(value).all():
                raise UserError(
                    f"{part.name} has values too large for {array.dtype}: expected less"
                )
    return array.reshape(-1).view(np.uint8)


def _shards(tensors: Iterable[FileTensor]) -> list[list[FileTensor]]:
    """Tensors by file, each of about _SHARD_BYTES at most."""
    shards: list[list[FileTensor]] = [[]]
    size = 0
    for tensor in tensors:
        more = 4 * math.prod(tensor.shape)
        if shards[-1] and size + more > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += more
    return shards


def _header(tensors: Iterable[FileTensor]) -> bytes:
    """A safetensors header of float32 tensors, one after the other."""
    (dtype,) = (name for name, each in DTYPES.items() if each == np.float32)
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 4 * math.prod(tensor.shape)
        fields[tensor.name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(path: pathlib.Path, header: bytes, blocks: Iterable[np.ndarray]) -> None:
    """A safetensors file of a header and the tensors' bytes."""

    def write(file: BinaryIO) -> None:
        file.write(header)
        for block in blocks:
            file.write(block.data)

    with files.writing(path):
        files.write_hashed(path, write)


@contextlib.contextmanager
def _appearing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder that becomes the directory when the block ends well."""
    with files.writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=files.TEMPORARY, dir=directory.parent))
    try:
        yield folder
        with files.writing(directory):
            folder.chmod(0o755)
            os.replace(folder, directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
