"""Metrics on a TCP port of the loopback: `GET /metrics`, and nothing else, for any user of this machine.

What is there names hosts and counts, never a ref or a token; that is why it may be without a password, and why it is
on the loopback alone. A port that somebody else has costs the metrics, not the models: it is tried again.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import trio
from starlette.applications import Starlette

from weightfs.control.listener import BACKLOG, BoundedListener
from weightfs.control.metrics import Scraper
from weightfs.control.server import metrics_route, serve_connections
from weightfs.errors import leaves

# The instance before us may have the port until it has ended (TimeoutStopSec=30s), a stranger for longer.
RETRY_SECONDS: Final = 30.0

log = logging.getLogger(__name__)


@contextmanager
def _bound(host: str, port: int) -> Iterator[trio.socket.SocketType]:
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # after a restart: connections in TIME_WAIT
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
        yield trio.socket.from_stdlib_socket(sock)


async def serve_metrics(scraper: Scraper, host: str, port: int) -> None:
    """Answer on `host` (a loopback address) and `port` until cancelled; while they cannot be had, try again."""
    app = Starlette(routes=[metrics_route(scraper)])
    told = False
    while True:
        try:
            with _bound(host, port) as sock:
                log.info("metrics are at http://%s/metrics", _shown(host, port))
                told = False
                await serve_connections(app, BoundedListener(sock))
        except* OSError as group:  # of the bind, or in a group of the nursery's
            error = next(leaves(group))
            if not told:
                log.error(
                    "metrics cannot be served at %s: %s; end who has the port, or set another metrics-listen; "
                    "it is tried again every %.0f s",
                    _shown(host, port), getattr(error, "strerror", error), RETRY_SECONDS,
                )  # fmt: skip
            told = True
        await trio.sleep(RETRY_SECONDS)


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
