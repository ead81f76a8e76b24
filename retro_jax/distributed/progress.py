"""Progress bars of the entry points."""

import sys

import tqdm

from retro_jax.distributed import processes

_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0  # between refreshes: a log file gets few lines


def progress_bar(total: int, what: str, unit: str) -> tqdm.tqdm:
    """A bar on standard error with the time left; of several processes the first one's."""
    seconds = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm.tqdm(
        total=total,
        desc=what,
        unit=unit,
        mininterval=seconds,
        dynamic_ncols=True,
        disable=not processes.is_first(),
    )
