"""The device mesh and where every array lies on it. Nothing else in the library names a mesh axis.

Three axes: `data` replicates the parameters, `fsdp` splits them (they are gathered layer by layer
before their products), `tensor` splits heads, feed-forward and vocabulary. A batch is split over
`data` and `fsdp` together. Meshes have explicit axes: an array's type says how it is sharded.
"""

import dataclasses
import logging
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from retro_jax.config import RetroConfig, require
from retro_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
_REPLICATED_WARNING_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices.

    Attributes:
      data: copies of the parameters, each for other rows; -1 takes all devices that are left.
      fsdp: parts of parameters, gradients and optimiser state; each part has rows of its own.
      tensor: parts of heads, feed-forward layers and vocabulary.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        require(
            self.data == -1 or self.data > 0,
            self,
            "data",
            "a positive integer, or -1 for the rest",
        )
        require(self.fsdp > 0, self, "fsdp", "a positive integer")
        require(self.tensor > 0, self, "tensor", "a positive integer")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds a (data, fsdp, tensor) mesh with explicit axes over the given (default: all) devices.

    Raises:
      UserError: the axes' product is not the number of devices.
    """
    devices = devices if devices is not None else jax.devices()
    rest = config.fsdp * config.tensor
    data = len(devices) // rest if config.data == -1 else config.data
    if data * rest != len(devices):
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not fit "
            f"{len(devices)} devices: expected axes whose product is {len(devices)}"
        )
    explicit = (AxisType.Explicit,) * len(AXES)
    shape = (data, config.fsdp, config.tensor)
    return Mesh(arrange_slices(devices, shape), AXES, axis_types=explicit)


def arrange_slices(devices: list[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """TPU slices one after the other along the data axis: the network between them is slower.

    Devices of other kinds, and of one slice, are laid out as JAX recommends.

    Args:
      devices: of several slices of one size. shape: (data, fsdp, tensor) of the whole mesh.

    Raises:
      UserError: the data axis does not divide among the slices.
    """
    data, fsdp, tensor = shape
    slices = _by_slice(devices)
    if data % len(slices):
        raise UserError(
            f"mesh axis data={data} cannot be split over {len(slices)} slices: expected a multiple of "
            f"{len(slices)}"
        )
    part = (data // len(slices), fsdp, tensor)
    # A mesh axis may be a part of a torus's, as 128 of 16 x 16 is; jax.make_mesh refuses some of these.
    arranged = [
        mesh_utils.create_device_mesh(part, group, allow_split_physical_axes=True)
        for group in slices
    ]
    return np.concatenate(arranged)


def _by_slice(devices: list[Any]) -> list[list[Any]]:
    """Devices of each TPU slice; all of them in one list elsewhere."""
    slices: dict[int, list[Any]] = {}
    for device in devices:
        number = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        slices.setdefault(number, []).append(device)
    return [slices[number] for number in sorted(slices)]


@dataclasses.dataclass(frozen=True)
class Shardings:
    """PartitionSpecs of activations by what their axes mean; the default lays nothing out.

    Attributes:
      batch: mesh axes of the leading axis B. tensor: mesh axis of heads, feed-forward, vocabulary.
      fsdp: mesh axis that splits parameters at rest.
    """

    batch: tuple[str, ...] | None = None
    tensor: str | None = None
    fsdp: str | None = None

    @property
    def active(self) -> bool:
        """Whether there is a mesh at all."""
        return self.batch is not None

    def rows(self, ndim: int) -> P | None:
        """[B, ...]: only the batch is split."""
        return P(self.batch, *(None,) * (ndim - 1)) if self.active else None

    def heads(self, ndim: int) -> P | None:
        """[B, ..., H, head_dim]: batch and heads are split."""
        return P(self.batch, *(None,) * (ndim - 3), self.tensor, None) if self.active else None

    def wide(self, ndim: int) -> P | None:
        """[B, ..., F] or [B, ..., V]: batch and the last axis are split."""
        return P(self.batch, *(None,) * (ndim - 2), self.tensor) if self.active else None

    def parameter(self, name: str, gathered: bool = False) -> P | None:
        """The spec of one layer's parameter by its name; gathered: as its product reads it."""
        if not self.active:
            return None
        fsdp = None if gathered else self.fsdp
        specs = {
            "table": P(self.tensor, fsdp),  # [V, D]
            "read_out": P(self.tensor, fsdp),  # [V, D]
            "query_key_value": P(fsdp, None, self.tensor, None),  # [D, 3, H, head_dim]
            "query": P(fsdp, self.tensor, None),  # [D, H, head_dim]
            "key_value": P(fsdp, None, self.tensor, None),  # [E, 2, H, head_dim]
            "relative": P(fsdp, self.tensor, None),  # [D, H, head_dim]
            "content_bias": P(self.tensor, None),  # [H, head_dim]
            "position_bias": P(self.tensor, None),  # [H, head_dim]
            "output": P(self.tensor, None, fsdp),  # [H, head_dim, D]
            "widen": P(fsdp, self.tensor),  # [D, F]
            "narrow": P(self.tensor, fsdp),  # [F, D]
            "scale": P(None),  # [D]
        }
        return specs[name]


MESH_SHARDINGS = Shardings(batch=("data", "fsdp"), tensor="tensor", fsdp="fsdp")


def lay_out(x: jax.Array, spec: P | None) -> jax.Array:
    """Moves an array to a spec of the current mesh; None leaves it where it is."""
    return x if spec is None else jax.sharding.reshard(x, spec)


def replicated(x: jax.Array) -> jax.Array:
    """Copies an array to every device of the current mesh."""
    return jax.sharding.reshard(x, P())


def target_platform() -> str:
    """What the program being traced is for: the mesh's devices, described or present; else ours."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def parameter_specs(params: Any, shardings: Shardings = MESH_SHARDINGS) -> Any:
    """The PartitionSpec of every parameter of a Retro, as a tree like `params`.

    Stacks of layers have one more leading axis than one layer's parameter; it is not split.
    """

    def spec_of(path: tuple[Any, ...], leaf: Any) -> P:
        spec = shardings.parameter(_parameter_name(path))
        assert spec is not None
        return P(*(None,) * (len(leaf.shape) - len(spec)), *spec)

    return jax.tree_util.tree_map_with_path(spec_of, params)


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """NamedShardings of every parameter; logs the large ones that stay replicated."""
    specs = parameter_specs(params)

    def named(path: tuple[Any, ...], leaf: Any, spec: P) -> NamedSharding:
        parts = [mesh.shape[axis] for axis in jax.tree.leaves(tuple(spec))]
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if mesh.size > 1 and math.prod(parts) == 1 and size > _REPLICATED_WARNING_BYTES:
            name = jax.tree_util.keystr(path)
            logging.warning(
                "%s %s (%.1f MB) is replicated on every device",
                name,
                leaf.shape,
                size / 1e6,
            )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(named, params, specs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a RetroBatch: rows over data and fsdp."""
    return NamedSharding(mesh, P(MESH_SHARDINGS.batch))


def check_mesh(config: RetroConfig, mesh: Mesh, batch_size: int | None = None) -> None:
    """Refuses, in one line, a mesh that does not divide the model's axes or the batch.

    Raises:
      UserError: naming the size, the mesh axis and what would fit.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    split = {"num_heads": tensor, "d_ff": tensor, "d_model": fsdp}
    if config.has_retrieval:
        split |= {
            "encoder_num_heads": tensor,
            "encoder_d_ff": tensor,
            "encoder_d_model": fsdp,
        }
    split["vocab_size"] = tensor
    for field, parts in split.items():
        size = getattr(config, field)
        if size % parts:
            axis = "fsdp" if parts is fsdp and field.endswith("d_model") else "tensor"
            raise UserError(
                f"{field} {size} cannot be split over mesh axis {axis}={parts}: expected a divisor of {size}"
            )
    rows = mesh.shape["data"] * fsdp
    if batch_size is not None and batch_size % rows:
        raise UserError(
            f"batch size {batch_size} cannot be split over data x fsdp = {rows}: expected a multiple of {rows}"
        )


def _parameter_name(path: tuple[Any, ...]) -> str:
    """The last name on a tree path that is a parameter's (nnx wraps leaves in a `.value`)."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    return next(str(name) for name in reversed(names) if name not in (None, "value", "raw_value"))


def abstract_parameters(make: Any) -> tuple[nnx.GraphDef, Any]:
    """Splits a module that is only shapes: nothing is allocated."""
    return nnx.split(nnx.eval_shape(make))
