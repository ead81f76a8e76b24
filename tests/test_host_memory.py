"""What a process frees it keeps, on a CPU only."""

import subprocess
import sys

import jax
import pytest

from retro_jax import host_memory

_PROGRAM = """
import resource, sys
from retro_jax.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * int(50e6)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize(("mode", "fewest", "most"), [("give back", 12, 10**6), ("keep", 0, 9)])
def test_pages_are_faulted_in_once(mode, fewest, most):
    """50 MB are 12,207 pages of 4 kB, or 24 of 2 MB where the system has chosen these."""
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True
    )
    assert fewest <= int(run.stdout) <= most


@pytest.mark.parametrize(
    ("platforms", "plugins", "libtpu", "alone"),
    [
        ("cpu", ["cuda"], True, True),
        ("cuda", [], False, False),
        ("cuda,cpu", [], False, False),
        (None, [], False, True),
        (None, ["cuda"], False, False),
        (None, [], True, False),
    ],
)
def test_only_where_there_is_no_accelerator(monkeypatch, platforms, plugins, libtpu, alone):
    found = {"metadata": lambda group: plugins, "util": lambda name: object() if libtpu else None}
    monkeypatch.setattr(host_memory.importlib.metadata, "entry_points", found["metadata"])
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", found["util"])
    before = jax.config.values["jax_platforms"]
    try:
        jax.config.update("jax_platforms", platforms)
        assert host_memory._only_cpu() is alone
    finally:
        jax.config.update("jax_platforms", before)
