"""Settings of XLA for a whole process: deterministic kernels, and compiled programs kept on disk."""

import os
import pathlib

import jax

# Reductions in a fixed order, no kernel that has none, and the same choice of kernels at every start.
# cuDNN's attention reads the same flags for its backward pass.
DETERMINISTIC_FLAGS = (
    "--xla_gpu_deterministic_ops=true",
    "--xla_gpu_exclude_nondeterministic_ops=true",
    "--xla_gpu_autotune_level=0",
)
_FOLDER = pathlib.Path("~/.cache/retro_jax/programs")


def be_deterministic() -> None:
    """Asks XLA for kernels that give the same bits at every run on GPUs; others have no other.

    Call it before anything uses a device: XLA reads its flags once. What XLA_FLAGS says stays.
    """
    given = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    missing = [flag for flag in DETERMINISTIC_FLAGS if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*given, *missing])


def keep_programs(platform: str) -> pathlib.Path | None:
    """Keeps compiled programs of an accelerator on this host's disk, so that a restart skips compiling.

    JAX_COMPILATION_CACHE_DIR names another folder; where it is set, or empty, nothing changes.

    Args:
      platform: that programs are compiled for. A CPU's are not kept: they compile fast, and run on
        the very kind of CPU only.

    Returns:
      The folder, or None where nothing was changed.
    """
    if platform == "cpu" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return None
    folder = _FOLDER.expanduser()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder
