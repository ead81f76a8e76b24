"""Joins the processes of one run. Where they are is found in this order:

    flags         --coordinator_address=HOST:PORT --num_processes=N --process_id=I
    TPU on GKE    TPU_WORKER_HOSTNAMES and TPU_WORKER_ID; MEGASCALE_* for several slices
    Slurm         the variables of a step that srun started
    Kubernetes    JAX_COORDINATOR_ADDRESS, NNODES and the job's index, as launch.cluster and xpk set them
    TPU VMs       the metadata server, asked by JAX

and where none of them is there, this process trains alone.
"""

import functools
import os
import re

import jax
from absl import flags

from launch.common import app
from retro_jax.distributed import processes
from retro_jax.distributed.join import Place, find_place, is_tpu_machine
from retro_jax.errors import UserError

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where several processes train together."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes train together.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this one is, from 0.", lower_bound=0
)
PEER_TIMEOUT = flags.DEFINE_integer(
    "peer_timeout",
    100,
    "Seconds without a sign of life after which another process counts as lost.",
    lower_bound=1,
)


def join() -> None:
    """Joins the other processes of this run, where there are any. Before any other use of JAX.

    Raises:
      flags.Error: only a part of the three flags was given.
      UserError: the environment contradicts itself, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    place = _from_flags() or find_place(os.environ)
    if place is None and not is_tpu_machine(os.environ):
        return
    initialize = functools.partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=PEER_TIMEOUT.value,
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
        told = str(error).splitlines()[0]
        where = (
            "the TPU's metadata server says"
            if place is None
            else f"process {place.index} of {place.count}, coordinator {place.coordinator} ({place.source})"
        )
        raise UserError(
            f"{where}: cannot join the other processes ({told}); expected all of them to start "
            "within five minutes with the same coordinator"
        ) from error
    app.name_process(processes.name())


def _from_flags() -> Place | None:
    """What the three flags say; all of them or none."""
    holders = (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID)
    address, count, index = COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value
    missing = [holder.name for holder in holders if holder.value is None]
    if len(missing) == len(holders):
        return None
    if address is None or count is None or index is None:
        names = ", --".join(holder.name for holder in holders)
        raise flags.Error(f"--{missing[0]} is missing: expected all of --{names}")
    if not re.fullmatch(r".+:\d+", address):
        raise flags.Error(f"--coordinator_address={address}: expected HOST:PORT of process 0")
    if index >= count:
        raise flags.Error(f"--process_id={index}: expected less than --num_processes={count}")
    return Place(address, count, index) if count > 1 else None
