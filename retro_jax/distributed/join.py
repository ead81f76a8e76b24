"""Joins the processes of one run. Where they are is found in this order:

    the caller    a Place, as launch's flags give it
    TPU on GKE    TPU_WORKER_HOSTNAMES and TPU_WORKER_ID; MEGASCALE_* for several slices
    Slurm         the variables of a step that srun started
    Kubernetes    JAX_COORDINATOR_ADDRESS, NNODES and the job's index, as launch.cluster and xpk set them
    TPU VMs       the metadata server, asked by JAX

and where none of them is there, this process trains alone.
"""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Mapping

import jax

from retro_jax.errors import UserError

_TPU_PORT, _KUBERNETES_PORT = 8476, 55527
_SLURM_PORTS, _FIRST_SLURM_PORT = 4096, 61440
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a process among those of its run.

    Attributes:
      coordinator: HOST:PORT of process 0. count: processes. index: which this one is.
      devices: the local devices that are this process's own; None for all.
      source: the origin of these values, for messages.
    """

    coordinator: str
    count: int
    index: int
    devices: tuple[int, ...] | None = None
    source: str = "flags"


def join(place: Place | None = None, *, peer_timeout: int = 100) -> None:
    """Joins the other processes of this run, where there are any. Before any other use of JAX.

    Args:
      place: of this process; None to find it in the environment.
      peer_timeout: seconds without a sign of life after which another process counts as lost.

    Raises:
      UserError: the environment contradicts itself, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    place = place or find_place(os.environ)
    if place is None and not is_tpu_machine(os.environ):
        return
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=peer_timeout,
        shutdown_timeout_seconds=60,
    )
    try:
        if place is None:
            initialize()
        else:
            initialize(
                place.coordinator,
                place.count,
                place.index,
                local_device_ids=place.devices,
                cluster_detection_method="deactivate",
            )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        where = (
            "the TPU's metadata server says"
            if place is None
            else f"process {place.index} of {place.count}, coordinator {place.coordinator} ({place.source})"
        )
        raise UserError(
            f"{where}: cannot join the other processes ({reason}); expected all of them to start "
            "within five minutes with the same coordinator"
        ) from error


def find_place(environment: Mapping[str, str]) -> Place | None:
    """This process's place as its environment states it; None where it states none, or one process.

    Raises:
      UserError: a variable is missing beside the others, or is no number.
    """
    for find in (_on_gke_tpu, _on_slurm, _on_kubernetes):
        place = find(environment)
        if place is not None:
            if not 0 <= place.index < place.count:
                raise UserError(
                    f"{place.source} makes this process {place.index} of {place.count}: expected a "
                    "number below the count"
                )
            return place if place.count > 1 else None
    return None


def _on_gke_tpu(environment: Mapping[str, str]) -> Place | None:
    """TPU pods of GKE, one process per host; slices count one after the other."""
    source = "TPU_WORKER_HOSTNAMES"
    if not environment.get(source):
        return None
    hosts = environment[source].split(",")
    slices = _number(environment, "MEGASCALE_NUM_SLICES", source, default=1)
    which = _number(environment, "MEGASCALE_SLICE_ID", source, default=0)
    worker = _number(environment, "TPU_WORKER_ID", source, default=0 if len(hosts) == 1 else None)
    address = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    if slices > 1 and "MEGASCALE_COORDINATOR_ADDRESS" not in environment:
        raise UserError(f"{source} and MEGASCALE_NUM_SLICES without MEGASCALE_COORDINATOR_ADDRESS")
    host = address.split(":")[0]
    index = which * len(hosts) + worker
    return Place(f"{host}:{_TPU_PORT}", slices * len(hosts), index, source=source)


def _on_slurm(environment: Mapping[str, str]) -> Place | None:
    """A step of srun. The batch script itself is no step: it has no SLURM_STEP_NUM_TASKS."""
    source = "SLURM_STEP_NUM_TASKS"
    if source not in environment or "SLURM_STEP_NODELIST" not in environment:
        return None
    host = first_host(environment["SLURM_STEP_NODELIST"])
    port = _FIRST_SLURM_PORT + _number(environment, "SLURM_JOB_ID", source) % _SLURM_PORTS
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", source, default=1)
    count = _number(environment, source, source)
    devices = None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    # Several tasks a node share its devices, unless Slurm has shown each of them only its own.
    if count > nodes and (not visible or "," in visible):
        devices = (_number(environment, "SLURM_LOCALID", source),)
    index = _number(environment, "SLURM_PROCID", source)
    return Place(f"{host}:{port}", count, index, devices, source)


def _on_kubernetes(environment: Mapping[str, str]) -> Place | None:
    """An indexed job or a JobSet whose manifest states the coordinator and the count."""
    source = "JAX_COORDINATOR_ADDRESS"
    if source not in environment or "NNODES" not in environment:
        return None
    address = environment[source]
    if ":" not in address:
        address += f":{environment.get('JAX_COORDINATOR_PORT', _KUBERNETES_PORT)}"
    rank = "NODE_RANK" if "NODE_RANK" in environment else "JOB_COMPLETION_INDEX"
    index = _number(environment, rank, source)
    if rank == "JOB_COMPLETION_INDEX":  # it counts the hosts of one slice
        hosts = _number(environment, "HOSTS_A_SLICE", source, default=0)
        index += hosts * _number(environment, "SLICE_INDEX", source, default=0)
    return Place(address, _number(environment, "NNODES", source), index, source=source)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list, as in "node[003-007,12],login1" or "rack[1-2]n[3-4]"."""
    match = re.match(r"[^,\[\]](?:[^,\[\]]|\[[^,\-\]]+[^\]]*\])*(?=,|$)", nodes)
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST is {nodes!r}: expected names of hosts")
    return re.sub(r"\[([^,\-\]]+)[^\]]*\]", r"\1", match.group())


def _number(
    environment: Mapping[str, str], name: str, source: str, default: int | None = None
) -> int:
    """A variable that has to be a number."""
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        shown = f"is {text!r}" if name in environment else "is not set"
        raise UserError(f"{source} is set and {name} {shown}: expected a number beside it")
    return int(text)


def is_tpu_machine(environment: Mapping[str, str]) -> bool:
    """Whether this is a TPU VM whose metadata server knows its neighbours."""
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    may_use_tpu = "tpu" in platforms or not platforms
    alone = "TPU_SKIP_MDS_QUERY" in environment or "TPU_WORKER_HOSTNAMES" in environment
    return may_use_tpu and not alone and any(pathlib.Path(path).exists() for path in _TPU_DEVICES)
