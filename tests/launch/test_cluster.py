"""launch/cluster.py: the exact commands and manifests, against golden files, bash and schemas.

A golden file changes with what is run on a cluster. Where that is meant, write it anew:

    python -m tests.launch.test_cluster
"""

import contextlib
import copy
import functools
import io
import json
import pathlib
import subprocess

import jsonschema
import pytest

from launch import cluster
from launch.common import app

GOLDEN = pathlib.Path(__file__).parents[1] / "data" / "cluster"
_TRAIN = ["--gin_file=experiments/retro_172m.gin", "--workdir=/mnt/shared/retro"]
_TPU = ["--kind=tpu", "--name=retro", "--accelerator=v5p-128", "--project=p", "--zone=us-east5-a"]
_GKE = ["--kind=gke", "--name=retro", "--image=gcr.io/p/retro:1"]
_SLURM = ["--kind=slurm", "--name=retro", "--hosts=8", "--gpus=8", "--python=/venv/bin/python"]
CASES = {
    "tpu_start": [*_TPU, "--code=gs://b/code", *_TRAIN],
    "tpu_slices_start": [
        *_TPU,
        "--code=gs://b/code",
        "--num_slices=2",
        "--spot",
        *_TRAIN,
        "--gin_bindings=BatchConfig.mixture = {'wiki': 1.0, \"it's\": 2.0}",
        "--train_flag=--baseline",
    ],
    "tpu_slices_logs": [*_TPU, "--code=gs://b/code", "--num_slices=2", "--action=logs"],
    "tpu_stop": [*_TPU, "--code=gs://b/code", "--action=stop"],
    "gke_tpu_start": [
        *(*_GKE, "--accelerator=v5p", "--tpu_topology=4x4x4", "--num_slices=2", "--spot"),
        *("--claim=filestore", *_TRAIN),
    ],
    "gke_gpu_start": [
        *(*_GKE, "--accelerator=nvidia-h100-80gb", "--gpus=8", "--hosts=4", "--namespace=ml"),
        *("--pod_cpu=32", "--pod_memory=200Gi"),
        *_TRAIN,
    ],
    "gke_logs": [*_GKE, "--accelerator=v6e", "--tpu_topology=4x8", "--action=logs"],
    "gke_stop": [*_GKE, "--accelerator=v6e", "--tpu_topology=4x8", "--action=stop"],
    "slurm_start": [*_SLURM, "--partition=gpu", "--time_limit=24:00:00", *_TRAIN],
    "slurm_logs": [*_SLURM, "--action=logs"],
    "slurm_stop": [*_SLURM, "--action=stop"],
}
_TEXT, _COUNT, _ANY = str, int, object
# What the JobSet API (v1alpha2) knows of the fields that a manifest may have, and what it needs (!).
# No package carries its schema; the jobs in it are checked against Kubernetes' own.
_JOB_SET = {
    "apiVersion!": _TEXT,
    "kind!": _TEXT,
    "metadata!": {"name!": _TEXT, "namespace": _TEXT, "annotations": _ANY, "labels": _ANY},
    "spec!": {
        "failurePolicy": {"maxRestarts": _COUNT},
        "network": {"enableDNSHostnames": bool, "subdomain": _TEXT},
        "replicatedJobs!": [{"name!": _TEXT, "replicas": _COUNT, "template!": {"spec!": _ANY}}],
    },
}
_JOB = json.loads((GOLDEN.parent / "kubernetes_job.json").read_text())


def _printed(arguments):
    """What --dry_run prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert app.execute(cluster.main, ["launch.cluster", *arguments, "--dry_run"]) == 0
    return out.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_golden_one_and_bash_can_read_it(name):
    printed = _printed(CASES[name])
    assert printed == (GOLDEN / f"{name}.sh").read_text()
    done = subprocess.run(
        ["bash", "-n"], input=printed, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def _fits(value, schema, where="manifest"):
    """Checks a value against a schema of the form above."""
    if isinstance(schema, dict):
        known = {name.rstrip("!"): (inner, name.endswith("!")) for name, inner in schema.items()}
        assert set(value) <= set(known), where
        assert {name for name, (_, needed) in known.items() if needed} <= set(value), where
        for name, inner in value.items():
            _fits(inner, known[name][0], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for item in value:
            _fits(item, schema[0], where)
    else:
        assert isinstance(value, schema), where


@pytest.mark.parametrize("name", ["gke_tpu_start", "gke_gpu_start"])
def test_manifests_have_the_fields_that_kubernetes_knows(name):
    text = (GOLDEN / f"{name}.sh").read_text()
    manifest = json.loads(text[text.index("\n{") : text.rindex("}") + 1])
    _fits(manifest, _JOB_SET)
    (job,) = manifest["spec"]["replicatedJobs"]
    jobs = jsonschema.Draft202012Validator(_JOB)
    jobs.validate(job["template"]["spec"])
    for field in ("paralelism", "template.spec.nodeSelectors", "template.spec.containers"):
        *inside, last = field.split(".")
        broken = copy.deepcopy(job["template"]["spec"])
        functools.reduce(dict.__getitem__, inside, broken)[last] = {}
        assert not jobs.is_valid(broken), field
    hosts = job["template"]["spec"]["parallelism"]
    assert hosts == job["template"]["spec"]["completions"] == (16 if "tpu" in name else 4)
    assert job["replicas"] == (2 if "tpu" in name else 1)


def test_scripts_inside_of_commands_are_bash_too():
    """The script of a TPU host, and the one that sbatch reads, are inside of quotes above."""
    for name in ("tpu_slices_start", "slurm_start"):
        with _flags(CASES[name]) as plan:
            scripts = [c.stdin or c.words[-1].removeprefix("--command=") for c in plan]
        for script in scripts:
            done = subprocess.run(["bash", "-n"], input=script, text=True, check=False)
            assert done.returncode == 0, script


@contextlib.contextmanager
def _flags(arguments):
    """The plan of a command line."""
    plans = []
    main = cluster.run
    cluster.run = plans.append
    try:
        assert app.execute(cluster.main, ["launch.cluster", *arguments]) == 0
        yield plans
    finally:
        cluster.run = main


def test_the_loop_on_a_tpu_host_starts_again_what_can_go_on(tmp_path):
    from retro_jax.distributed.cluster_plans import _restarting

    fake = tmp_path / "trainer"
    fake.write_text('#!/bin/bash\necho run >> runs\nexit $(sed -n "$(wc -l < runs)p" statuses)\n')
    fake.chmod(0o755)
    script = _restarting(str(fake)).replace("sleep 10", "sleep 0")
    for statuses, end, runs in (("75 76 0", 0, 3), ("75 1", 1, 2), ("134 2", 2, 2)):
        (tmp_path / "runs").write_text("")
        (tmp_path / "statuses").write_text("\n".join(statuses.split()) + "\n")
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == end
        assert (tmp_path / "runs").read_text().count("run") == runs
    (tmp_path / "stop").touch()
    (tmp_path / "runs").write_text("")
    (tmp_path / "statuses").write_text("75\n75\n")
    assert subprocess.run(["bash", "-c", script], cwd=tmp_path, check=False).returncode == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--kind is missing: expected one of tpu, gke, slurm"),
        (["--kind=tpu"], "--gin_file is missing"),
        ([*_TPU[:1], *_TRAIN], "--name is missing"),
        ([*_TPU, "--name=Retro_1", *_TRAIN], "Job.name is 'Retro_1': expected"),
        ([*_TPU, *_TRAIN], "TpuVms.code is '': expected a place in a bucket"),
        (
            [*_TPU, "--accelerator=v9-8", *_TRAIN],
            "TpuVms.accelerator is 'v9-8': expected one of v4",
        ),
        ([*_TPU, "--project=", *_TRAIN], "TpuVms.project is ''"),
        ([*_GKE, "--accelerator=v5p", *_TRAIN], "Gke.topology is '': expected extents"),
        ([*_GKE, "--accelerator=v5p", "--tpu_topology=1x1x2", *_TRAIN], "expected whole hosts"),
        ([*_GKE, "--accelerator=x", *_TRAIN], "Gke.accelerator is 'x'"),
        ([*_GKE, "--gpus=8", "--accelerator=x", *_TRAIN], "Gke.hosts is 0"),
        ([*_GKE, "--image=", *_TRAIN], "Gke.image is ''"),
        ([*_GKE, "--pod_memory=200 GB", *_TRAIN], "Gke.memory is '200 GB'"),
        ([*_SLURM, "--hosts=0", *_TRAIN], "Slurm.hosts is 0"),
        ([*_SLURM, "--python=", *_TRAIN], "Slurm.python is ''"),
        ([*_SLURM, *_TRAIN, "--train_flag=baseline"], "--train_flag=baseline: expected a flag"),
    ],
)
def test_bad_flags_are_one_line(arguments, message, capsys):
    assert app.execute(cluster.main, ["launch.cluster", *arguments, "--dry_run"]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_command_that_fails_or_is_not_there_is_one_line(capsys):
    def main(*words):
        return app.execute(lambda: cluster.run(cluster.Command(words)), ["program"])

    assert main("false") == 1
    assert "false ended with status 1: expected 0" in capsys.readouterr().err
    assert main("no-such-program-anywhere") == 1
    assert "no-such-program-anywhere is not installed" in capsys.readouterr().err


if __name__ == "__main__":
    for each, flags in CASES.items():
        (GOLDEN / f"{each}.sh").write_text(_printed(flags))
