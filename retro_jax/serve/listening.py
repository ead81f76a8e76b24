"""Listens at a port until the process is asked to stop. The packages of the extra `serve` come in here."""

import logging
import signal
from collections.abc import Callable, Sequence

from retro_jax.errors import UserError
from retro_jax.generate.text_generator import TextGenerator
from retro_jax.serve.limits import Limits


def listen(
    generator: TextGenerator,
    limits: Limits,
    *,
    host: str,
    port: int,
    api_key: str | None = None,
    change: Callable[[str, Sequence[tuple[str, str]], Sequence[str]], list[str]] | None = None,
    warm_up: bool = True,
) -> None:
    """Serves until SIGTERM or Ctrl-C; then refuses new requests and finishes the running ones.

    Args:
      generator, limits, api_key, change, warm_up: as for `retro_jax.serve.app.Server`.
      host, port: where to listen.

    Raises:
      UserError: the extra is not installed, or nothing can listen there.
    """
    try:
        import uvicorn

        from retro_jax.serve.app import Server
    except ImportError as error:
        message = "launch.serve needs it: expected pip install 'retro-jax[serve]'"
        raise UserError(f"{error.name} is not installed; {message}") from error
    server = Server(generator, limits, api_key=api_key, change=change, warm_up=warm_up)
    logging.getLogger("retro_jax.serve").setLevel(logging.INFO)
    listener = uvicorn.Server(
        uvicorn.Config(
            server.app,
            host=host,
            port=port,
            log_config=None,  # uvicorn's own closes the streams of handlers that are there
            log_level="warning",
            timeout_graceful_shutdown=int(limits.stop_seconds),
        )
    )
    stopped: list[int] = []
    # uvicorn raises the signal again when all is done.
    before = signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    print(f"{generator.name}: http://{host}:{port}, after compiling", flush=True)
    try:
        listener.run()
    except SystemExit as error:  # by which uvicorn says that it cannot begin
        raise UserError(f"cannot listen at {host}:{port}: expected a free port") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    if not listener.started and not stopped:
        raise UserError("the server could not start: expected none of the errors above")
