"""Where a process of a run is: by flags and by its environment."""

import pytest

from launch.common import app
from launch.common.flags import (
    COORDINATOR_ADDRESS,
    NUM_PROCESSES,
    PEER_TIMEOUT,
    PROCESS_ID,
    join_processes,
)
from retro_jax.distributed import join
from retro_jax.errors import UserError

_SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[007-010,12]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
_GKE = {"TPU_WORKER_HOSTNAMES": "a-0.s,a-1.s", "TPU_WORKER_ID": "1"}
_SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "run-slice-0-0.run:8080",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
}
_KUBERNETES = {
    "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run",
    "NNODES": "16",
    "JOB_COMPLETION_INDEX": "5",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (_SLURM, ("gpu007:61441", 4, 2, None)),
        # The batch script itself is no step of srun: it trains alone.
        ({k: v for k, v in _SLURM.items() if "STEP" not in k}, None),
        (
            {**_SLURM, "SLURM_STEP_NUM_TASKS": "32", "SLURM_LOCALID": "3"},
            ("gpu007:61441", 32, 2, (3,)),
        ),
        # Slurm has already shown the task nothing but its own device.
        (
            {**_SLURM, "SLURM_STEP_NUM_TASKS": "32", "CUDA_VISIBLE_DEVICES": "6"},
            ("gpu007:61441", 32, 2, None),
        ),
        ({**_SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (_GKE, ("a-0.s:8476", 2, 1, None)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({**_GKE, **_SLICES}, ("run-slice-0-0.run:8476", 6, 5, None)),
        (_KUBERNETES, ("run-workers-0-0.run:55527", 16, 5, None)),
        (
            {**_KUBERNETES, "HOSTS_A_SLICE": "8", "SLICE_INDEX": "1"},
            ("run-workers-0-0.run:55527", 16, 13, None),
        ),
        (
            {**_KUBERNETES, "JAX_COORDINATOR_PORT": "99", "NODE_RANK": "7"},
            ("run-workers-0-0.run:99", 16, 7, None),
        ),
    ],
)
def test_the_environment_says_where_a_process_stands(environment, expected):
    place = join.find_place(environment)
    found = place and (place.coordinator, place.count, place.index, place.devices)
    assert found == expected


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-004]", "node001"),
        ("node[9,12-14],other", "node9"),
        ("rack[1-2]-n,b", "rack1-n"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("r[01,04]n[3]-[7-9]x,b[1-2]", "r01n3-7x"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert join.first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({**_SLURM, "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x': expected a number"),
        ({**_GKE, "TPU_WORKER_ID": ""}, "TPU_WORKER_ID is ''"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is not set"),
        ({**_GKE, "MEGASCALE_NUM_SLICES": "2"}, "without MEGASCALE_COORDINATOR_ADDRESS"),
        ({**_KUBERNETES, "JOB_COMPLETION_INDEX": "16"}, "makes this process 16 of 16"),
        ({**_SLURM, "SLURM_STEP_NODELIST": "[1]"}, "expected names of hosts"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(environment, message):
    with pytest.raises(UserError) as error:
        join.find_place(environment)
    assert message in str(error.value)


def _join() -> None:
    """Joins by flags, as a command does."""
    three = (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID)
    join_processes(*(flag.value for flag in three), peer_timeout=PEER_TIMEOUT.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--process_id=0"], "--coordinator_address is missing: expected all of"),
        (
            ["--coordinator_address=host", "--num_processes=2", "--process_id=0"],
            "--coordinator_address=host: expected HOST:PORT",
        ),
        (
            ["--coordinator_address=host:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2: expected less than --num_processes=2",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line(given, message, capsys):
    assert app.execute(_join, ["program", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_single_process_joins_nothing():
    one = ["--coordinator_address=nowhere:1", "--num_processes=1", "--process_id=0"]
    assert app.execute(_join, ["program", *one]) == 0
