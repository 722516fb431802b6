"""A published model at a test origin: the file, and beside it a chunk list, so that blobs may have small chunks."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from weightfs.core.geometry import KIB
from weightfs.core.manifest import Mirror
from weightfs.core.metalink import Metalink, write_metalink
from weightfs.core.ref import Ref, parse_ref
from weightfs.testing.origin import Fault, Origin, OriginFile, open_origin

CHUNK = 64 * KIB  # the shortest that a chunk list may have: many chunks in few bytes


def sample(length: int, seed: int = 0) -> bytes:
    """Bytes that differ everywhere, the same each time."""
    return hashlib.shake_128(b"weightfs %d" % seed).digest(length)


def chunk_list(data: bytes, urls: Sequence[str], *, chunk_length: int = CHUNK, name: str = "m.bin") -> bytes:
    """The `.meta4` of `data`; `urls` are its mirrors, the first one preferred."""
    digests = b"".join(
        hashlib.sha256(data[at : at + chunk_length]).digest() for at in range(0, len(data), chunk_length)
    )
    mirrors = tuple(Mirror(url, priority) for priority, url in enumerate(urls, 1))
    return write_metalink(
        Metalink(name, len(data), hashlib.sha256(data).digest(), chunk_length, digests, mirrors)
    )


@asynccontextmanager
async def published_origin(
    data: bytes, *, mirrors: Sequence[str] = (), faults: Mapping[str, Fault] | None = None
) -> AsyncIterator[tuple[Origin, Ref]]:
    """An origin with `/m.bin` and its chunk list, and the ref; `mirrors` are more places. `faults` are for `always`."""
    async with open_origin({"/m.bin": data}) as origin:
        url = origin.url("m.bin")
        origin.files["/m.bin.meta4"] = OriginFile(chunk_list(data, [url, *mirrors]))
        origin.always.update(faults or {})
        yield origin, parse_ref(url)


def bytes_asked(origin: Origin, path: str = "/m.bin") -> int:
    """Bytes in the ranges of all the GETs of a file so far: what was asked for, sent or not."""
    total = 0
    for seen in origin.requests(path):
        if seen.method == "GET" and seen.headers.get("range", "").startswith("bytes="):
            first, _, last = seen.headers["range"].removeprefix("bytes=").partition("-")
            total += int(last) - int(first) + 1
    return total
