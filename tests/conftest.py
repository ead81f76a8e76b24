"""Environment of every test: CPU, 8 simulated devices, and compiled programs kept between runs.

Set before jax is imported, and in the environment, so that entry points run as subprocesses share
it. Tests compile much and compute little: without LLVM's optimisation the gradient of a tiny RETRO
compiles in 2 s instead of 11, its initialisation in 3 s instead of 38 (2 cores, jax 0.10.2).
"""

import gc
import importlib.metadata
import os
import pathlib
from collections.abc import Iterator

import pytest

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "jax"
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # which later ones end the process at
    # Eight devices share two busy cores: a collective that waits for 40 s would end the process.
    _FLAGS.append("--xla_cpu_collective_call_terminate_timeout_seconds=300")

os.environ["JAX_PLATFORMS"] = "cpu"
_given = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join([*_given, *(flag for flag in _FLAGS if flag not in _given)])
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

pytest_plugins = ["tests.conftest_prepared"]

# The files that take longest, in the order in which the workers are given them.
_FIRST = (
    "launch/test_train.py",
    "model/test_sharding.py",
    "distributed/test_processes.py",
    "launch/test_results.py",
    "launch/test_prepare.py",
    "data_pipelines/artefacts/test_ray_runner.py",
)

# Linux gives a process 65,530 memory maps. A compiled program keeps three or more, and XLA ends the
# process that has none left: a file may add 20,000 (jaxlib 0.12).
_MAPS = pathlib.Path("/proc/self/maps")
_MANY_MAPS = 20_000


@pytest.fixture(autouse=True, scope="module")
def _few_memory_maps() -> Iterator[None]:
    """Forgets compiled programs after a file of tests, where they keep many maps."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MANY_MAPS:
        import jax  # only now, as the environment above must be read first

        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that at the end no worker is left alone with one."""
    root = pathlib.Path(__file__).resolve().parent
    places = {root / name: place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
