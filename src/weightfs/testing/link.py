"""A network link in user space: a TCP relay with one shared rate and a latency, for demo and benchmarks.

Rule: bytes leave in the order in which they came, at most `rate` bytes per second towards the clients over
all connections together, each `latency / 2` seconds after it was sent, in both directions; a new connection
pays one `latency` for its handshake. `limit_rate` of nginx counts per connection, which favours clients with
many; netem needs root and a kernel that has it. Not modelled: loss, and TCP's slow start.

Runs as a process of its own, so that neither side pays for it: `python -m weightfs.testing.link --help`;
scripts use `Link`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import trio

BLOCK = 64 * 1024  # what one connection may send before another has its turn
CATCH_UP = 0.005  # seconds of sending that a late wake-up may make good: timers are not exact
IN_FLIGHT = (
    4096  # blocks on their way in one direction of one connection: 256 MiB, past any rate x latency here
)


@dataclass(slots=True)
class _Wire:
    """One direction: when the last reserved byte will have left."""

    rate: float  # bytes per second; infinite for none
    free_at: float = 0.0

    def reserve(self, count: int, now: float) -> float:
        """The time at which `count` bytes, sent now, have left."""
        self.free_at = max(self.free_at, now - CATCH_UP) + count / self.rate
        return self.free_at


async def _pump(source: trio.SocketStream, sink: trio.SocketStream, wire: _Wire, delay: float) -> None:
    """Relay until `source` ends, then end `sink`."""
    send, receive = trio.open_memory_channel[tuple[float, bytes]](IN_FLIGHT)

    async def read() -> None:
        async with send:
            while data := await source.receive_some(BLOCK):
                left = wire.reserve(len(data), trio.current_time())
                await trio.sleep_until(left)
                await send.send((left + delay, data))

    async def write() -> None:
        async for due, data in receive:
            await trio.sleep_until(due)
            await sink.send_all(data)
        await sink.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(write)


async def _serve(client: trio.SocketStream, *, port: int, down: _Wire, up: _Wire, delay: float) -> None:
    try:
        await trio.sleep(2 * delay)
        async with await trio.open_tcp_stream("127.0.0.1", port) as server, trio.open_nursery() as nursery:
            nursery.start_soon(_pump, client, server, up, delay)
            nursery.start_soon(_pump, server, client, down, delay)
    except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # either end went away: so does the connection


async def relay(target: int, *, rate: float, latency: float) -> None:
    """Relay loopback connections to port `target` for ever; prints the port it listens on."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    print(listener.socket.getsockname()[1], flush=True)  # noqa: T201  the protocol with the parent
    handler = partial(_serve, port=target, down=_Wire(rate), up=_Wire(float("inf")), delay=latency / 2)
    await trio.serve_listeners(handler, [listener])


class Link:
    """A relay process in front of a loopback port.

    Args:
        target: the port that it relays to.
        rate: bytes per second towards the clients, all connections together.
        latency: of a round trip, in seconds.
    """

    def __init__(self, target: int, *, rate: float = float("inf"), latency: float = 0.0) -> None:
        self._arguments = [str(target), "--rate", str(rate), "--latency", str(latency)]
        self._process: subprocess.Popen[str] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "weightfs.testing.link", *self._arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own module
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.strip().isdigit():
            self.stop()
            raise RuntimeError("the link did not start")
        self.port = int(line)
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
    """Run as `python -m weightfs.testing.link PORT`."""
    parser = argparse.ArgumentParser(description="Relay loopback connections to PORT over a slower link.")
    parser.add_argument("port", type=int)
    parser.add_argument(
        "--rate", type=float, default=float("inf"), help="bytes per second, all connections together"
    )
    parser.add_argument("--latency", type=float, default=0.0, help="round trip in seconds")
    arguments = parser.parse_args()
    try:
        trio.run(partial(relay, arguments.port, rate=arguments.rate, latency=arguments.latency))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
