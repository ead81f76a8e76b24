"""Slices by name, what their links carry, and what binds."""

import itertools

import pytest

from retro_jax.chips import CHIPS
from retro_jax.costs.roofline import Bound, parse_slice
from retro_jax.errors import UserError


def test_a_slice_has_chips_and_a_grid():
    cube = parse_slice("v5p:4x4x8")
    assert (cube.chip.name, cube.extents, cube.size, cube.name) == (
        "v5p",
        (4, 4, 8),
        128,
        "v5p:4x4x8",
    )
    assert parse_slice("v6e:16x16").size == 256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "topology 'v9:2x2' names no known chip: expected one of v4, v5e, v5p, v6e and"),
        ("v5e:4x4x4", "has no grid of v5e: expected 2 positive extents, as in v5e:4x4"),
        ("v4:8", "topology 'v4:8' has no grid of v4: expected 3 positive extents, as in v4:4x4x4"),
        ("v4:4x0x4", "expected 3 positive extents"),
        ("v5p", "topology 'v5p' has no grid of v5p"),
        ("", "topology '' names no known chip"),
    ],
)
def test_what_is_no_slice_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        parse_slice(name)


def test_links_that_a_group_of_chips_can_use():
    """A dimension gives two links where it is a ring that the group fills, else one."""
    cube = parse_slice("v5p:4x4x8")
    link = 100e9
    assert cube.chip.link == link
    everything = list(itertools.product(range(4), range(4), range(8)))
    assert cube.bandwidth(everything) == 6 * link == CHIPS["v5p"].ici
    assert cube.bandwidth([(0, 0, z) for z in range(8)]) == 2 * link
    assert cube.bandwidth([(0, 0, z) for z in range(4)]) == link
    assert cube.bandwidth([(0, 0, 0), (1, 1, 0)]) == 2 * link
    grid = parse_slice("v5e:4x16")
    assert grid.bandwidth([(x, 0) for x in range(4)]) == 50e9
    assert grid.bandwidth([(0, y) for y in range(16)]) == 100e9


def test_the_slowest_part_binds():
    bound = Bound({"compute": 2.0, "HBM": 3.0, "ICI": 1.0}, model_flops=150.0, peak=100.0)
    assert (bound.step, bound.binds) == (3.0, "HBM")
    assert bound.mfu == 0.5
    assert bound.serial_mfu == 0.25
