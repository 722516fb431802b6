"""An HTTP origin that commits, on demand, every fault that an origin can commit. Real sockets on loopback.

Each request is answered by the next `Fault` scripted for its path, and honestly (ranges, a strong ETag, exact
lengths) where none is scripted. Nothing is parsed or framed by a library, so that the wire can be as wrong as it
has to be. Everything that a fault does not name is left honest: one fault at a time.

    async with open_origin({"/m.gguf": data}) as origin:
        origin.script("/m.gguf", Fault(FaultKind.SHORT_BODY, after=1000), Fault(FaultKind.STATUS, status=503))
        ... origin.url("/m.gguf") ... origin.seen

`origin_in_thread` is the same for code that is not async.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import trio

from weightfs.testing.answers import (
    HONEST,
    PAGE,
    PIECE,
    Fault,
    FaultKind,
    OriginFile,
    Plan,
    Seen,
    chunked,
    plan_answer,
)
from weightfs.testing.nginx import free_port
from weightfs.testing.tls import TlsFiles

__all__ = [
    "HONEST",
    "Fault",
    "FaultKind",
    "Origin",
    "OriginFile",
    "Seen",
    "open_origin",
    "origin_in_thread",
    "refused_url",
]

MAX_HEAD = 64 * 1024


@dataclass(slots=True)
class Origin:
    """A running origin. Change `files`, `script` and `always` at any time."""

    port: int
    files: dict[str, OriginFile]
    tls: TlsFiles | None = None
    seen: list[Seen] = field(default_factory=list)
    always: dict[str, Fault] = field(default_factory=dict)
    _scripts: dict[str, deque[Fault]] = field(default_factory=dict)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        """The URL of a path (and query)."""
        return f"{'http' if self.tls is None else 'https'}://{host}:{self.port}/{path.lstrip('/')}"

    def script(self, path: str, *faults: Fault) -> None:
        """Answer the next requests for `path` so, one fault each; then as `always` says, or honestly."""
        self._scripts.setdefault(path, deque()).extend(faults)

    def requests(self, path: str) -> list[Seen]:
        """The requests for a path so far."""
        return [seen for seen in self.seen if seen.path == path]

    def next_fault(self, path: str) -> Fault:
        """The fault for the request that has just come."""
        script = self._scripts.get(path)
        return script.popleft() if script else self.always.get(path, HONEST)


@asynccontextmanager
async def open_origin(
    files: Mapping[str, bytes | OriginFile], *, tls: TlsFiles | None = None
) -> AsyncIterator[Origin]:
    """Serve `files` (path → bytes) on a free loopback port until the context ends."""
    served = {path: f if isinstance(f, OriginFile) else OriginFile(f) for path, f in files.items()}
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    origin = Origin(listeners[0].socket.getsockname()[1], served, tls)
    context = tls.server_context() if tls is not None else None

    async def handle(stream: trio.SocketStream) -> None:
        carrier: trio.abc.Stream = stream
        if context is not None:
            carrier = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            await _Conversation(origin, carrier, stream).run()
        stream.socket.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, handle, listeners)
        yield origin
        nursery.cancel_scope.cancel()


@contextmanager
def origin_in_thread(
    files: Mapping[str, bytes | OriginFile], *, tls: TlsFiles | None = None
) -> Iterator[Origin]:
    """`open_origin` in a thread of its own, for scripts and for tests of whole processes."""
    started = threading.Event()
    box: list[Origin] = []
    stop: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def main() -> None:
        with trio.CancelScope() as scope:
            stop.append((trio.lowlevel.current_trio_token(), scope))
            async with open_origin(files, tls=tls) as origin:
                box.append(origin)
                started.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,), name="weightfs-test-origin")
    thread.start()
    try:
        if not started.wait(10):
            raise TimeoutError("the test origin did not start")
        yield box[0]
    finally:
        for token, scope in stop:
            token.run_sync_soon(scope.cancel)
        thread.join(10)


def refused_url(path: str = "/m.gguf") -> str:
    """A URL at which nobody listens."""
    return f"http://127.0.0.1:{free_port()}{path}"


class _EndedError(Exception):
    """The conversation is over."""


class _Conversation:
    """One connection: requests in turn, each with its fault."""

    def __init__(self, origin: Origin, stream: trio.abc.Stream, below: trio.SocketStream) -> None:
        self._origin = origin
        self._stream = stream
        self._below = below
        self._buffer = b""

    async def run(self) -> None:
        with contextlib.suppress(_EndedError):
            while True:
                await self._answer(await self._read())

    async def _read(self) -> Seen:
        while b"\r\n\r\n" not in self._buffer:
            data = await self._stream.receive_some(PIECE)
            if not data or len(self._buffer) > MAX_HEAD:
                raise _EndedError
            self._buffer += bytes(data)
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {n.strip().lower(): v.strip() for n, _, v in (line.partition(":") for line in lines)}
        seen = Seen(method, target, headers)
        self._origin.seen.append(seen)
        return seen

    async def _answer(self, seen: Seen) -> None:
        fault = self._origin.next_fault(seen.path)
        match fault.kind:
            case FaultKind.RESET_BEFORE_HEAD:
                self._reset()
            case FaultKind.CLOSE_BEFORE_HEAD:
                raise _EndedError
            case FaultKind.STALL_BEFORE_HEAD:
                await trio.sleep_forever()
            case FaultKind.GARBAGE:
                await self._stream.send_all(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
                raise _EndedError
            case FaultKind.HUGE_HEAD:
                await self._stream.send_all(b"HTTP/1.1 206 Partial Content\r\nX-Padding: " + b"x" * (1 << 20))
                raise _EndedError
            case FaultKind.REDIRECT:
                status = fault.status if 300 <= fault.status < 400 else 302
                await self._send_head(
                    status, [("Location", fault.location), ("Content-Length", "0"), *fault.headers]
                )
            case FaultKind.STATUS:
                page = b"<html>an error page</html>"
                length = ("Content-Length", str(len(page)))
                await self._send_head(fault.status, [length, ("Content-Type", "text/html"), *fault.headers])
                await self._stream.send_all(b"" if seen.method == "HEAD" else page)
            case FaultKind.HTML_200:
                length = ("Content-Length", str(len(PAGE)))
                await self._send_head(200, [length, ("Content-Type", "text/html; charset=utf-8")])
                await self._stream.send_all(b"" if seen.method == "HEAD" else PAGE)
            case _:
                await self._send_file(seen, fault)

    async def _send_file(self, seen: Seen, fault: Fault) -> None:
        file = self._origin.files.get(seen.path)
        if file is None:
            await self._send_head(404, [("Content-Length", "0")])
            return
        plan = plan_answer(seen, file, fault)
        if fault.kind is FaultKind.RESET_MID_HEAD:
            await self._stream.send_all(b"HTTP/1.1 206 Partial Content\r\nContent-Le")
            self._reset()
        await self._send_head(plan.status, plan.headers, drip=fault.kind is FaultKind.DRIP_HEAD)
        if seen.method != "HEAD":
            await self._send_body(plan, fault)

    async def _send_body(self, plan: Plan, fault: Fault) -> None:
        body = plan.body
        match fault.kind:
            case FaultKind.STALL_BEFORE_BODY:
                await trio.sleep_forever()
            case FaultKind.STALL_MID_BODY:
                await self._send(body[: fault.after])
                await trio.sleep_forever()
            case FaultKind.RESET_MID_BODY:
                await self._send(body[: fault.after])
                self._reset()
            case FaultKind.SHORT_BODY:
                await self._send(body[: fault.after])
                raise _EndedError
            case FaultKind.DRIP_BODY:
                for at in range(len(body)):
                    await self._stream.send_all(body[at : at + 1])
                    await trio.sleep(1)
            case FaultKind.CHUNKED | FaultKind.CHUNKED_SHORT | FaultKind.CHUNKED_LONG:
                await self._send(b"".join(chunked(body)))
            case _:
                await self._send(body)
        if plan.ends:
            raise _EndedError

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        for at in range(0, len(view), 16 * PIECE):
            await self._stream.send_all(view[at : at + 16 * PIECE])

    async def _send_head(self, status: int, headers: list[tuple[str, str]], *, drip: bool = False) -> None:
        lines = [f"HTTP/1.1 {status} Test", *(f"{name}: {value}" for name, value in headers), "", ""]
        head = "\r\n".join(lines).encode("latin-1")
        if not drip:
            await self._stream.send_all(head)
            return
        for at in range(len(head)):
            await self._stream.send_all(head[at : at + 1])
            await trio.sleep(1)

    def _reset(self) -> None:
        """End the connection with RST instead of FIN."""
        linger = struct.pack("ii", 1, 0)
        self._below.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise _EndedError
