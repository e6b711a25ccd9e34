"""Runs the server of the page until Ctrl-C."""

import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from dspo_jax.errors import UserError

_SECONDS_TO_END = 3


class _Uvicorn(uvicorn.Server):
    """A server that Ctrl-C and SIGTERM end, which are its ordinary end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens there.

    Raises:
      UserError: the address or port cannot be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host={host} --port={port}: cannot be listened to ({error}); choose another port, or 0 for any"
        ) from error


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answers requests until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=_SECONDS_TO_END,
    )
    _Uvicorn(config).run(sockets=[listener])
