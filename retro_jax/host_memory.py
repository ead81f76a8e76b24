"""Memory of a process that computes on a CPU.

XLA allocates a program's temporaries again each time it runs. glibc gives blocks of this size back to the
system as soon as they are free, so that every step faults every page of them in again: an eighth of the
time of a step with 2.5 GB of them (docs/performance.md).
"""

import ctypes
import importlib.metadata
import importlib.util

import jax

# The parameters' numbers in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Keeps freed memory in this process for its next allocations, if JAX computes on a CPU.

    The process stays as large as it has been. Call it first of all: a thread that has allocated something
    before, as JAX's own do when its backend starts, continues as it was.

    Returns:
      Whether it is done: not where there may be an accelerator, nor without glibc.
    """
    if not _only_cpu():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # One arena, since only the main one may keep more than 64 MB; nothing by mmap, which is given
    # back as soon as it is free; and no trimming.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(mallopt(parameter, value) for parameter, value in settings)


def _only_cpu() -> bool:
    """Whether JAX will find no accelerator, as far as is known before its backend starts."""
    if platforms := jax.config.values["jax_platforms"]:
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
