"""A trained RETRO as two files that any library reads: model.safetensors and config.json.

    save_portable("folder", open_trained("W/retro"))
    model = open_portable("folder")

config.json has `model_type` "retro_jax" and every field of RetroConfig. The names of tensors are those of
the modules, as StartConfig and --freeze know them; layers are stacked along axis 0.
"""

import dataclasses
import os
import pathlib
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.storage import files
from retro_jax.train.parameter_names import map_named, named_leaves
from retro_jax.train.record import read_settings
from retro_jax.train.trained_model import TrainedModel

MODEL_TYPE = "retro_jax"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_portable(folder: str | os.PathLike[str], trained: TrainedModel) -> int:
    """Writes a trained model's parameters and architecture; returns how many parameters there are.

    Args:
      folder: where the two files go; made if it is not there. trained: as `open_trained` gives it.

    Raises:
      UserError: the folder has such a file already, or cannot be written.
    """
    place = pathlib.Path(folder)
    for name in (WEIGHTS, CONFIG):
        if (place / name).exists():
            raise UserError(f"{place / name} exists: expected a new folder")
    arrays = {
        name: np.asarray(leaf) for name, leaf in named_leaves(_split(trained.model)[1]).items()
    }
    config = read_settings(trained.settings, RetroConfig)
    with files.writing(place):
        place.mkdir(parents=True, exist_ok=True)
    with files.temporary_name(place / WEIGHTS) as temporary:
        save_file(arrays, temporary, {"format": "flax", "name": trained.name})
        files.replace(temporary, place / WEIGHTS)
    fields = {"model_type": MODEL_TYPE, "architectures": ["Retro"], **files.plain(config)}
    files.write_atomically(place / CONFIG, files.to_json(fields))
    return sum(array.size for array in arrays.values())


def open_portable(
    folder: str | os.PathLike[str], execution: ExecutionConfig | None = None
) -> Retro:
    """The model of a folder, on the first device.

    Args:
      folder: with model.safetensors and config.json. execution: how it is computed; by default as
        ExecutionConfig says.

    Raises:
      UserError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    place = pathlib.Path(folder)
    config = read_portable_config(place)
    execution = ExecutionConfig() if execution is None else execution
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Retro(config, execution, rngs=nnx.Rngs(0))))
    path, wanted = place / WEIGHTS, named_leaves(params)
    if not path.is_file():
        raise UserError(f"{path} is missing: expected the weights of a RETRO")
    try:
        with safe_open(path, framework="numpy") as weights:
            stored = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    for name in sorted(set(stored) ^ set(wanted)):
        what = "lacks" if name in wanted else "has an unknown"
        raise UserError(f"{path} {what} tensor {name}: expected those of {place / CONFIG}")

    def take(name: str, leaf: Any) -> jax.Array:
        if stored[name].shape != leaf.shape:
            raise UserError(
                f"{path}: tensor {name} has shape {stored[name].shape}: expected {leaf.shape}"
            )
        return jnp.asarray(stored[name], leaf.dtype)

    return nnx.merge(graphdef, map_named(take, params))


def read_portable_config(folder: pathlib.Path) -> RetroConfig:
    """The architecture in a folder's config.json.

    Raises:
      UserError: no such file, another model, or a field that RetroConfig does not have or refuses.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{path} is missing: expected that of a RETRO")
    fields = files.read_json(path)
    if fields.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{path}: model_type is {fields.get('model_type')!r}: expected {MODEL_TYPE!r}"
        )
    rest = {name: fields[name] for name in fields if name not in ("model_type", "architectures")}
    return _dataclass(RetroConfig, rest, path)


def _dataclass(cls: type, values: Any, path: pathlib.Path) -> Any:
    """A dataclass from its fields in JSON, those that are left out at their defaults."""
    types = typing.get_type_hints(cls)
    if not isinstance(values, dict) or set(values) - set(types):
        unknown = sorted(set(values) - set(types)) if isinstance(values, dict) else values
        raise UserError(f"{path} has {unknown!r}: expected fields of {cls.__name__} alone")
    made = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = _dataclass(typing.cast(type, types[name]), value, path)
        made[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**made)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not valid ({error}): expected the fields of {cls.__name__}"
        ) from error


def _split(model: Retro) -> Any:
    """The graph definition and the parameters of a model."""
    return nnx.split(model)
