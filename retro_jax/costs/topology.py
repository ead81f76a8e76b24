"""Devices to compile for that this machine need not have: slices of Cloud TPU, or a simulated CPU.

The TPU compiler is libtpu, of the package's extra `tpu`; it works without a TPU. JAX looks for
chips and for other processes that use them as soon as libtpu is loaded, hence the environment.
"""

import contextlib
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from retro_jax.costs.roofline import Slice, parse_slice
from retro_jax.errors import UserError

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # of this machine: any, as nothing runs on it
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilations side by side, and beside a training run
}
_DEVICE_COUNT = "xla_force_host_platform_device_count"
# The two cores of a v4 are one device, as they are by default on a real slice.
_CHIP_CONFIG = {"v4": "megacore", "v5p": "megacore"}


def simulated(name: str) -> int | None:
    """The number of devices that `cpu:N` asks for; None if it names something else.

    Raises:
      UserError: N is no positive number.
    """
    platform, _, count = name.partition(":")
    if platform != "cpu":
        return None
    if not count.isdigit() or int(count) == 0:
        raise UserError(f"topology {name!r}: expected a positive number of devices, as in cpu:8")
    return int(count)


def devices(name: str) -> tuple[list[Any], Slice | None]:
    """The devices of a topology, to build a mesh of and compile for.

    Args:
      name: a slice as in "v5p:4x4x4", or "cpu:8" for simulated devices of this process.

    Returns:
      The devices, and the slice they form; None for simulated ones.

    Raises:
      UserError: no such topology, too few simulated devices, or no libtpu.
    """
    count = simulated(name)
    if count is not None:
        return _simulated_devices(name, count), None
    slice_ = parse_slice(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {name} needs libtpu, which is not installed: pip install 'retro-jax[tpu]'"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    settings = {}
    if slice_.chip.name in _CHIP_CONFIG:
        settings["chip_config_name"] = _CHIP_CONFIG[slice_.chip.name]
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"libtpu knows no topology {name!r} ({_first_sentence(error)}): expected extents such as "
            f"{_example(slice_)}"
        ) from error
    return list(description.devices), slice_


def _simulated_devices(name: str, count: int) -> list[Any]:
    """CPU devices of this process; it has to have been started with enough of them."""
    if _DEVICE_COUNT not in os.environ.get("XLA_FLAGS", ""):  # else that many there are
        with contextlib.suppress(RuntimeError):  # JAX runs already, with as many as it began with
            jax.config.update("jax_num_cpu_devices", count)
    present = jax.devices("cpu")
    if len(present) < count:
        raise UserError(f"topology {name!r}: expected at most the {len(present)} CPU devices there")
    return present[:count]


def _first_sentence(error: Exception) -> str:
    """libtpu's message, without its status code."""
    return str(error).partition(": ")[2].splitlines()[0].rstrip(".")


def _example(slice_: Slice) -> str:
    """Slices of the same generation that exist."""
    grids = {2: ("2x2", "4x4", "8x16", "16x16"), 3: ("2x2x1", "4x4x4", "4x4x8", "8x8x8")}
    chip = slice_.chip
    return ", ".join(f"{chip.name}:{grid}" for grid in grids[chip.dimensions])
