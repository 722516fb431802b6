"""Where the files in a plain tar are, found by reading its headers alone. Pure and sans-IO.

`walk_tar(size, …)` is a generator: it yields the span that it wants to see next, is sent those bytes, and returns the
members. Rule: a member that leaves here is a regular file, whole inside the archive, at a path that `check_path` takes.
Links, folders, devices and sparse files are skipped; whatever is malformed ends the walk with an `IntegrityError`.

Formats: ustar and pax (POSIX.1-2017, "pax Interchange Format"), old GNU long names and sizes (GNU tar manual, "Basic
Tar Format").
"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from weightfs.core.geometry import KIB, ByteSpan
from weightfs.core.manifest import check_path
from weightfs.errors import IntegrityError

BLOCK: Final = 512
# What is asked for at once: the headers of small files that follow one another come together.
WINDOW_BYTES: Final = 16 * KIB
MAX_WINDOWS: Final = 4_096  # 64 MiB of headers, and a bounded wait
MAX_MEMBERS: Final = 32_768  # as many as an artifact may have layers
MAX_EXTENSION_BYTES: Final = 64 * KIB  # pax records, long names: a path has 1,024 bytes at most

_REGULAR = b"0\x007"  # "7" is a contiguous file: the same for all systems that know none
_BODILESS = b"123456"  # links, devices, folders, pipes: no data follows, whatever the size says
_NUMBER = re.compile(rb"[ \x00]*([0-7]{0,12})[ \x00]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,6}) ")
_PAX_SIZE = re.compile(rb"[0-9]{1,19}")

Walk = Generator[ByteSpan, bytes, "TarFiles"]


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file: its path, and its bytes in the archive."""

    path: str
    span: ByteSpan


@dataclass(frozen=True, slots=True)
class TarFiles:
    """The members in their order, and how many links and sparse files were skipped."""

    members: tuple[TarMember, ...]
    skipped: int


@dataclass(frozen=True, slots=True)
class _Header:
    kind: bytes
    name: bytes
    size: int
    block: bytes


def walk_tar(size: int, what: str) -> Walk:
    """Find the files of an archive of `size` bytes. IntegrityError, which begins with `what`."""
    return _Walker(size, what).walk()


class _Walker:
    def __init__(self, size: int, what: str) -> None:
        self._size = size
        self._what = what
        self._window = b""
        self._start = 0
        self._asked = 0

    def walk(self) -> Walk:
        at, skipped = 0, 0
        members: list[TarMember] = []
        extensions: dict[bytes, bytes] = {}
        while at < self._size:
            header = _read_header((yield from self._bytes(at, BLOCK)), self._what)
            if header is None:
                break
            start = at + BLOCK
            length = header.size
            if header.kind in (b"x", b"L"):
                extensions.update((yield from self._extension(header, start)))
            elif header.kind not in (b"g", b"K"):
                length = 0 if header.kind in _BODILESS else self._size_of(header, extensions)
                sparse = any(key.startswith(b"GNU.sparse") for key in extensions)
                if header.kind == b"S":
                    start = yield from self._past_sparse_map(header, start)
                if header.kind in _REGULAR and not sparse:
                    members.append(self._member(header, extensions, ByteSpan(start, start + length)))
                elif header.kind in b"12S" or sparse:
                    skipped += 1
                extensions = {}
            if start + length > self._size:
                raise self._bad("ends amid a member")
            if len(members) > MAX_MEMBERS:
                raise self._bad(f"has over {MAX_MEMBERS} files")
            at = start + -(-length // BLOCK) * BLOCK
        return TarFiles(tuple(members), skipped)

    def _bytes(self, at: int, length: int) -> Generator[ByteSpan, bytes, bytes]:
        """Bytes of the archive, out of the window if it has them."""
        if at + length > self._size:
            raise self._bad("ends amid a header")
        if not self._start <= at or at + length > self._start + len(self._window):
            self._asked += 1
            if self._asked > MAX_WINDOWS:
                raise self._bad(f"has its headers in over {MAX_WINDOWS} places")
            self._start = at
            self._window = yield ByteSpan(at, min(at + max(length, WINDOW_BYTES), self._size))
        return self._window[at - self._start : at - self._start + length]

    def _extension(self, header: _Header, start: int) -> Generator[ByteSpan, bytes, dict[bytes, bytes]]:
        """What a pax header or a GNU long name says of the member that follows."""
        if header.size > MAX_EXTENSION_BYTES:
            raise self._bad(f"has an extended header of {header.size} bytes")
        data = yield from self._bytes(start, header.size)
        return {b"path": data.rstrip(b"\x00")} if header.kind == b"L" else self._records(data)

    def _records(self, data: bytes) -> dict[bytes, bytes]:
        """Records of the form `LENGTH KEY=VALUE`, each with a newline; LENGTH counts all of it."""
        records: dict[bytes, bytes] = {}
        at = 0
        while at < len(data):
            found = _RECORD.match(data, at)
            stop = at + int(found[1]) if found else 0
            if found is None or not found.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
                raise self._bad("has a malformed extended header")
            key, _, value = data[found.end() : stop - 1].partition(b"=")
            records[key] = value
            at = stop
        return records

    def _past_sparse_map(self, header: _Header, start: int) -> Generator[ByteSpan, bytes, int]:
        """Where the data of an old GNU sparse file begins: more of its map may follow the header."""
        more = header.block[482]
        while more:
            more = (yield from self._bytes(start, BLOCK))[504]
            start += BLOCK
        return start

    def _size_of(self, header: _Header, extensions: dict[bytes, bytes]) -> int:
        text = extensions.get(b"size")
        if text is None:
            return header.size
        if not _PAX_SIZE.fullmatch(text):
            raise self._bad("has a malformed size")
        return int(text)

    def _member(self, header: _Header, extensions: dict[bytes, bytes], span: ByteSpan) -> TarMember:
        raw = extensions.get(b"path", header.name)
        try:
            path = re.sub(r"^(?:\./)+", "", raw.decode())
            return TarMember(check_path(path), span)
        except UnicodeDecodeError:
            raise self._bad("has a file whose name is not UTF-8") from None
        except ValueError as error:
            shown = ascii(raw[:100].decode(errors="replace"))
            raise self._bad(f"names a file {shown}, which is refused: {error}") from None

    def _bad(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self._what} is a tar that {what}.")


def _read_header(block: bytes, what: str) -> _Header | None:
    """One header block; None for a block of zeros, which ends an archive."""
    if not any(block):
        return None
    total = sum(block) - sum(block[148:156]) + 8 * 32  # the checksum counts as eight blanks
    if _number(block[148:156]) != total:
        raise IntegrityError(f"{what} is no tar, or a damaged one: a header has a wrong checksum.")
    size = _number(block[124:136])
    if size is None:
        raise IntegrityError(f"{what} is a tar that has a malformed size.")
    name = block[:100].partition(b"\x00")[0]
    prefix = block[345:500].partition(b"\x00")[0]
    # Old GNU headers have times where POSIX has the prefix.
    if prefix and block[257:263] == b"ustar\x00":
        name = prefix + b"/" + name
    return _Header(block[156:157], name, size, block)


def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's base 256 for what they cannot hold; None if it is neither."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    found = _NUMBER.fullmatch(field)
    return None if found is None else int(found[1] or b"0", 8)
