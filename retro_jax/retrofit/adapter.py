"""The parameters that fitting adds to a base model, as files to share: a folder of two.

    adapter.safetensors    gates, CCA and encoder: the tensors that are not copies of the base's
    adapter.json           format, the base's fingerprint, and the settings that no base decides

The base's own weights are not in it. It loads beside the untouched folder or GGUF file.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.retrofit.base_model import BaseModel, Path
from retro_jax.retrofit.decoder import (
    FITTED_FIELDS,
    decoder_config,
    decoder_settings,
    fitted_parameters,
    load_decoder,
)
from retro_jax.retrofit.safetensors_files import read_header
from retro_jax.storage import files
from retro_jax.train.parameter_names import named_leaves

TENSORS_FILE, SETTINGS_FILE = "adapter.safetensors", "adapter.json"
FORMAT_VERSION = 1
_ADDED = ("cca.", "encoder.")
_GATE = "cca.gate"


def export_adapter(directory: Path, base: BaseModel, model: Retro) -> int:
    """Writes the parameters that a model adds to its base.

    Args:
      directory: where the two files go; an adapter that is there is replaced.
      base: whose weights the model's decoder has. model: as it was fitted, on one device.

    Returns:
      The bytes of both files.

    Raises:
      UserError: the model's decoder is another one, or has other weights than the base.
    """
    params = named_leaves(nnx.state(model))
    begun = fitted_parameters(base, model.config, params)
    added: dict[str, np.ndarray] = {}
    for name, leaf in params.items():
        value = np.asarray(leaf)
        same = name in begun and value.tobytes() == np.asarray(begun[name]).tobytes()
        if not same and not name.startswith(_ADDED):
            raise UserError(
                f"{name} is not that of {base.path}: expected a run that trains cca.* and encoder.*"
            )
        if not same or name == _GATE:
            added[name] = value
    settings = {
        "format_version": FORMAT_VERSION,
        "architecture": base.config.architecture,
        "fingerprint": base.fingerprint(),
        "retro": _own_settings(base, model.config),
    }
    folder = pathlib.Path(directory)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    data = {TENSORS_FILE: save(added), SETTINGS_FILE: files.to_json(files.plain(settings))}
    for name, content in data.items():
        files.write_atomically(folder / name, content)
    return sum(map(len, data.values()))


def load_adapter(
    directory: Path,
    base: BaseModel,
    execution: ExecutionConfig = ExecutionConfig(),
    *,
    mesh: Mesh | None = None,
) -> Retro:
    """The fitted model of an adapter and its base.

    Args:
      directory: of the adapter. base: the model that it was fitted to. execution: how it is computed.
      mesh: where it goes; None for the first device.

    Raises:
      UserError: a file is missing, damaged or of another format, or the adapter has another base.
    """
    folder = pathlib.Path(directory)
    for name in (SETTINGS_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: expected that of an adapter")
    settings = files.read_json(folder / SETTINGS_FILE)
    if settings.get("format_version") != FORMAT_VERSION:
        version = settings.get("format_version")
        raise UserError(f"{folder} has format {version!r}: expected {FORMAT_VERSION}")
    fingerprint = base.fingerprint()
    if settings.get("fingerprint") != fingerprint:
        expected = str(settings.get("fingerprint"))[:12]
        raise UserError(
            f"{folder} was fitted to another base than {base.path}: expected weights {expected},"
            f" found {fingerprint[:12]}"
        )
    config = _config(base, settings.get("retro"), folder / SETTINGS_FILE)
    tensors = read_header(folder / TENSORS_FILE)[1]
    for name, stored in tensors.items():
        stored.check_dtype(name)
    model = load_decoder(base, config, execution, mesh=mesh)
    params = nnx.state(model)
    leaves = named_leaves(params)
    for name, stored in tensors.items():
        leaf = leaves.get(name)
        if leaf is None or leaf.shape != stored.shape or not name.startswith(_ADDED):
            expected = "no such tensor" if leaf is None else str(leaf.shape)
            raise UserError(
                f"{folder / TENSORS_FILE}: {name} has shape {stored.shape}: expected {expected}"
            )
        leaves[name] = jax.device_put(np.array(stored.map()), leaf.sharding)
    if config.form.gated_cca and _GATE not in tensors:
        raise UserError(
            f"{folder / TENSORS_FILE} has no tensor {_GATE}: expected one, as adapters have"
        )
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(params), list(leaves.values())))
    return model


def _own_settings(base: BaseModel, config: RetroConfig) -> dict[str, Any]:
    """The settings that no base decides."""
    decided = decoder_settings(base.config).keys() | {"form"}
    names = [f.name for f in dataclasses.fields(config) if f.name not in decided]
    settings = {name: getattr(config, name) for name in names}
    return settings | {"form": {name: getattr(config.form, name) for name in FITTED_FIELDS}}


def _config(base: BaseModel, stored: Any, path: pathlib.Path) -> RetroConfig:
    """The configuration of an adapter and its base."""
    try:
        fields: Any = {n: tuple(v) if isinstance(v, list) else v for n, v in stored.items()}
        return decoder_config(base.config, **fields)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{path} has other settings ({error}): expected an adapter's") from error
