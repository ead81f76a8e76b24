"""retro_jax/compiler.py: XLA's flags, and where compiled programs are kept."""

import os

import jax
import pytest

from retro_jax import compiler


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", " ".join(compiler.DETERMINISTIC_FLAGS)),
        (
            "--xla_gpu_autotune_level=2 --xla_other",
            "--xla_gpu_autotune_level=2 --xla_other "
            "--xla_gpu_deterministic_ops=true --xla_gpu_exclude_nondeterministic_ops=true",
        ),
    ],
)
def test_deterministic_flags_are_added_to_those_given(monkeypatch, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    compiler.be_deterministic()
    compiler.be_deterministic()
    assert os.environ["XLA_FLAGS"] == expected


def test_programs_of_accelerators_are_kept_unless_the_environment_says_where(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path))
    try:
        assert compiler.keep_programs("gpu") is None  # the tests set the variable
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        assert compiler.keep_programs("cpu") is None
        assert jax.config.jax_compilation_cache_dir == before
        folder = tmp_path / ".cache" / "retro_jax" / "programs"
        assert compiler.keep_programs("tpu") == folder
        assert jax.config.jax_compilation_cache_dir == str(folder)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
