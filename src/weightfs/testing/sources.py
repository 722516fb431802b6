"""Sources for tests of what is built on sources, and the conformance class that every source must pass.

Subclass `SourceTests` in a test module and give it a `serving` fixture-like method; pytest collects the rest::

    class TestMySource(SourceTests):
        @asynccontextmanager
        async def serving(self, data, tmp_path):
            ... make `data` available, yield (source, ref) ...
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trio

from weightfs.core.geometry import MIB, BlobShape, ByteSpan
from weightfs.core.manifest import Blob, BlobId, ChunkList, Entry, Manifest, Mirror
from weightfs.core.ref import Ref
from weightfs.errors import FailureKind, SourceError
from weightfs.sources._client import HttpClient
from weightfs.sources._stream import Address, BulkBackend, Resolver
from weightfs.sources.base import FetchSettings, Source

S = TypeVar("S")


@asynccontextmanager
async def opened(
    kind: Callable[[HttpClient], AbstractAsyncContextManager[S]], **settings: Any
) -> AsyncIterator[S]:
    """A source of that kind, with these settings, that tries nothing twice unless they say so."""
    async with kind(HttpClient(FetchSettings(**{"retry": 0, **settings}))) as source:
        yield source


@dataclass
class MemorySource:
    """Serves bytes from memory, as if they came from `memory://<name>`; `opened` records (mirror url, span)."""

    files: dict[str, bytes]
    attested: bool = True
    piece_bytes: int = 64 * 1024
    opened: list[tuple[str, ByteSpan]] = field(default_factory=list)
    closed: bool = False

    def blob(self, name: str) -> Blob:
        """The blob of a file, with a trusted chunk list if `attested`."""
        data = self.files[name]
        shape = BlobShape.of(len(data))
        spans = [shape.span_of(chunk) for chunk in shape.chunks]
        digests = b"".join(hashlib.sha256(data[span.start : span.stop]).digest() for span in spans)
        chunk_list = (
            ChunkList(shape.chunk_length, digests, trusted=True) if self.attested and digests else None
        )
        sha256 = hashlib.sha256(data).digest()
        return Blob(BlobId.of_digest(sha256), shape, sha256, (Mirror(f"memory://{name}", 1),), chunk_list)

    async def resolve(self, ref: Ref) -> Manifest:
        """The manifest of one file; `ref.url` is `memory://<name>`."""
        await trio.lowlevel.checkpoint()
        name = ref.url.removeprefix("memory://")
        if name not in self.files:
            raise SourceError(f"{ref.url} is not there.", kind=FailureKind.NOT_FOUND, mirror=ref.url)
        blob = self.blob(name)
        return Manifest(ref.text, f"sha256:{(blob.sha256 or b'').hex()}", "memory", (Entry(name, blob),))

    @asynccontextmanager
    async def _open(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        self.opened.append((mirror.url, span))
        data = self.files[mirror.url.removeprefix("memory://")]
        if len(data) != shape.size:
            raise SourceError(f"{mirror.url} changed.", kind=FailureKind.CHANGED, mirror=mirror.url)
        await trio.lowlevel.checkpoint()
        yield _Pieces(data[span.start : span.stop], self.piece_bytes)

    def open_range(
        self,
        mirror: Mirror,
        shape: BlobShape,
        span: ByteSpan,
        *,
        whole: bool = False,  # noqa: ARG002  memory has ranges
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See `Source.open_range`."""
        return self._open(mirror, shape, span)

    async def aclose(self) -> None:
        """Nothing is open."""
        self.closed = True
        await trio.lowlevel.checkpoint()


@dataclass(frozen=True, slots=True)
class Failing:
    """What goes wrong with one opening: `after` so many bytes, `kind` is raised (None: the bytes are flipped)."""

    kind: FailureKind | None
    after: int = 0
    retry_after: float | None = None


@dataclass
class FlakySource:
    """Another source with faults: `plan` is asked at each opening, with its number from 0; None is no fault."""

    inner: Source
    plan: Callable[[int, Mirror, ByteSpan], Failing | None]
    openings: int = 0

    async def resolve(self, ref: Ref) -> Manifest:
        """As the inner source."""
        return await self.inner.resolve(ref)

    @asynccontextmanager
    async def _open(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan, *, whole: bool
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        number, self.openings = self.openings, self.openings + 1
        failing = self.plan(number, mirror, span)
        if failing is not None and failing.kind is not None and not failing.after:
            raise _error(mirror, failing)
        async with self.inner.open_range(mirror, shape, span, whole=whole) as body:
            yield body if failing is None else _Flaky(body, mirror, failing)

    def open_range(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan, *, whole: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See `Source.open_range`."""
        return self._open(mirror, shape, span, whole=whole)

    async def aclose(self) -> None:
        """Close the inner source."""
        await self.inner.aclose()


class _Pieces:
    def __init__(self, data: bytes, length: int) -> None:
        self._data = data
        self._at = 0
        self._length = length

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._at >= len(self._data):
            raise StopAsyncIteration
        piece = self._data[self._at : self._at + self._length]
        self._at += len(piece)
        return piece


class _Flaky:
    def __init__(self, body: AsyncIterator[bytes], mirror: Mirror, failing: Failing) -> None:
        self._body = body
        self._mirror = mirror
        self._failing = failing
        self._left = failing.after

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = await anext(self._body)
        if len(piece) <= self._left:
            self._left -= len(piece)
            return piece
        if self._failing.kind is not None:
            if self._left:
                piece, self._left = piece[: self._left], 0
                return piece
            raise _error(self._mirror, self._failing)
        at, self._left = self._left, 1 << 62
        return piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]


def _error(mirror: Mirror, failing: Failing) -> SourceError:
    assert failing.kind is not None
    return SourceError(
        f"{mirror.url} failed on purpose ({failing.kind}).",
        kind=failing.kind,
        mirror=mirror.url,
        retry_after=failing.retry_after,
    )


class PublicResolver(Resolver):
    """Says that every name has the same public address."""

    async def look_up(self, host: str) -> tuple[Address, ...]:  # noqa: ARG002  the same for all
        """Example.com's address of old."""
        return (ipaddress.ip_address("93.184.215.14"),)


class Elsewhere(BulkBackend):
    """Every connection is to this machine, whatever the name: for what is not trusted on loopback alone.

    Without a `resolver` every name is public.
    """

    def __init__(self, resolver: Resolver | None = None) -> None:
        super().__init__(resolver or PublicResolver())

    async def connect_address(self, address: Address, port: int) -> socket.socket:  # noqa: ARG002  never there
        """To 127.0.0.1, whatever the address."""
        return await super().connect_address(ipaddress.ip_address("127.0.0.1"), port)


class SourceTests:
    """What holds for every source. Needs pytest-trio's `trio_mode`."""

    def serving(self, data: bytes, tmp_path: Path) -> AbstractAsyncContextManager[tuple[Source, Ref]]:
        """Make `data` available from a source, and yield that source with a ref to it."""
        raise NotImplementedError("a subclass of SourceTests defines serving()")

    async def test_manifest_is_sound(self, tmp_path: Path) -> None:
        """One entry, of the right size, at a path below a tree, from at least one mirror; and the same again."""
        data = _sample(3 * MIB + 5)
        async with self.serving(data, tmp_path) as (source, ref):
            manifest = await source.resolve(ref)
            assert len(manifest.entries) == 1
            blob = manifest.entries[0].blob
            assert blob.size == len(data)
            assert blob.mirrors
            assert manifest.ref == ref.text
            assert manifest.tree
            assert not manifest.tree.startswith("/")
            assert blob.sha256 in (None, hashlib.sha256(data).digest())
            assert await source.resolve(ref) == manifest

    async def test_every_kind_of_span(self, tmp_path: Path) -> None:
        """First byte, last byte, everything, across chunk borders, and nothing."""
        data = _sample(3 * MIB + 5)
        end = len(data)
        spans = [(0, 1), (end - 1, end), (0, end), (MIB - 1, MIB + 1), (MIB, 2 * MIB), (7, 7), (end, end)]
        async with self.serving(data, tmp_path) as (source, ref):
            blob = (await source.resolve(ref)).entries[0].blob
            for span in (ByteSpan(*pair) for pair in spans):
                assert await _read(source, blob, span) == data[span.start : span.stop]

    async def test_empty_blob(self, tmp_path: Path) -> None:
        """A blob of no bytes resolves, and reads as none."""
        async with self.serving(b"", tmp_path) as (source, ref):
            blob = (await source.resolve(ref)).entries[0].blob
            assert blob.size == 0
            assert await _read(source, blob, ByteSpan(0, 0)) == b""

    async def test_parallel_spans(self, tmp_path: Path) -> None:
        """Many spans at once do not mix."""
        data = _sample(4 * MIB)
        async with self.serving(data, tmp_path) as (source, ref):
            blob = (await source.resolve(ref)).entries[0].blob
            spans = [ByteSpan(at, at + 100_000) for at in range(0, 4_000_000, 100_000)]

            async def check(span: ByteSpan) -> None:
                assert await _read(source, blob, span) == data[span.start : span.stop]

            async with trio.open_nursery() as nursery:
                for span in spans:
                    nursery.start_soon(check, span)

    async def test_leaving_early_and_cancelling_harm_nothing(self, tmp_path: Path) -> None:
        """A reader may go at any time; the next one is served."""
        data = _sample(3 * MIB)
        async with self.serving(data, tmp_path) as (source, ref):
            blob = (await source.resolve(ref)).entries[0].blob
            whole = ByteSpan(0, len(data))
            async with source.open_range(blob.mirrors[0], blob.shape, whole) as body:
                assert data.startswith(await anext(body))
            with trio.CancelScope() as scope:
                async with source.open_range(blob.mirrors[0], blob.shape, whole) as body:
                    await anext(body)
                    scope.cancel()
                    await trio.lowlevel.checkpoint()
            assert scope.cancelled_caught
            assert await _read(source, blob, whole) == data


async def _read(source: Source, blob: Blob, span: ByteSpan) -> bytes:
    pieces: Sequence[bytes]
    async with source.open_range(blob.mirrors[0], blob.shape, span) as body:
        pieces = [piece async for piece in body]
    assert all(pieces), "an empty piece"
    return b"".join(pieces)


def _sample(length: int) -> bytes:
    """Bytes that differ everywhere, the same each time."""
    return hashlib.shake_128(b"weightfs").digest(length)


async def read_entry(source: Source, entry: Entry, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes `[start, stop)` of a file, from its first mirror; to its end unless told."""
    place = ByteSpan(0, entry.blob.size) if entry.span is None else entry.span
    wanted = ByteSpan(place.start + start, place.stop if stop is None else place.start + stop)
    return await _read(source, entry.blob, wanted)
