"""The report's parts: what each exchange costs and where, memory, and a step that does not fit."""

import types
from typing import Any

import numpy as np
import pytest

from retro_jax.config import ExecutionConfig
from retro_jax.costs import step_report
from retro_jax.costs.hlo import Array
from retro_jax.costs.partial_compile import CompilationError, Program
from retro_jax.costs.program_costs import Collective
from retro_jax.costs.roofline import parse_slice
from retro_jax.costs.step_report import Work, abstract_batch, check, group_exchanges
from retro_jax.errors import UserError
from retro_jax.sharding import MeshConfig, make_mesh
from retro_jax.train.optimizer import OptimizerConfig
from tests.model.tiny import TINY

WORK = Work(TINY, ExecutionConfig(), OptimizerConfig(), batch_size=8, sequence_length=16)


def grid(data: int, fsdp: int, tensor: int, slice_name: str) -> Any:
    """A mesh of devices that are nothing but coordinates, in the order of the slice's grid."""
    extents = parse_slice(slice_name).extents
    places = [types.SimpleNamespace(coords=tuple(index)) for index in np.ndindex(extents)]
    devices = np.array(places, dtype=object).reshape(data, fsdp, tensor)
    names = ("data", "fsdp", "tensor")
    return types.SimpleNamespace(devices=devices, axis_names=names, size=devices.size)


def gathered(groups: tuple[tuple[int, ...], ...], times: int, operation: str) -> Collective:
    """An all-gather that ends with 1 MB on each device."""
    return Collective("all-gather", (Array("f32", (250_000,)),), groups, times, operation)


def test_exchanges_are_gathered_by_kind_and_axes():
    """Bytes by operation, the largest first; time at the rate of the links that the group has."""
    mesh = grid(2, 2, 4, "v5p:4x2x2")
    rows = tuple(tuple(range(first, first + 4)) for first in range(0, 16, 4))  # along tensor
    columns = tuple((i, i + 4) for i in (0, 1, 2, 3, 8, 9, 10, 11))  # along fsdp
    both = tuple(tuple(range(first, first + 8)) for first in (0, 8))
    collectives = (
        gathered(columns, 1, "embedding"),
        gathered(columns, 6, "layers"),
        gathered(rows, 2, "loss"),
        gathered(both, 1, "norm"),
    )
    found = group_exchanges(collectives, mesh, parse_slice("v5p:4x2x2"))
    assert [(e.kind, e.axes, e.count) for e in found] == [
        ("all-gather", "fsdp", 7),
        ("all-gather", "tensor", 2),
        ("all-gather", "fsdp+tensor", 1),
    ]
    assert list(found[0].operations.items()) == [("layers", 3e6), ("embedding", 0.5e6)]
    assert found[0].nbytes == 3.5e6
    # fsdp is one hop in one dimension: a single link of 100 GB/s; tensor is a square: two
    assert found[0].seconds == pytest.approx(3.5e6 / 100e9)
    assert found[1].seconds == pytest.approx(2 * 0.75e6 / 200e9)
    assert group_exchanges(collectives, mesh, None)[0].seconds is None


def test_a_sequence_that_is_no_whole_number_of_chunks_is_refused():
    work = Work(TINY, ExecutionConfig(), OptimizerConfig(), batch_size=8, sequence_length=18)
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match="sequence_length 18: expected a multiple of chunk_length"):
        abstract_batch(work, mesh)


def test_what_the_compiler_allocates_is_reported(monkeypatch):
    """Bytes beyond the arguments are temporaries; more than the chip has is one line."""
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}"
    mesh, slice_ = make_mesh(MeshConfig()), parse_slice("v5e:2x2")
    held = 2**30

    def compiled(lower) -> Program:
        work, mesh_config, name = lower.args
        assert (work, mesh_config, name) == (WORK, MeshConfig(data=8), "v5e:2x2")
        return Program(text, held, seconds=2.0, lowered_bytes=100)

    monkeypatch.setattr(step_report, "compile_until_allocated", compiled)
    report = check(WORK, mesh, slice_)
    assert report.memory.total == held
    assert report.memory.temporaries > 0
    assert (report.compile_seconds, report.lowered_bytes, report.compiled_bytes) == (
        2,
        100,
        len(text),
    )
    held = 17 * 2**30
    with pytest.raises(UserError, match=r"the step needs 17\.00 GiB of the 16\.00 GiB"):
        check(WORK, mesh, slice_)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.25G of 15.75G hbm.",
            "the step needs 33.25 GiB of the 15.75 GiB that a v5e has: expected a larger mesh axis",
        ),
        ("INTERNAL: a defect", "INTERNAL: a defect"),
    ],
)
def test_more_memory_than_a_chip_has_is_one_line(monkeypatch, message, expected):
    """The compiler's refusal with what it needs and has; any other error stays what it is."""

    def refuse(lower) -> Program:
        raise CompilationError(message)

    monkeypatch.setattr(step_report, "compile_until_allocated", refuse)
    kind: type[Exception] = UserError if "hbm" in message else CompilationError
    with pytest.raises(kind, match=expected):
        check(WORK, make_mesh(MeshConfig()), parse_slice("v5e:2x2"))
