"""The parameters that fitting adds to a base model, as files to share: a folder of two.

    adapter.safetensors    gates, CCA and encoder: the tensors that are not copies of the base's
    adapter.json           format, the base's fingerprint and settings, those that no base decides, how
                           texts and neighbours were read in training, and the other file's SHA-256

The base's own weights are not in it. It loads beside the untouched folder or GGUF file, as a model
(`load_adapter`) or as the first parameters of a run (StartConfig.adapter).
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Mapping
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
from retro_jax.retrofit.config import BaseConfig
from retro_jax.retrofit.decoder import (
    FITTED_FIELDS,
    base_settings,
    decoder_config,
    decoder_settings,
    fitted_parameters,
    load_decoder,
)
from retro_jax.retrofit.fields import naming
from retro_jax.retrofit.safetensors_files import StoredTensor, read_header
from retro_jax.storage import files
from retro_jax.train.parameter_names import named_leaves

TENSORS_FILE, SETTINGS_FILE = "adapter.safetensors", "adapter.json"
FORMAT_VERSION = 1
_ADDED = ("cca.", "encoder.")
_GATE = "cca.gate"
# Of a run's batches, as the reader has learnt them; an example of each.
_READ = {"sequence_length": 64, "neighbours": 2, "neighbour_part": "both"}
# For adapters that were written before these could be chosen; the second is of the decoder's form.
_EARLIER = {"min_shared_tokens": 0.0}
_EARLIER_FORM = {"neighbour_distance": 0}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter whose files belong together, and to a base.

    Attributes:
      directory: of its files. config: of the fitted model. tensors: what it adds, by parameter.
      read: BatchConfig's fields as it was trained with them; empty where it is not known.
      digest: SHA-256 of both files.
    """

    directory: pathlib.Path
    config: RetroConfig
    tensors: Mapping[str, StoredTensor]
    read: Mapping[str, Any]
    digest: str

    def parameters(self, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The parameters that it has, each where the one of its name is.

        Args:
          leaves: of the fitted model by name, or their shapes, with dtypes and shardings.

        Raises:
          UserError: a tensor is of another shape, of no such parameter, or not finite, or the gates are
            missing.
        """
        found, path = {}, self.directory / TENSORS_FILE
        for name, stored in self.tensors.items():
            leaf = leaves.get(name)
            if leaf is None or leaf.shape != stored.shape or not name.startswith(_ADDED):
                expected = "no such tensor" if leaf is None else str(leaf.shape)
                raise UserError(f"{path}: {name} has shape {stored.shape}: expected {expected}")
            value = np.array(stored.map()).astype(leaf.dtype)
            with naming(path):
                _check_finite(name, value)
            found[name] = jax.device_put(value, leaf.sharding)
        if self.config.form.gated_cca and _GATE not in found:
            raise UserError(f"{path} has no tensor {_GATE}: expected one, as adapters have")
        return found

    def check_config(self, config: RetroConfig) -> None:
        """Refuses another configuration than that of the fitted model; which neighbours it reads is free.

        Raises:
          UserError: names the field, its value and the adapter's.
        """
        for given, own in ((config, self.config), (config.form, self.config.form)):
            for name, expected in vars(own).items():
                value = getattr(given, name)
                if name not in ("form", "min_shared_tokens") and value != expected:
                    raise UserError(
                        f"{type(given).__name__}.{name} is {value!r}: expected {expected!r}, that of"
                        f" {self.directory}"
                    )


def export_adapter(
    directory: Path, base: BaseModel, model: Retro, read: Mapping[str, Any] | None = None
) -> int:
    """Writes the parameters that a model adds to its base.

    Args:
      directory: where the two files go; an adapter that is there is replaced.
      base: whose weights the model's decoder has. model: as it was fitted, on one device.
      read: of the run's batches, the fields sequence_length, neighbours and neighbour_part at least;
        None where they are not known.

    Returns:
      The bytes of both files.

    Raises:
      UserError: the model's decoder is another one, or has other weights than the base, or a parameter
        is not finite.
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
            _check_finite(name, value)
    tensors = save(added)
    settings = {
        "format_version": FORMAT_VERSION,
        "architecture": base.config.architecture,
        "fingerprint": base.fingerprint(),
        "decoder": base_settings(base.config),
        "retro": _own_settings(base.config, model.config),
        **({} if read is None else {"read": {name: read[name] for name in _READ}}),
        "tensors_sha256": hashlib.sha256(tensors).hexdigest(),
    }
    folder = pathlib.Path(directory)
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # The settings last: with an earlier adapter's they refuse the new tensors.
    data = {TENSORS_FILE: tensors, SETTINGS_FILE: files.to_json(files.plain(settings))}
    for name, content in data.items():
        files.write_atomically(folder / name, content)
    return sum(map(len, data.values()))


def open_adapter(directory: Path, base: BaseModel) -> Adapter:
    """Reads the settings of an adapter and where its tensors are.

    Args:
      directory: of the adapter. base: the model that it was fitted to.

    Raises:
      UserError: a file is missing, damaged or of another format, or the adapter has another base.
    """
    folder = pathlib.Path(directory)
    for name in (SETTINGS_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: expected that of an adapter")
    path = folder / SETTINGS_FILE
    settings = files.read_json(path)
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
    _check_decoder(base, settings.get("decoder"), path)
    config = _config(base, settings.get("retro"), path)
    read = _like(settings["read"], _READ, path, "read") if "read" in settings else {}
    tensors = _tensors(folder / TENSORS_FILE, settings.get("tensors_sha256"))
    digests = "".join(files.measure(folder / name)[1] for name in (SETTINGS_FILE, TENSORS_FILE))
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return Adapter(folder, config, tensors, read, digest)


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
      UserError: as open_adapter and Adapter.parameters.
    """
    adapter = open_adapter(directory, base)
    model = load_decoder(base, adapter.config, execution, mesh=mesh)
    params = nnx.state(model)
    leaves = named_leaves(params)
    leaves |= adapter.parameters(leaves)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(params), list(leaves.values())))
    return model


def _tensors(path: pathlib.Path, digest: str | None) -> Mapping[str, StoredTensor]:
    """The tensors of an adapter's file; `digest` is that of its settings, None in the first adapters."""
    tensors = read_header(path)[1]
    if digest is not None and files.measure(path)[1] != digest:
        raise UserError(
            f"{path} is not that of {SETTINGS_FILE} beside it: expected SHA-256 {str(digest)[:12]};"
            " export the adapter again"
        )
    for name, stored in tensors.items():
        stored.check_dtype(name)
    return tensors


def _check_finite(name: str, value: np.ndarray) -> None:
    """Refuses a parameter that would make every output NaN."""
    if not np.isfinite(value).all():
        raise UserError(f"{name} has values that are not finite: expected numbers")


def _check_decoder(base: BaseModel, stored: Any, path: pathlib.Path) -> None:
    """Refuses a base of the same weights whose settings have been edited; None in the first adapters."""
    found = base_settings(base.config)
    if stored is None or stored == found:
        return
    flat = {name: value for name, value in found.items() if name != "form"} | found["form"]
    theirs = dict(stored) if isinstance(stored, dict) else {}
    form = theirs.pop("form", None)
    theirs |= form if isinstance(form, dict) else {}
    name = next((n for n, value in flat.items() if theirs.get(n) != value), "decoder")
    raise UserError(
        f"{path.parent} was fitted to {base.path} with {name} {theirs.get(name)!r}: expected that,"
        f" found {flat.get(name)!r}"
    )


def _own_settings(base: BaseConfig, config: RetroConfig) -> dict[str, Any]:
    """The settings that no base decides."""
    decided = decoder_settings(base).keys() | {"form"}
    names = [f.name for f in dataclasses.fields(config) if f.name not in decided]
    settings = {name: getattr(config, name) for name in names}
    return settings | {"form": {name: getattr(config.form, name) for name in FITTED_FIELDS}}


def _config(base: BaseModel, stored: Any, path: pathlib.Path) -> RetroConfig:
    """The configuration of an adapter and its base."""
    expected = _own_settings(base.config, decoder_config(base.config))
    if isinstance(stored, dict) and isinstance(stored.get("form"), dict):
        stored = _EARLIER | stored | {"form": _EARLIER_FORM | stored["form"]}
    fields = _like(stored, expected, path, "retro")
    with naming(path):
        return decoder_config(base.config, **fields)


def _like(stored: Any, expected: Mapping[str, Any], path: pathlib.Path, where: str) -> Any:
    """Settings of just these names, each of the type of the one that is expected."""
    if not isinstance(stored, dict) or stored.keys() != expected.keys():
        names = sorted(set(stored) ^ set(expected)) if isinstance(stored, dict) else [where]
        raise UserError(
            f"{path} has other settings ({', '.join(names)} in {where}): expected an adapter's"
        )
    fields: dict[str, Any] = {}
    for name, default in expected.items():
        value, place = stored[name], f"{where}.{name}"
        if isinstance(default, dict):
            fields[name] = _like(value, default, path, place)
            continue
        fits, rule = type(value) is type(default), f"a value of type {type(default).__name__}"
        if isinstance(default, tuple):
            fits = isinstance(value, list) and all(type(each) is int for each in value)
            rule = "a list of integers"
        if not fits:
            raise UserError(f"{path}: {place} is {value!r}: expected {rule}")
        fields[name] = tuple(value) if isinstance(value, list) else value
    return fields
