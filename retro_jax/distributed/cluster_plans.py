"""Plans for training on TPU VMs, on GKE or on a Slurm cluster: pure functions.

A plan is a list of commands for the machine of whoever launches, each with its standard input. The
trainer finds the other hosts by itself (retro_jax/distributed/join.py). It ends with status 75 when
it was asked to stop and has saved, and with 76 when it lost another host. Both mean "start it again".
"""

import dataclasses
import json
import re
import shlex
import textwrap
from collections.abc import Sequence
from typing import Any

from retro_jax.config import require
from retro_jax.errors import LOST, SAVED, UserError

_RESTARTS = 100  # of a run, by the cluster itself
_GRACE_SECONDS = 600  # between SIGTERM and SIGKILL, in which the run saves
_PORT = 55527  # of process 0
# Generation as accelerator types begin -> (runtime image, GKE's name, chips a host)
_TPUS = {
    "v4": ("tpu-ubuntu2204-base", "tpu-v4-podslice", 4),
    "v5litepod": ("v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 4),
    "v5p": ("v2-alpha-tpuv5", "tpu-v5p-slice", 4),
    "v6e": ("v2-alpha-tpuv6e", "tpu-v6e-slice", 4),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """A command to run here. stdin: its input; may_fail: whether the plan continues if it fails."""

    words: tuple[str, ...]
    stdin: str = ""
    may_fail: bool = False

    def __str__(self) -> str:
        """As a shell would read it."""
        line = shlex.join(self.words) + (" || true" if self.may_fail else "")
        return f"{line} <<'END'\n{self.stdin.rstrip()}\nEND" if self.stdin else line


@dataclasses.dataclass(frozen=True)
class Job:
    """The command for every host.

    Attributes:
      name: of the run, for the cluster. arguments: of python, from "-m" on.
      slices: TPU slices, or copies of the hosts, over which the data axis goes.
    """

    name: str
    arguments: tuple[str, ...]
    slices: int = 1

    def __post_init__(self) -> None:
        label = re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name) is not None
        require(label, self, "name", "at most 40 of a-z, 0-9 and -, beginning with a letter")
        require(self.slices > 0, self, "slices", "a positive number")

    @property
    def command(self) -> str:
        """The trainer as a shell line."""
        return shlex.join(("python", *self.arguments))


@dataclasses.dataclass(frozen=True)
class TpuVms:
    """TPU VMs by queued resources. accelerator: as in v5p-128; spot: may be taken away.

    code: a gs:// place that the working tree is shipped through.
    """

    project: str
    zone: str
    accelerator: str
    code: str
    spot: bool = False

    def __post_init__(self) -> None:
        for field in ("project", "zone"):
            require(bool(getattr(self, field)), self, field, "a name, as gcloud lists them")
        valid = re.fullmatch(rf"({'|'.join(_TPUS)})-\d+", self.accelerator) is not None
        require(valid, self, "accelerator", f"one of {', '.join(_TPUS)} and a size, as in v5p-128")
        require(self.code.startswith("gs://"), self, "code", "a place in a bucket, gs://...")


def tpu_start(job: Job, machine: TpuVms) -> list[Command]:
    """Ships the code, asks for the slices, waits for them, installs and starts on every host."""
    archive = f"{machine.code.rstrip('/')}/{job.name}.tar.gz"
    image = _TPUS[machine.accelerator.split("-")[0]][0]
    options = ["--accelerator-type", machine.accelerator, "--runtime-version", image]
    if job.slices > 1:
        options += ["--node-count", str(job.slices), "--node-prefix", job.name]
    else:
        options += ["--node-id", job.name]
    options += ["--spot"] if machine.spot else []
    queued = ("gcloud", "compute", "tpus", "queued-resources")
    where = _where(machine)
    state = shlex.join((*queued, "describe", job.name, *where, "--format=value(state.state)"))
    waiting = f'until [ "$({state})" = ACTIVE ]; do sleep 30; done'
    pack = f"git archive --format=tar.gz HEAD | gcloud storage cp - {shlex.quote(archive)}"
    plan = [
        Command(("bash", "-c", pack)),
        Command((*queued, "create", job.name, *options, *where)),
        Command(("bash", "-c", waiting)),
    ]
    return plan + [_on_hosts(node, machine, tpu_script(job, archive)) for node in _nodes(job)]


def tpu_script(job: Job, archive: str) -> str:
    """The script of every TPU host: install once, then the trainer in the background until it is done."""
    loop = _restarting(job.command)
    return textwrap.dedent(f"""\
        set -euo pipefail
        mkdir -p "$HOME/{job.name}" && cd "$HOME/{job.name}"
        rm -f stop
        gcloud storage cp {shlex.quote(archive)} - | tar xz
        test -x .venv/bin/python || python3.11 -m venv .venv || {{
          sudo apt-get update -q && sudo apt-get install -qy python3.11 python3.11-venv
          python3.11 -m venv .venv
        }}
        .venv/bin/pip install -q --constraint constraints.txt --editable '.[data,tpu,gcs]'
        export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
        cat > run.sh <<'RUN'
        {textwrap.indent(loop, " " * 8).strip()}
        RUN
        nohup bash run.sh >> log.txt 2>&1 < /dev/null &
        echo $! > pid.txt
        """)


def tpu_logs(job: Job, machine: TpuVms) -> list[Command]:
    """Follows the logs of all hosts, each line with its host."""
    follow = f'tail -n 100 -F $HOME/{job.name}/log.txt | sed "s/^/$(hostname): /"'
    lines = [shlex.join(_on_hosts(node, machine, follow).words) for node in _nodes(job)]
    return [Command(("bash", "-c", " & ".join(lines) + " & wait"))]


def tpu_stop(job: Job, machine: TpuVms) -> list[Command]:
    """Lets the run save, then gives the slices back."""
    end = textwrap.dedent(f"""\
        cd "$HOME/{job.name}" && touch stop && pkill -TERM -P "$(cat pid.txt)" || true
        for i in $(seq {_GRACE_SECONDS}); do kill -0 "$(cat pid.txt)" || break; sleep 1; done
        """)
    delete = ("gcloud", "compute", "tpus", "queued-resources", "delete", job.name)
    stops = [
        dataclasses.replace(_on_hosts(node, machine, end), may_fail=True) for node in _nodes(job)
    ]
    return [*stops, Command((*delete, *_where(machine), "--force", "--quiet"))]


def _where(machine: TpuVms) -> tuple[str, ...]:
    """gcloud's flags for the project and zone."""
    return ("--project", machine.project, "--zone", machine.zone)


def _nodes(job: Job) -> list[str]:
    """The names of the slices, as queued resources number them."""
    return [job.name] if job.slices == 1 else [f"{job.name}-{i}" for i in range(job.slices)]


def _on_hosts(node: str, machine: TpuVms, script: str) -> Command:
    """Runs a script on every host of a slice."""
    ssh = ("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *_where(machine))
    return Command((*ssh, "--worker=all", f"--command={script}"))


def _restarting(command: str) -> str:
    """A loop around the trainer that starts it again when it has saved or lost another host."""
    return textwrap.dedent(f"""\
        for start in $(seq {_RESTARTS}); do
          status=0
          {command} || status=$?
          echo "ended with status $status"
          test -e stop && exit $status
          case $status in {SAVED}|{LOST}|134) sleep 10 ;; *) exit $status ;; esac
        done
        """)


@dataclasses.dataclass(frozen=True)
class Gke:
    """A JobSet on GKE: TPU hosts (accelerator and topology) or GPU hosts (gpus of them a host).

    Attributes:
      image: made of the Dockerfile. accelerator: v5p and the like, or GKE's name of a GPU.
      topology: of a TPU slice, as in 4x4x8. hosts: GPU hosts a slice. gpus: a host; 0 for TPUs.
      namespace, spot: as kubectl has them. claim: a PersistentVolumeClaim that all hosts see, at
        /mnt/shared. cpu, memory: of a pod, as Kubernetes writes them (32, 200Gi); empty for any.
    """

    image: str
    accelerator: str
    topology: str = ""
    hosts: int = 0
    gpus: int = 0
    namespace: str = "default"
    spot: bool = False
    claim: str = ""
    cpu: str = ""
    memory: str = ""

    def __post_init__(self) -> None:
        require(bool(self.image), self, "image", "an image that has been pushed")
        for name, pattern, rule in (
            ("cpu", r"(\d+(\.\d+)?|\d+m)?", "cores, as in 32 or 500m"),
            ("memory", r"(\d+[KMGT]i?)?", "bytes with a unit, as in 200Gi"),
        ):
            fits = re.fullmatch(pattern, getattr(self, name)) is not None
            require(fits, self, name, rule)
        require(self.gpus >= 0, self, "gpus", "GPUs a host, or 0 for TPUs")
        if self.gpus:
            require(bool(self.accelerator), self, "accelerator", "GKE's name of a GPU")
            require(self.hosts > 0, self, "hosts", "the number of GPU hosts")
            return
        require(self.accelerator in _TPUS, self, "accelerator", f"one of {', '.join(_TPUS)}")
        grid = re.fullmatch(r"\d+(x\d+){1,2}", self.topology) is not None
        require(grid, self, "topology", "extents, as in 4x4x8")
        if self.chips % _TPUS[self.accelerator][2]:
            raise UserError(f"Gke.topology is {self.topology!r}: expected whole hosts of 4 chips")

    @property
    def chips(self) -> int:
        """TPU chips a slice."""
        chips = 1
        for extent in self.topology.split("x"):
            chips *= int(extent)
        return chips

    @property
    def hosts_a_slice(self) -> int:
        """Pods of one job."""
        return self.hosts if self.gpus else self.chips // _TPUS[self.accelerator][2]


def gke_manifest(job: Job, machine: Gke) -> dict[str, Any]:
    """The JobSet: one job a slice, one pod a host; any failed pod starts all of them again."""
    work = {
        "parallelism": machine.hosts_a_slice,
        "completions": machine.hosts_a_slice,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": _gke_pod(job, machine)},
    }
    exclusive = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            "namespace": machine.namespace,
            "annotations": {exclusive: "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": _RESTARTS},
            "network": {"enableDNSHostnames": True},
            "replicatedJobs": [
                {"name": "slice", "replicas": job.slices, "template": {"spec": work}}
            ],
        },
    }


def _gke_pod(job: Job, machine: Gke) -> dict[str, Any]:
    """What a pod runs, where, and what it may use."""
    selector = {"cloud.google.com/gke-accelerator": machine.accelerator}
    limits: dict[str, Any] = {"nvidia.com/gpu": machine.gpus}
    environment = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
    if machine.gpus:
        environment += _gpu_environment(job, machine.hosts_a_slice)
    else:
        _, name, chips = _TPUS[machine.accelerator]
        selector = {
            "cloud.google.com/gke-tpu-accelerator": name,
            "cloud.google.com/gke-tpu-topology": machine.topology,
        }
        limits = {"google.com/tpu": chips}
    for resource in ("cpu", "memory"):
        if getattr(machine, resource):
            limits[resource] = getattr(machine, resource)
    if machine.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container: dict[str, Any] = {
        "name": "train",
        "image": machine.image,
        "command": ["python", *job.arguments],
        "env": environment,
        "resources": {"requests": limits, "limits": limits},
        "volumeMounts": [{"name": "memory", "mountPath": "/dev/shm"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [container],
        # A pod's own /dev/shm has 64 MB: NCCL and the processes that make batches need more.
        "volumes": [{"name": "memory", "emptyDir": {"medium": "Memory"}}],
    }
    if machine.claim:
        container["volumeMounts"].append({"name": "shared", "mountPath": "/mnt/shared"})
        claim = {"claimName": machine.claim}
        pod["volumes"].append({"name": "shared", "persistentVolumeClaim": claim})
    return pod


def _gpu_environment(job: Job, hosts: int) -> list[dict[str, Any]]:
    """Where the pods find each other; for TPUs GKE itself says so. The job numbers its pods."""
    label = "metadata.labels['jobset.sigs.k8s.io/job-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{job.name}-slice-0-0.{job.name}:{_PORT}"},
        {"name": "NNODES", "value": str(hosts * job.slices)},
        {"name": "HOSTS_A_SLICE", "value": str(hosts)},
        {"name": "SLICE_INDEX", "valueFrom": {"fieldRef": {"fieldPath": label}}},
    ]


def gke_start(job: Job, machine: Gke) -> list[Command]:
    """Replaces the JobSet of that name: kubectl cannot change one that runs."""
    manifest = json.dumps(gke_manifest(job, machine), indent=2)
    return [*gke_stop(job, machine), Command(("kubectl", "apply", "--filename=-"), manifest)]


def gke_logs(job: Job, machine: Gke) -> list[Command]:
    """Follows the logs of all pods, each line with its pod."""
    pods = machine.hosts_a_slice * job.slices
    label = f"--selector=jobset.sigs.k8s.io/jobset-name={job.name}"
    options = ("--follow", "--prefix", "--tail=100", f"--max-log-requests={max(pods, 5)}")
    return [Command(("kubectl", "logs", f"--namespace={machine.namespace}", label, *options))]


def gke_stop(job: Job, machine: Gke) -> list[Command]:
    """Deletes the JobSet: its pods get SIGTERM, and time to save."""
    where = f"--namespace={machine.namespace}"
    return [Command(("kubectl", "delete", "jobset", job.name, where, "--ignore-not-found"))]


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A Slurm cluster: one task a host, on a file system that all hosts share.

    Attributes:
      hosts, gpus: hosts a slice, and GPUs a host. python: of an environment with this project.
      partition, account, time: as sbatch has them; empty for the cluster's own.
    """

    hosts: int
    gpus: int
    python: str
    partition: str = ""
    account: str = ""
    time: str = ""

    def __post_init__(self) -> None:
        require(self.hosts > 0, self, "hosts", "a positive number")
        require(self.gpus >= 0, self, "gpus", "GPUs a host, or 0 for none")
        require(bool(self.python), self, "python", "the Python of an environment")


def slurm_script(job: Job, machine: Slurm) -> str:
    """The batch script: it saves before its time ends, and asks for the hosts once more."""
    options = {
        "job-name": job.name,
        "nodes": str(machine.hosts * job.slices),
        "ntasks-per-node": "1",
        "gpus-per-node": str(machine.gpus) if machine.gpus else "",
        "exclusive": None,
        "partition": machine.partition,
        "account": machine.account,
        "time": machine.time,
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
        "requeue": None,
        "signal": f"TERM@{_GRACE_SECONDS}",
    }
    lines = [
        f"#SBATCH --{name}" + ("" if value is None else f"={value}")
        for name, value in options.items()
        if value != ""
    ]
    command = shlex.join((machine.python, *job.arguments))
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "",
            "export PYTHONUNBUFFERED=1",
            "status=0",
            f"srun --kill-on-bad-exit=1 --label {command} || status=$?",
            'echo "ended with status $status"',
            f'if [ -e "{job.name}.stop" ] || [ "${{SLURM_RESTART_COUNT:-0}}" -ge {_RESTARTS} ]; then',
            '  exit "$status"',
            "fi",
            'case "$status" in',
            f'  {SAVED}|{LOST}|134|137|143) scontrol requeue "$SLURM_JOB_ID" ;;',
            "esac",
            'exit "$status"',
            "",
        ]
    )


def slurm_start(job: Job, machine: Slurm) -> list[Command]:
    """Hands the script to sbatch."""
    ready = Command(("rm", "-f", f"{job.name}.stop"))
    return [ready, Command(("sbatch",), slurm_script(job, machine))]


def slurm_logs(job: Job, machine: Slurm) -> list[Command]:
    """Follows the log of the newest job of that name; srun labels each line with its task."""
    newest = f'tail -n 100 -F "$(ls -t {job.name}-*.log | head -n 1)"'
    return [Command(("bash", "-c", newest))]


def slurm_stop(job: Job, machine: Slurm) -> list[Command]:
    """Lets the run save: SIGTERM goes to the tasks, and the script does not ask again."""
    return [
        Command(("touch", f"{job.name}.stop")),
        Command(("scancel", f"--name={job.name}", "--me", "--signal=TERM")),
    ]


def describe(plan: Sequence[Command]) -> str:
    """A plan as a shell script that does the same."""
    return "\n".join(["set -e", *map(str, plan), ""])
