"""The report's parts: what each exchange costs and where, memory, and a step that does not fit."""

import dataclasses
import types
from typing import Any

import numpy as np
import pytest

from retro_jax.costs import step_report
from retro_jax.costs.hlo import Array
from retro_jax.costs.partial_compile import CompilationError, Program
from retro_jax.costs.program_costs import Collective
from retro_jax.costs.roofline import parse_slice
from retro_jax.costs.step_report import FIRST_STATE, STEP, check, group_exchanges, shard_bytes
from retro_jax.errors import UserError
from retro_jax.train.global_batches import BatchShape
from retro_jax.train.loop import TrainConfig
from retro_jax.train.parameter_names import named_leaves
from retro_jax.train.plan import Settings, make_plan
from retro_jax.train.warm_start import StartConfig
from tests.model.tiny import TINY

SETTINGS = Settings(retro=TINY, training=TrainConfig(steps=1000))
SHAPE = BatchShape(batch_size=8, sequence_length=16)


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


def test_what_the_compiler_allocates_is_reported(monkeypatch):
    """Bytes beyond the arguments are temporaries; more than the chip has is one line."""
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}"
    plan, slice_ = make_plan(SETTINGS, SHAPE), parse_slice("v5e:2x2")
    needed = {STEP: 2**30, FIRST_STATE: 2**29}

    def compiled(lower) -> Program:
        *work, name = lower.args
        assert work == [SETTINGS, SHAPE, "v5e:2x2"]
        return Program(text, needed[name], seconds=2.0, lowered_bytes=100)

    monkeypatch.setattr(step_report, "compile_until_allocated", compiled)
    report = check(plan, slice_)
    assert report.memory.total == 2**30
    assert report.memory.temporaries > 0
    assert report.first_state == 2**29
    assert (report.compile_seconds, report.lowered_bytes, report.compiled_bytes) == (
        2,
        100,
        len(text),
    )
    for name in (FIRST_STATE, STEP):
        needed[name] = 17 * 2**30
        with pytest.raises(UserError, match=rf"the {name} needs 17\.00 GiB of the 16\.00 GiB"):
            check(plan, slice_)


def test_restoring_needs_the_state_and_what_is_taken_of_another_run():
    """The bytes of a checkpoint; another run's parameters are read beside the first state."""
    plan = make_plan(SETTINGS, SHAPE)
    whole = shard_bytes(plan.abstract)
    assert step_report.restored_bytes(plan) == whole
    begun = dataclasses.replace(SETTINGS, start=StartConfig(run="W/baseline", fresh=("encoder.*",)))
    taken = [leaf for n, leaf in named_leaves(plan.abstract.params).items() if "encoder." not in n]
    expected = whole + shard_bytes(taken)
    assert step_report.restored_bytes(make_plan(begun, SHAPE)) == expected


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
        check(make_plan(SETTINGS, SHAPE), parse_slice("v5e:2x2"))
