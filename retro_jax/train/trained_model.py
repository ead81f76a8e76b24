"""The model of a trained run, as its newest checkpoint has it."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding

from retro_jax.config import ExecutionConfig, RetroConfig
from retro_jax.errors import UserError
from retro_jax.model import Retro
from retro_jax.retrofit import open_base
from retro_jax.sharding import MESH_SHARDINGS, Shardings, parameter_shardings
from retro_jax.storage import files
from retro_jax.train.checkpoint import CHECKPOINTS, SEAL, restore_params
from retro_jax.train.record import CONFIG_FILE, PARENTS_FILE, read_settings, recorded_parents
from retro_jax.train.warm_start import StartConfig, complete_parameters


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A trained run, opened to be used on one device.

    Attributes:
      name: of the run and its step, as in "retro-9000". model: its parameters.
      settings: every setting of the run, as text. parents: hashes of the data that it was trained on.
      identity: what a result records of the run.
    """

    name: str
    model: Retro
    settings: str
    parents: Mapping[str, str]
    identity: Mapping[str, Any]


def open_trained(directory: str | os.PathLike, *, averaged: bool = False) -> TrainedModel:
    """Opens the newest checkpoint of a run's directory, W/retro or W/baseline.

    Raises:
      UserError: there is no run, or no undamaged checkpoint.
    """
    folder = pathlib.Path(directory)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} has no {CONFIG_FILE}: expected a trained model (launch.train)")
    text = (folder / CONFIG_FILE).read_text(encoding="utf-8")
    retro, execution = read_settings(text, RetroConfig), read_settings(text, ExecutionConfig)
    base = read_settings(text, StartConfig).base
    step, graphdef, params = load_model(
        folder / CHECKPOINTS, retro, execution, averaged=averaged, base=base
    )
    parents = files.read_json(folder / PARENTS_FILE)
    identity = identity_of(folder, step, checkpoint_digest(folder, step), averaged=averaged)
    model = nnx.merge(graphdef, params)
    return TrainedModel(f"{folder.name}-{step}", model, text, parents, identity)


def checkpoint_digest(folder: pathlib.Path, step: int) -> str:
    """The hash of a run's checkpoint."""
    seal = folder / CHECKPOINTS / str(step) / SEAL
    return hashlib.sha256(seal.read_bytes() if seal.is_file() else b"").hexdigest()


def identity_of(
    folder: pathlib.Path,
    step: int,
    digest: str,
    *,
    averaged: bool,
    changed: Mapping[str, str | None] | None = None,
) -> dict[str, Any]:
    """The facts that a result records about a run's checkpoint, by which it is found again.

    Args:
      folder: of the run. step: of the checkpoint. digest: its hash.
      averaged: whether the moving average is meant.
      changed: settings of the model that are not those it was trained with (record.changed_settings).
    """
    facts: dict[str, Any] = {"run": folder.name, "step": step, "checkpoint": digest}
    facts |= {"averaged": True} if averaged else {}
    return facts | ({"changed": dict(changed)} if changed else {})


def load_model(
    checkpoints: str | os.PathLike,
    retro: RetroConfig,
    execution: ExecutionConfig,
    *,
    mesh: Mesh | None = None,
    averaged: bool = False,
    base: str = "",
) -> tuple[int, nnx.GraphDef, nnx.State]:
    """Restores the parameters of a run's newest undamaged checkpoint.

    Args:
      checkpoints: the run's directory of them. retro, execution: of the model.
      mesh: where the parameters go; None for the first device.
      averaged: whether to restore the moving average of the parameters.
      base: the existing model that has the parameters which the checkpoint does without; "" for none.

    Returns:
      The checkpoint's step, the model's graph definition and its parameters, for nnx.merge.

    Raises:
      UserError: there is no such checkpoint, it belongs to another model, or the base is another one.
    """
    layout = Shardings() if mesh is None else MESH_SHARDINGS
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Retro(retro, execution, shardings=layout, rngs=nnx.Rngs(0)))
    )
    if mesh is None:
        shardings = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), params)
    else:
        shardings = parameter_shardings(params, mesh)

    def struct(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    part = "average" if averaged else "params"
    wanted = jax.tree.map(struct, params, shardings)
    step, restored = restore_params(checkpoints, wanted, part=part, may_lack=bool(base))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(restored)):
        _check_base(pathlib.Path(checkpoints).parent, base)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            restored = complete_parameters(base, restored, retro)
    return step, graphdef, restored


def _check_base(run: pathlib.Path, base: str) -> None:
    """Refuses another base than that of a run."""
    wanted, found = (recorded_parents(run) or {}).get("base"), open_base(base).fingerprint()
    if wanted not in (None, found):
        raise UserError(
            f"{run} was fitted to another base than {base}: expected weights {wanted[:12]}, found"
            f" {found[:12]}"
        )
