"""Several TPU slices in one mesh."""

import types

import pytest

from retro_jax.errors import UserError
from retro_jax.sharding import arrange_slices


def _devices(slices: int, chips: int):
    """Chips of v5e slices, numbered over all of them, in an order that is not by slice."""
    made = [
        types.SimpleNamespace(
            platform="tpu",
            device_kind="none",
            id=chips * s + c,
            coords=(c % 4, c // 4, 0),
            core_on_chip=0,
            process_index=s,
            slice_index=s,
        )
        for c in range(chips)
        for s in range(slices)
    ]
    return made


def test_the_data_axis_goes_over_slices_and_the_others_stay_inside():
    arranged = arrange_slices(_devices(2, 8), (4, 2, 2))
    numbers = [[[device.slice_index for device in row] for row in plane] for plane in arranged]
    assert numbers == [[[s, s], [s, s]] for s in (0, 0, 1, 1)]
    assert {device.id for device in arranged.ravel()} == set(range(16))


def test_a_data_axis_that_slices_do_not_divide_is_refused():
    with pytest.raises(
        UserError, match="data=3 cannot be split over 2 slices: expected a multiple"
    ):
        arrange_slices(_devices(2, 3), (3, 2, 1))
