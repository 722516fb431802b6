"""A network link in user space: a TCP relay with one shared rate and a latency, for demo and benchmarks.

Rule: bytes leave in the order in which they came, at most `rate` bytes per second towards the clients over
all connections together, each `latency / 2` seconds after it was sent, in both directions; a new connection
pays one `latency` for its handshake. `limit_rate` of nginx counts per connection, which favours clients with
many; netem needs root and a kernel that has it. Not modelled: loss, and TCP's slow start.

Runs as a process of its own, so that neither side pays for it, and until its stdin ends: `python -m
weightfs.testing.link --help`; scripts use `Link`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import trio

BLOCK = 64 * 1024  # what one connection may send before another has its turn
CATCH_UP = 0.005  # seconds of sending that a late wake-up may make good: timers are not exact
SOCKET_BUFFER = 4 * BLOCK  # what may pile up unseen between server and relay
FEWEST_IN_FLIGHT = 8  # blocks on their way in one direction of one connection, if rate x latency is less
MOST_IN_FLIGHT = 1024
UNLIMITED = 1e12  # bytes per second


@dataclass(slots=True)
class _Wire:
    """One direction: when the last reserved byte will have left."""

    rate: float  # bytes per second
    delay: float  # seconds
    free_at: float = 0.0

    @property
    def in_flight(self) -> int:
        """How many blocks one connection may have on the wire."""
        return int(min(MOST_IN_FLIGHT, max(FEWEST_IN_FLIGHT, 2 * self.rate * self.delay / BLOCK)))

    def reserve(self, count: int, now: float) -> float:
        """The time at which `count` bytes, sent now, have left."""
        self.free_at = max(self.free_at, now - CATCH_UP) + count / self.rate
        return self.free_at


async def _pump(source: trio.SocketStream, sink: trio.SocketStream, wire: _Wire) -> None:
    """Relay until `source` ends, then end `sink`."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](wire.in_flight)

    async def read() -> None:
        async with send:
            while data := await source.receive_some(BLOCK):
                left = wire.reserve(len(data), trio.current_time())
                await trio.sleep_until(left)
                await send.send((left + wire.delay, data))

    async def write() -> None:
        async for due, data in receive:
            await trio.sleep_until(due)
            await sink.send_all(data)
        await sink.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(write)


async def _serve(client: trio.SocketStream, *, port: int, down: _Wire, up: _Wire) -> None:
    try:
        await trio.sleep(down.delay + up.delay)
        async with await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as nursery:
            server.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, SOCKET_BUFFER)
            nursery.start_soon(_pump, client, server, up)
            nursery.start_soon(_pump, server, client, down)
    except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # either end went away: so does the connection


async def relay(targets: Sequence[int], *, rate: float, latency: float) -> None:
    """Relay loopback connections to `targets` until stdin ends; prints the ports it listens on, in their order."""
    down, up = _Wire(rate, latency / 2), _Wire(UNLIMITED, latency / 2)
    async with trio.open_nursery() as nursery:
        ports = []
        for port in targets:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            ports.append(str(listeners[0].socket.getsockname()[1]))
            handler = partial(_serve, port=port, down=down, up=up)
            nursery.start_soon(trio.serve_listeners, handler, listeners)
        print(*ports, flush=True)  # noqa: T201  the protocol with the parent
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)  # it ends with the parent
        nursery.cancel_scope.cancel()


class Link:
    """A relay process in front of one or more loopback ports; `ports` are those that clients connect to.

    Args:
        targets: the ports that it relays to; they share the rate.
        rate: bytes per second towards the clients, all connections together.
        latency: of a round trip, in seconds.
    """

    def __init__(self, *targets: int, rate: float = UNLIMITED, latency: float = 0.0) -> None:
        self._arguments = [*map(str, targets), "--rate", str(rate), "--latency", str(latency)]
        self._process: subprocess.Popen[str] | None = None
        self.ports: tuple[int, ...] = ()

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "weightfs.testing.link", *self._arguments]
        self._process = subprocess.Popen(  # noqa: S603  our own module
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self._process.stdout is not None
        self.ports = tuple(map(int, self._process.stdout.readline().split()))
        if not self.ports:
            self.stop()
            raise RuntimeError("the link did not start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it, and every connection through it. Doing it twice does nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def main() -> None:
    """Run as `python -m weightfs.testing.link PORT…`."""
    parser = argparse.ArgumentParser(description="Relay loopback connections over a slower link.")
    parser.add_argument("ports", type=int, nargs="+", metavar="PORT", help="loopback port to relay to")
    parser.add_argument("--rate", type=float, default=UNLIMITED, help="bytes per second, all together")
    parser.add_argument("--latency", type=float, default=0.0, help="round trip in seconds")
    arguments = parser.parse_args()
    trio.run(partial(relay, arguments.ports, rate=arguments.rate, latency=arguments.latency))


if __name__ == "__main__":
    main()
