"""Starts, follows and stops a training run on TPU VMs, on GKE or on a Slurm cluster.

    python -m launch.cluster tpu --name=retro --accelerator=v5p-128 --project=P --zone=Z --code=gs://B \
        --gin_file=experiments/retro_7_5b.gin --workdir=gs://B/retro --dry_run
    python -m launch.cluster gke --name=retro --image=I --accelerator=v5p --tpu_topology=4x4x4 --num_slices=2 ...
    python -m launch.cluster slurm --name=retro --hosts=8 --gpus=8 --python=/shared/venv/bin/python ...
    python -m launch.cluster gke ... --action=logs

--dry_run prints the commands and manifests, and runs nothing. It ships the last commit of this
repository (tpu), an image built from the Dockerfile (gke), or an environment that all hosts see
(slurm). The workdir is a directory that all hosts see, or in a bucket. --num_slices > 1 puts the data
axis across slices. --action=stop lets the run save first; starting it again resumes it. The cluster restarts a
run that saved because a host is taken away, or that lost one.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from launch.common import app
from launch.common.configurables import GIN_BINDINGS, GIN_FILE
from launch.common.flags import DATA
from retro_jax.distributed import cluster_plans
from retro_jax.distributed.cluster_plans import Command, Gke, Job, Slurm, TpuVms
from retro_jax.errors import UserError

KINDS, ACTIONS = ("tpu", "gke", "slurm"), ("start", "logs", "stop")
KIND = flags.DEFINE_enum("kind", None, KINDS, "Where; may stand alone as the first argument.")
ACTION = flags.DEFINE_enum("action", "start", ACTIONS, "What to do.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the commands, and run none.")
NAME = flags.DEFINE_string("name", None, "Of the run, for the cluster.")
SLICES = flags.DEFINE_integer("num_slices", 1, "TPU slices, or groups of hosts.", lower_bound=1)
MORE = flags.DEFINE_multi_string(
    "train_flag", [], "Another flag of launch.train, as in --baseline."
)
PROJECT = flags.DEFINE_string("project", "", "tpu: Google Cloud's project.")
ZONE = flags.DEFINE_string("zone", "", "tpu: where the TPUs are.")
CODE = flags.DEFINE_string("code", "", "tpu: place in a bucket through which the code is shipped.")
ACCELERATOR = flags.DEFINE_string("accelerator", "", "tpu: as v5p-128; gke: v5p, or a GPU's name.")
SPOT = flags.DEFINE_bool("spot", False, "tpu, gke: machines that may be taken away.")
IMAGE = flags.DEFINE_string("image", "", "gke: image made of the Dockerfile, pushed.")
TOPOLOGY = flags.DEFINE_string("tpu_topology", "", "gke: of a TPU slice, as in 4x4x8.")
NAMESPACE = flags.DEFINE_string("namespace", "default", "gke: Kubernetes' namespace.")
CLAIM = flags.DEFINE_string("claim", "", "gke: PersistentVolumeClaim to mount at /mnt/shared.")
CPU = flags.DEFINE_string("pod_cpu", "", "gke: cores of a pod, as in 32; empty for any.")
MEMORY = flags.DEFINE_string("pod_memory", "", "gke: memory of a pod, as in 200Gi; empty for any.")
HOSTS = flags.DEFINE_integer("hosts", 0, "gke with GPUs, slurm: hosts a slice.", lower_bound=0)
GPUS = flags.DEFINE_integer("gpus", 0, "gke, slurm: GPUs a host.", lower_bound=0)
PYTHON = flags.DEFINE_string("python", "", "slurm: Python of an environment with this project.")
PARTITION = flags.DEFINE_string("partition", "", "slurm: partition.")
ACCOUNT = flags.DEFINE_string("account", "", "slurm: account.")
TIME = flags.DEFINE_string("time_limit", "", "slurm: as in 24:00:00; the run goes on after it.")


def main() -> None:
    """Makes the plan, and prints or runs it."""
    plan = make_plan()
    if DRY_RUN.value:
        print(cluster_plans.describe(plan), end="")
        return
    for command in plan:
        run(command)


def make_plan() -> list[Command]:
    """The commands that the flags ask for.

    Raises:
      flags.Error: a flag is missing.
      UserError: a value is wrong.
    """
    kind = app.required(KIND, f"one of {', '.join(KINDS)} as the first argument")
    arguments: tuple[str, ...] = ()
    if ACTION.value == "start":
        arguments = train_arguments()
    job = Job(app.required(NAME, "a name of the run"), arguments, SLICES.value)
    machine: Any
    if kind == "tpu":
        machine = TpuVms(PROJECT.value, ZONE.value, ACCELERATOR.value, CODE.value, SPOT.value)
    elif kind == "gke":
        machine = Gke(
            image=IMAGE.value,
            accelerator=ACCELERATOR.value,
            topology=TOPOLOGY.value,
            hosts=HOSTS.value,
            gpus=GPUS.value,
            namespace=NAMESPACE.value,
            spot=SPOT.value,
            claim=CLAIM.value,
            cpu=CPU.value,
            memory=MEMORY.value,
        )
    else:
        where = {"partition": PARTITION.value, "account": ACCOUNT.value, "time": TIME.value}
        machine = Slurm(HOSTS.value, GPUS.value, PYTHON.value, **where)
    planner: Callable[[Job, Any], list[Command]]
    planner = getattr(cluster_plans, f"{kind}_{ACTION.value}")
    return planner(job, machine)


def train_arguments() -> tuple[str, ...]:
    """launch.train and its flags, as given here.

    Raises:
      flags.Error: a flag is missing, or is no flag.
    """
    words = [
        f"--gin_file={app.required(GIN_FILE, 'the settings of the run')}",
        f"--workdir={app.WORKDIR.value or app.required(app.WORKDIR, 'what all hosts see')}",
    ]
    words += [f"--data={DATA.value}"] if DATA.value else []
    words += [f"--gin_bindings={binding}" for binding in GIN_BINDINGS.value]
    for flag in MORE.value:
        if not flag.startswith("--"):
            raise flags.Error(
                f"--train_flag={flag}: expected a flag, as in --train_flag=--baseline"
            )
    return ("-m", "launch.train", *words, *MORE.value)


def run(command: Command) -> None:
    """Runs a command here, its output on ours.

    Raises:
      UserError: it is not installed, or it failed.
    """
    print(f"+ {command}".split("\n")[0], file=sys.stderr)
    try:
        done = subprocess.run(command.words, input=command.stdin or None, text=True, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command.words[0]} is not installed: expected it on the PATH") from error
    if done.returncode and not command.may_fail:
        shown = " ".join(command.words)[:120]
        raise UserError(f"{shown} ended with status {done.returncode}: expected 0")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in KINDS:
        sys.argv[1] = f"--kind={sys.argv[1]}"
    app.run(main)
