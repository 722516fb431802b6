"""Blobs made of bytes, and what is landed of them: for tests of the cache and of what stands on it."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass

from weightfs.core.geometry import BlobShape
from weightfs.core.manifest import Blob, BlobId, ChunkList, Entry, Manifest, Mirror, Policy
from weightfs.store.cache import Cache, ChunkState, Landing


@dataclass(frozen=True)
class Sample:
    """A blob and the bytes that it is of."""

    data: bytes
    blob: Blob

    @classmethod
    def of(
        cls,
        data: bytes,
        *,
        chunk_length: int = 4096,
        url: str = "https://host/m.gguf",
        listed: bool | None = None,
        known: bool = True,
        policy: Policy = Policy.PROVISIONAL,
    ) -> Sample:
        """`listed`: with a chunk list, trusted or not. Not `known`: no origin publishes the SHA-256."""
        sha256 = hashlib.sha256(data).digest()
        shape = BlobShape(len(data), chunk_length)
        chunks = None
        if listed is not None:
            digests = b"".join(
                hashlib.sha256(data[at : at + chunk_length]).digest()
                for at in range(0, len(data), chunk_length)
            )
            chunks = ChunkList(chunk_length, digests, listed, "ab12" if listed else "")
        blob_id = BlobId.of_digest(sha256) if known else BlobId.of_version(url, len(data), '"v1"')
        return cls(data, Blob(blob_id, shape, sha256 if known else None, (Mirror(url),), chunks, policy))

    @classmethod
    def random(
        cls, size: int, *, seed: int = 1, chunk_length: int = 4096, listed: bool | None = None
    ) -> Sample:
        """Bytes that look like nothing else."""
        return cls.of(random.Random(seed).randbytes(size), chunk_length=chunk_length, listed=listed)  # noqa: S311

    @property
    def id(self) -> BlobId:
        """The blob's id."""
        return self.blob.id

    def manifest(self, *, ref: str = "https://host/m.gguf", revision: str = "r1") -> Manifest:
        """One ref, one path, this blob."""
        return Manifest(ref, revision, "https/host", (Entry("m.gguf", self.blob),))

    def chunk(self, number: int) -> bytes:
        """The bytes of one chunk."""
        span = self.blob.shape.span_of(number)
        return self.data[span.start : span.stop]

    def landing(self, number: int, *, state: ChunkState = ChunkState.LANDED) -> Landing:
        """What a fetch of the true bytes reports."""
        return Landing(self.id, number, hashlib.sha256(self.chunk(number)).digest(), state, source=0)

    def write(self, cache: Cache, numbers: Iterable[int]) -> list[Landing]:
        """Put chunks into the prepared file, as a fetch worker does; returns their landings, not yet committed."""
        path = cache.prepare(self.id)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            landings = []
            for number in numbers:
                os.pwrite(descriptor, self.chunk(number), self.blob.shape.span_of(number).start)
                landings.append(self.landing(number))
        finally:
            os.close(descriptor)
        return landings

    def land(self, cache: Cache, numbers: Iterable[int], *, now: int = 100) -> None:
        """Write and commit chunks."""
        cache.commit(self.write(cache, numbers), now=now)
