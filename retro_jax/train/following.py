"""Copies a run's files to a bucket while it trains: for a mirror, and for a workdir in a bucket."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from retro_jax.errors import UserError

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def following(
    update: Callable[[], object], seconds: float, *, name: str, kept: str = ""
) -> Iterator[None]:
    """Calls `update` again and again in a thread while inside, and once at the end.

    What it cannot write meanwhile is a warning, as it may be written later.

    Args:
      update: copies what is new. seconds: between two calls. name: of the thread.
      kept: what the error at the end says of the files that were not copied.

    Raises:
      UserError: the last copies cannot be written; a warning where another error ends the run.
    """
    left = threading.Event()

    def follow() -> None:
        warned = ""
        while not left.wait(seconds):
            try:
                update()
            except UserError as error:
                if str(error) != warned:
                    _logger.warning("%s", error)
                warned = str(error)

    thread = threading.Thread(target=follow, name=name, daemon=True)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        left.set()
        thread.join()
        try:
            update()
        except UserError as error:
            if not failed:
                raise UserError(f"{error}{kept}") from error
            _logger.warning("%s", error)  # the error that ended the run is reported
