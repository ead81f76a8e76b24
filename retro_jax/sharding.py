"""The device mesh and the layout of every array on it. Nothing else in the library names a mesh axis.

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
from retro_jax.parameters import map_parameters, spec_of

AXES = DATA, FSDP, TENSOR = ("data", "fsdp", "tensor")
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
    tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpu else 1
    if data % slices:
        raise UserError(
            f"mesh axis data={data} cannot be split over {slices} slices: expected a multiple of "
            f"{slices}"
        )
    # A mesh axis may be a part of a torus's, as 128 of 16 x 16 is; jax.make_mesh refuses some of these.
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor),
        (slices, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


@dataclasses.dataclass(frozen=True)
class Shardings:
    """PartitionSpecs of activations by the meaning of their axes; the default lays nothing out.

    Attributes:
      batch: mesh axes of the leading axis B. tensor: mesh axis of heads, feed-forward, vocabulary.
    """

    batch: tuple[str, ...] | None = None
    tensor: str | None = None

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

    def gathered(self, param: nnx.Param) -> P | None:
        """The spec of a layer's parameter as its product reads it: whole along fsdp."""
        if not self.active:
            return None
        return P(*(None if axis == FSDP else axis for axis in spec_of(param)))


MESH_SHARDINGS = Shardings(batch=(DATA, FSDP), tensor=TENSOR)


def lay_out(x: jax.Array, spec: P | None) -> jax.Array:
    """Moves an array to a spec of the current mesh; None leaves it where it is."""
    return x if spec is None else jax.sharding.reshard(x, spec)


def draw_sharding(spec: P | None) -> P | None:
    """The out_sharding of a random draw, so that each device draws only its part of it.

    On one device there is nothing to split, and the program stays the one without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else spec


def replicated(x: jax.Array) -> jax.Array:
    """Copies an array to every device of the current mesh."""
    return jax.sharding.reshard(x, P())


def target_platform() -> str:
    """The platform of the traced program: that of the mesh's devices, described or present; else ours."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def parameter_specs(params: Any) -> Any:
    """The PartitionSpec of every parameter of a module, as a tree like `params`.

    Stacks of layers have one more leading axis than one layer's parameter; it is not split.
    """

    def full_spec(param: Any) -> P:
        spec = spec_of(param)
        return P(*(None,) * (len(param.shape) - len(spec)), *spec)

    return map_parameters(full_spec, params)


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
      UserError: naming the size, the mesh axis and sizes that would fit.
    """
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    split = {"num_heads": tensor, "num_kv_heads": tensor, "d_ff": tensor, "d_model": fsdp}
    if config.has_encoder:
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


def abstract_parameters(make: Any) -> tuple[nnx.GraphDef, Any]:
    """Splits a module that is only shapes: nothing is allocated."""
    return nnx.split(nnx.eval_shape(make))
