"""Local files and directories as origin: `file:///dir/m.gguf`, `file:///dir`, an NFS path, a USB disk.

As strict as an HTTP origin: a file is pinned by its inode, size and times; a span of another version is
CHANGED, a short read SHORT, never zeros. Every system call runs in a thread and a stuck disk (NFS) is
bounded by `stall_timeout`.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Self, TypeVar, TypeVarTuple
from urllib.parse import quote, unquote, urlsplit

import trio

from weightfs.core.geometry import MIB, BlobShape, ByteSpan
from weightfs.core.manifest import Blob, Entry, Manifest, Mirror, check_path
from weightfs.core.ref import Ref, tree_of
from weightfs.errors import FailureKind, SourceError
from weightfs.sources import _published
from weightfs.sources.base import FetchSettings, Source
from weightfs.sources.https import SUFFIX, read_document
from weightfs.sources.https import open_source as open_https

SCHEMES = ("file",)
MAX_FILES = 10_000  # below one directory ref
PIECE_BYTES = MIB

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def open_source(settings: FetchSettings) -> Source:
    """The source for file refs."""
    return FileSource(settings)


class FileSource:
    """Resolves file refs. Also reads http(s) mirrors, because a `.meta4` beside a file may name some."""

    def __init__(self, settings: FetchSettings) -> None:
        self._settings = settings
        self._bound = settings.stall_timeout
        self._https: Source | None = None

    async def resolve(self, ref: Ref) -> Manifest:
        """What is at a path now: one file, or every regular file below a directory."""
        path = _path_of(ref.url)
        tree, name = tree_of(ref)
        status = await _bounded(self._bound, os.stat, path, about=path)
        if stat.S_ISREG(status.st_mode):
            blob = await self._blob(ref, path, status)
            return Manifest(str(ref), _published.revision_of(blob), tree, (Entry(name, blob),))
        if not stat.S_ISDIR(status.st_mode):
            raise _failure(FailureKind.PROTOCOL, path, "is neither a regular file nor a directory")
        found = await _bounded(self._bound, _walk, path, about=path)
        entries = []
        for relative, status in found:
            file = path / relative
            url = "file://" + quote(str(file))
            blob = await self._blob(Ref("file", url, url), file, status)
            entries.append(Entry(check_path(f"{name}/{relative}"), blob))
        newest = max((status.st_mtime_ns for _, status in found), default=0)
        return Manifest(str(ref), f"directory:{len(found)}:{newest:x}", tree, tuple(entries))

    @asynccontextmanager
    async def _open_file(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        if span.stop > shape.size:
            raise ValueError(f"{span} is not within {shape.size} bytes")
        path = _path_of(mirror.url)
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # non-blocking: it may be a FIFO by now
        fd = await _bounded(self._bound, os.open, path, flags, about=path)
        try:
            body = _FileBody(fd, path, shape.size, span, mirror.validator, self._bound)
            await body.check()
            yield body
        finally:
            os.close(fd)

    def open_range(
        self, mirror: Mirror, shape: BlobShape, span: ByteSpan, *, whole: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Stream `span` from `mirror`: see `Source.open_range`."""
        if mirror.url.startswith("file:"):
            return self._open_file(mirror, shape, span)
        if self._https is None:
            self._https = open_https(self._settings)
        return self._https.open_range(mirror, shape, span, whole=whole)

    async def aclose(self) -> None:
        """Close the connections to mirrors."""
        if self._https is not None:
            await self._https.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def _blob(self, ref: Ref, path: Path, status: os.stat_result) -> Blob:
        chunks = self._settings.chunks
        if chunks is None:
            document = await read_document(path.with_name(path.name + SUFFIX), explicit=False)
        else:
            document = await read_document(Path(chunks.removeprefix("file://")), explicit=True)
        published = None if document is None else _published.judge(document, self._settings)
        return _published.make_blob(
            ref,
            Mirror(ref.url, validator=_validator(status)),
            status.st_size,
            published=published,
            origin_digest=None,
            settings=self._settings,
        )


class _FileBody:
    """Exactly the bytes of a span, checked at both ends against the version that was resolved."""

    def __init__(self, fd: int, path: Path, size: int, span: ByteSpan, validator: str, bound: float) -> None:
        self._fd = fd
        self._path = path
        self._size = size
        self._at = span.start
        self._stop = span.stop
        self._validator = validator
        self._bound = bound

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._at >= self._stop:
            raise StopAsyncIteration
        wanted = min(PIECE_BYTES, self._stop - self._at)
        piece = await _bounded(self._bound, os.pread, self._fd, wanted, self._at, about=self._path)
        if not piece:
            raise _failure(FailureKind.SHORT, self._path, f"ended at byte {self._at} of {self._size}")
        self._at += len(piece)
        if self._at == self._stop:
            await self.check()
        return piece

    async def check(self) -> None:
        """SourceError (CHANGED) if the open file is not the one that was resolved."""
        status = await _bounded(self._bound, os.fstat, self._fd, about=self._path)
        if not stat.S_ISREG(status.st_mode):
            raise _failure(FailureKind.CHANGED, self._path, "is no regular file any more")
        if status.st_size != self._size or self._validator not in ("", _validator(status)):
            raise _failure(FailureKind.CHANGED, self._path, "is not the version that was resolved")


async def _bounded(bound: float, call: Callable[[*Ts], T], *args: *Ts, about: Path) -> T:
    """A system call in a thread, bounded; a thread that is stuck in the kernel is left behind."""
    try:
        with trio.fail_after(bound):
            return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True)
    except trio.TooSlowError as error:
        raise _failure(FailureKind.STALL, about, "did not answer in time") from error
    except OSError as error:
        raise _failure(_kind_of(error), about, f"cannot be read: {error.strerror}") from error


def _path_of(url: str) -> Path:
    return Path(unquote(urlsplit(url).path))


def _validator(status: os.stat_result) -> str:
    return f'"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"'


def _walk(root: Path) -> list[tuple[str, os.stat_result]]:
    """Regular files below `root`, sorted; symbolic links only if they stay below it."""
    inside = root.resolve()
    found: list[tuple[str, os.stat_result]] = []
    for directory, folders, names in os.walk(root, followlinks=False, onerror=_raise):
        folders.sort()
        for file in _files(Path(directory), names, inside):
            found.append((str(file[0].relative_to(root)), file[1]))
            if len(found) > MAX_FILES:
                raise _failure(
                    FailureKind.PROTOCOL,
                    root,
                    f"holds more than {MAX_FILES} files, the most that one ref may have: name directories below it",
                )
    return sorted(found, key=lambda item: item[0])


def _files(directory: Path, names: list[str], inside: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for name in names:
        file = directory / name
        if file.is_symlink() and not file.resolve().is_relative_to(inside):
            continue
        try:
            status = file.stat()
        except FileNotFoundError:  # a dangling link, or gone meanwhile
            continue
        if stat.S_ISREG(status.st_mode):
            yield file, status


def _raise(error: OSError) -> None:
    raise error


def _kind_of(error: OSError) -> FailureKind:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return FailureKind.NOT_FOUND
        case errno.EACCES | errno.EPERM:
            return FailureKind.AUTH
        case errno.ESTALE:
            return FailureKind.CHANGED
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM | errno.EAGAIN | errno.ETIMEDOUT:
            return FailureKind.BUSY
        case _:
            return FailureKind.RESET


def _failure(kind: FailureKind, path: Path, what: str) -> SourceError:
    mirror = f"file://{path}"
    return SourceError(f"{mirror} {what}.", kind=kind, mirror=mirror)
