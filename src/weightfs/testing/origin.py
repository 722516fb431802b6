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
import enum
import gzip
import hashlib
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import trio

from weightfs.testing.nginx import free_port
from weightfs.testing.tls import TlsFiles

MAX_HEAD = 64 * 1024
PIECE = 64 * 1024
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_EXCESS = b"more than was asked for"
_PAGE = b"<!DOCTYPE html><html><title>Log in</title><body>Please log in.</body></html>"


class FaultKind(enum.StrEnum):
    """What goes wrong; `Fault.after` says after how many body bytes, where that matters."""

    HONEST = "honest"
    RESET_BEFORE_HEAD = "reset before the head"
    RESET_MID_HEAD = "reset amid the head"
    RESET_MID_BODY = "reset amid the body"
    CLOSE_BEFORE_HEAD = "end before the head"
    GARBAGE = "not HTTP"
    HUGE_HEAD = "a head of a MiB"
    STALL_BEFORE_HEAD = "stall before the head"
    STALL_BEFORE_BODY = "stall before the body"
    STALL_MID_BODY = "stall amid the body"
    DRIP_HEAD = "the head byte by byte, slowly"
    DRIP_BODY = "the body byte by byte, slowly"
    SHORT_BODY = "short body"
    LONG_BODY = "over-long body"
    CHUNKED = "chunked coding, honest"
    CHUNKED_SHORT = "chunked coding, complete but short"
    CHUNKED_LONG = "chunked coding, over-long"
    NO_RANGES = "200 with the whole file"
    WRONG_START = "Content-Range with another start"
    WRONG_END = "Content-Range with another end"
    WRONG_TOTAL = "Content-Range with another total"
    BAD_RANGE_SYNTAX = "Content-Range that is none"
    NO_CONTENT_RANGE = "206 without Content-Range"
    NO_LENGTH = "no Content-Length; the end of the connection ends the body"
    WRONG_LENGTH = "Content-Length one too many"
    TWO_LENGTHS = "two different Content-Lengths"
    MULTIPART = "multipart/byteranges"
    GZIP = "gzip though identity was asked"
    HTML_206 = "206 with a page instead of the bytes"
    HTML_200 = "200 with a log-in page"
    REDIRECT = "redirect"
    STATUS = "an error status"
    NOT_SATISFIABLE = "416"
    BIT_FLIP = "one flipped bit"
    SWAPPED = "two swapped halves"
    OTHER_FILE = "bytes of another file"
    ZEROS = "all zeros"
    NEW_ETAG = "another strong ETag"
    WEAK_ETAG = "a weak ETag"
    NEW_SIZE = "the file has another size now"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `after`: body bytes before it; `status`, `location` and `headers` for STATUS and REDIRECT."""

    kind: FaultKind = FaultKind.HONEST
    after: int = 0
    status: int = 503
    location: str = ""
    headers: tuple[tuple[str, str], ...] = ()


HONEST = Fault()


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as it came. Header names are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]


@dataclass(frozen=True, slots=True)
class OriginFile:
    """A file to serve; `etag` defaults to a strong one made of its bytes."""

    data: bytes
    etag: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/octet-stream"

    @property
    def tag(self) -> str:
        """The ETag."""
        return self.etag or f'"{hashlib.sha256(self.data).hexdigest()[:16]}"'


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
                length = ("Content-Length", str(len(_PAGE)))
                await self._send_head(200, [length, ("Content-Type", "text/html; charset=utf-8")])
                await self._stream.send_all(b"" if seen.method == "HEAD" else _PAGE)
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
                await self._send(b"".join(_chunked(body)))
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


@dataclass(slots=True)
class Plan:
    """A response before it is sent; `ends`: the connection ends with it."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    ends: bool = False


def plan_answer(seen: Seen, file: OriginFile, fault: Fault = HONEST) -> Plan:
    """The answer to a GET or HEAD: ranges, If-Range, ETag, lengths; wrong where `fault` says so."""
    kind = fault.kind
    data = file.data + b"grown" if kind is FaultKind.NEW_SIZE else file.data
    etag = _etag(file, kind)
    asked = _RANGE.fullmatch(seen.headers.get("range", ""))
    if seen.headers.get("if-range", etag) != etag or kind is FaultKind.NO_RANGES or seen.method == "HEAD":
        asked = None
    headers = [("Content-Type", file.content_type), *file.headers, *fault.headers]
    if etag:
        headers.append(("ETag", etag))
    if asked is None:
        start, stop, status = 0, len(data), 200
    else:
        start, stop, status = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data)), 206
        if start >= len(data) or kind is FaultKind.NOT_SATISFIABLE:
            return Plan(416, [("Content-Range", f"bytes */{len(data)}"), ("Content-Length", "0")], b"")
        headers += _content_range(kind, start, stop, len(data))
    plan = Plan(status, headers, _damaged(data[start:stop], kind))
    _frame(plan, kind)
    return plan


def _etag(file: OriginFile, kind: FaultKind) -> str:
    match kind:
        case FaultKind.NEW_ETAG:
            return '"another-version"'
        case FaultKind.WEAK_ETAG:
            return f"W/{file.tag}"
        case _:
            return "" if file.etag == "none" else file.tag


def _content_range(kind: FaultKind, start: int, stop: int, total: int) -> list[tuple[str, str]]:
    match kind:
        case FaultKind.NO_CONTENT_RANGE | FaultKind.MULTIPART:
            return []
        case FaultKind.BAD_RANGE_SYNTAX:
            return [("Content-Range", f"bytes={start}-{stop - 1}/{total}")]
        case FaultKind.WRONG_START:
            start += 1
        case FaultKind.WRONG_END:
            stop += 1
        case FaultKind.WRONG_TOTAL:
            total += 1
    return [("Content-Range", f"bytes {start}-{stop - 1}/{total}")]


def _damaged(body: bytes, kind: FaultKind) -> bytes:
    half = len(body) // 2
    match kind:
        case FaultKind.BIT_FLIP:
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        case FaultKind.SWAPPED:
            body = body[half:] + body[:half]
        case FaultKind.OTHER_FILE:
            body = body.translate(bytes(byte ^ 0x55 for byte in range(256)))
        case FaultKind.ZEROS:
            body = bytes(len(body))
        case FaultKind.HTML_206:
            body = _PAGE
        case FaultKind.LONG_BODY | FaultKind.CHUNKED_LONG:
            body += _EXCESS
        case FaultKind.CHUNKED_SHORT:
            body = body[:half]
    return body


def _frame(plan: Plan, kind: FaultKind) -> None:
    """Add the headers that frame the body, and wrap it where the fault says so."""
    match kind:
        case FaultKind.GZIP:
            plan.body = gzip.compress(plan.body)
            plan.headers.append(("Content-Encoding", "gzip"))
        case FaultKind.MULTIPART:
            plan.headers = [h for h in plan.headers if h[0] != "Content-Type"]
            plan.headers.append(("Content-Type", "multipart/byteranges; boundary=X"))
            part = b"--X\r\nContent-Range: bytes 0-1/2\r\n\r\n"
            plan.body = part + plan.body + b"\r\n--X--\r\n"
        case FaultKind.CHUNKED | FaultKind.CHUNKED_SHORT | FaultKind.CHUNKED_LONG:
            plan.headers.append(("Transfer-Encoding", "chunked"))
            return
        case FaultKind.NO_LENGTH:
            plan.headers.append(("Connection", "close"))
            plan.ends = True
            return
    length = len(plan.body)
    match kind:
        case FaultKind.WRONG_LENGTH:
            length += 1
            plan.ends = True
        case FaultKind.LONG_BODY:
            length -= len(_EXCESS)
            plan.ends = True
        case FaultKind.TWO_LENGTHS:
            plan.headers.append(("Content-Length", str(length + 1)))
    plan.headers.append(("Content-Length", str(length)))


def _chunked(body: bytes) -> Iterator[bytes]:
    for at in range(0, len(body), PIECE):
        piece = body[at : at + PIECE]
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"
