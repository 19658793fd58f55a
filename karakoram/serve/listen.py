"""A port, and uvicorn behind it.

The socket is made here: it is bound before the model loads, so a taken port is an error at once, and the kernel is told
to give up connections that take no byte for `Limits.stalled_s` (TCP_USER_TIMEOUT): memory for a reader that never reads
is then bounded in time as well.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

from karakoram.errors import InputError

IDLE_S = 75  # clients keep connections for 60; who closes first loses no request
GRACE_S = 3  # for open connections at the end; their streams have been ended by then


def is_public(host: str) -> bool:
    """Whether other machines can reach a server on `host`: anything but the loopback."""
    if host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # a name of this machine


def bind(host: str, port: int, stalled_s: float = 60.0) -> socket.socket:
    """A listening socket. InputError where the address is no good or taken; port 0 takes a free one."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise InputError(f"Cannot listen on {host}: {error}.", "Check --host and --port.") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; accepted sockets inherit it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stalled_s * 1000))
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise InputError(
            f"Port {port} of {host} cannot be had: {error.strerror or error}.", "Take another with --port."
        ) from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a server on this socket is found."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, ending the streams first when it is told to stop: it would wait for them."""

    def __init__(self, app: FastAPI, **options: Any) -> None:
        self._app = app
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=IDLE_S,
                lifespan="on",
                ws="none",
                **options,
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        floor = getattr(self._app.state, "floor", None)
        if floor is not None:
            floor.close()
        await super().shutdown(sockets)
