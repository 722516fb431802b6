"""A chunk list for a file that one has: hashed once, pieces and whole from the same buffer.

The file must not change meanwhile; its size and times are compared before and after.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weightfs.core.geometry import BlobShape
from weightfs.core.manifest import Mirror
from weightfs.core.metalink import MAX_PIECE_LENGTH, MAX_PRIORITY, Metalink
from weightfs.errors import UsageError

READ_BYTES = 8 * 1024 * 1024


def describe(
    path: Path, urls: Sequence[str] = (), on_progress: Callable[[int, int], None] | None = None
) -> Metalink:
    """Hash a regular file and describe it. Blocks: call it in a thread where that matters.

    Args:
        path: the file. Its name goes into the list.
        urls: where it will be, http(s); the first has the best priority.
        on_progress: called with (bytes hashed, size), at most once per read of 8 MiB or per chunk.

    Raises:
        UsageError: it is no regular file, cannot be read, or changed meanwhile.
        ChunkListError: a URL or the name is one that a chunk list may not have.
    """
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise UsageError(f"{path} is not a regular file; publish describes one file.")
            shape = BlobShape.of(before.st_size)
            if shape.chunk_length > MAX_PIECE_LENGTH:
                raise UsageError(
                    f"{path} has {before.st_size} bytes, which is more than a list may describe."
                )
            whole, pieces = _hash(file.fileno(), shape, on_progress)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UsageError(f"{path} changed while it was read; publish it when nobody writes to it.")
    mirrors = tuple(Mirror(url, min(number, MAX_PRIORITY)) for number, url in enumerate(urls, 1))
    length = shape.chunk_length if shape.size else None
    return Metalink(path.name, shape.size, whole, length, pieces, mirrors)


def _hash(fd: int, shape: BlobShape, on_progress: Callable[[int, int], None] | None) -> tuple[bytes, bytes]:
    """(SHA-256 of everything, of each chunk). The two run beside each other: hashlib lets go of the GIL."""
    whole = hashlib.sha256()
    digests = bytearray()
    with ThreadPoolExecutor(1) as pool:
        for chunk in shape.chunks:
            span = shape.span_of(chunk)
            piece = hashlib.sha256()
            at = span.start
            while at < span.stop:
                data = os.pread(fd, min(READ_BYTES, span.stop - at), at)
                if not data:
                    raise UsageError("The file became shorter while it was read.")
                other = pool.submit(whole.update, data)
                piece.update(data)
                other.result()
                at += len(data)
            digests += piece.digest()
            if on_progress is not None:
                on_progress(at, shape.size)
    return whole.digest(), bytes(digests)
