"""A place with tags in memory, for tests of what follows them: `push` is what it says of a ref from then on.

Blobs are at `memory://<digest of the bytes>`; where `contents` is changed, one is other bytes than were promised.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field

import trio

from weightfs.core.geometry import BlobShape, ByteSpan
from weightfs.core.hubtree import git_oid
from weightfs.core.manifest import Blob, BlobId, Entry, Manifest, Mirror
from weightfs.core.ref import Ref
from weightfs.errors import FailureKind, SourceError


def git_sha1(data: bytes) -> bytes:
    """What git calls a file with these bytes: 20 bytes."""
    return bytes.fromhex(git_oid(data))


def make_blob(data: bytes, url: str, *, digest: str = "git-sha1", chunk_length: int = 0) -> Blob:
    """A blob of which `digest` is known: `git-sha1`, `sha256`, or nothing if empty."""
    shape = BlobShape(len(data), chunk_length) if chunk_length else BlobShape.of(len(data))
    mirrors = (Mirror(url, 1),)
    sha256 = hashlib.sha256(data).digest()
    match digest:
        case "git-sha1":
            sha1 = git_sha1(data)
            return Blob(BlobId.of_git(sha1, len(data)), shape, None, mirrors, git_sha1=sha1)
        case "sha256":
            return Blob(BlobId.of_digest(sha256), shape, sha256, mirrors)
        case _:
            return Blob(BlobId.of_version(url, len(data), sha256.hex()), shape, None, mirrors)


@dataclass
class MemoryRepository:
    """A source, for any scheme. `asked` are the refs that were resolved, `most_open` the most streams at one time."""

    contents: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    most_open: int = 0
    gate: trio.Event | None = None  # no byte is given before it is set
    piece: int = 0  # bytes that come at once; 0: all that were asked for
    _said: dict[str, Manifest] = field(default_factory=dict)
    _open_now: int = 0

    def push(
        self,
        ref: Ref,
        files: Mapping[str, bytes],
        *,
        digest: str = "git-sha1",
        chunk_length: int = 0,
        raw: bytes = b"",
    ) -> Manifest:
        """What `ref` is from now on. The revision follows from the files."""
        entries = []
        summary = hashlib.sha256()
        for path, data in files.items():
            name = hashlib.sha256(data).hexdigest()
            url = f"memory://{name}"
            self.contents[url] = data
            summary.update(f"{path} {name}\n".encode())
            entries.append(Entry(path, make_blob(data, url, digest=digest, chunk_length=chunk_length)))
        tree = ref.text.replace("://", "/").replace(":", "/")
        manifest = Manifest(ref.text, f"sha256:{summary.hexdigest()}", tree, tuple(entries), raw)
        self._said[ref.text] = manifest
        return manifest

    def forget(self, ref: Ref) -> None:
        """It is not there any more."""
        del self._said[ref.text]

    def open_source(self, _scheme: str, _settings: object) -> MemoryRepository:
        """In the place of `weightfs.sources.open_source`."""
        return self

    async def resolve(self, ref: Ref) -> Manifest:
        """What was pushed last."""
        self.asked.append(ref.text)
        await trio.lowlevel.checkpoint()
        if ref.text not in self._said:
            raise SourceError(f"{ref} is not there.", kind=FailureKind.NOT_FOUND, mirror=ref.url)
        return self._said[ref.text]

    @asynccontextmanager
    async def _open(self, mirror: Mirror, span: ByteSpan) -> AsyncIterator[AsyncIterator[bytes]]:
        self._open_now += 1
        self.most_open = max(self.most_open, self._open_now)
        try:
            async with aclosing(self._pieces(mirror, span)) as pieces:
                yield pieces
        finally:
            self._open_now -= 1

    async def _pieces(self, mirror: Mirror, span: ByteSpan) -> AsyncGenerator[bytes, None]:
        if self.gate is not None:
            await self.gate.wait()
        data = self.contents[mirror.url][span.start : span.stop]
        for at in range(0, len(data), self.piece or len(data)):
            await trio.lowlevel.checkpoint()
            yield data[at : at + (self.piece or len(data))]

    def open_range(
        self,
        mirror: Mirror,
        shape: BlobShape,  # noqa: ARG002  the bytes are what they are
        span: ByteSpan,
        *,
        whole: bool = False,  # noqa: ARG002  memory has ranges
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """See `sources.base.Source.open_range`."""
        return self._open(mirror, span)

    async def aclose(self) -> None:
        """Nothing is open."""
        await trio.lowlevel.checkpoint()
