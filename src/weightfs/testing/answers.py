"""What an origin answers, and in how many ways that can be wrong: the bytes of one response, before any is sent.

Rule: pure, and one fault at a time. What a fault does not name is as RFC 9110 has it.
"""

from __future__ import annotations

import enum
import gzip
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

PIECE = 64 * 1024  # of a chunked body, and of what is sent at once
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")
_EXCESS = b"more than was asked for"
PAGE = b"<!DOCTYPE html><html><title>Log in</title><body>Please log in.</body></html>"


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
            body = PAGE
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


def chunked(body: bytes) -> Iterator[bytes]:
    """The body in chunked coding (RFC 9112, 7.1)."""
    for at in range(0, len(body), PIECE):
        piece = body[at : at + PIECE]
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"
