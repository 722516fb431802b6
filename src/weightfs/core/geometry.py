"""Byte and chunk geometry of a blob. All spans are half-open; a `ByteSpan` is never a `ChunkSpan`.

Chunk `i` of a blob covers bytes `[i * chunk_length, min((i + 1) * chunk_length, size))`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

MIN_CHUNK_LENGTH = MIB
MAX_CHUNKS = 32_768  # a chunk list of one MiB of digests; one bitmap of 4 KiB
MAX_BLOB_SIZE = 1 << 50  # one PiB: past any model, and far from where 63-bit offsets would overflow


@dataclass(frozen=True, slots=True, order=True)
class ByteSpan:
    """Bytes `[start, stop)`. `start <= stop`; both non-negative."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a span: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def clamp(self, stop: int) -> ByteSpan:
        """The part of this span below `stop` (empty, at `stop`, if none is)."""
        return ByteSpan(min(self.start, stop), min(self.stop, stop))


@dataclass(frozen=True, slots=True, order=True)
class ChunkSpan:
    """Chunks `[start, stop)`. `start <= stop`; both non-negative."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"not a span: [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.stop))

    def __contains__(self, chunk: object) -> bool:
        return isinstance(chunk, int) and self.start <= chunk < self.stop

    def intersect(self, other: ChunkSpan) -> ChunkSpan:
        """The chunks in both (an empty span if none is)."""
        start = max(self.start, other.start)
        return ChunkSpan(start, max(start, min(self.stop, other.stop)))


def chunk_length_for(size: int) -> int:
    """The smallest power of two >= 1 MiB that cuts `size` bytes into at most 32,768 chunks."""
    length = MIN_CHUNK_LENGTH
    while length * MAX_CHUNKS < size:
        length *= 2
    return length


@dataclass(frozen=True, slots=True)
class BlobShape:
    """How a blob of `size` bytes is cut: every chunk has `chunk_length` bytes but the last, which may be shorter."""

    size: int
    chunk_length: int

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_BLOB_SIZE:
            raise ValueError(f"a blob has 0 to {MAX_BLOB_SIZE} bytes, not {self.size}")
        if self.chunk_length <= 0 or self.chunk_length & (self.chunk_length - 1):
            raise ValueError(f"a chunk length is a power of two, not {self.chunk_length}")

    @classmethod
    def of(cls, size: int) -> BlobShape:
        """The shape of a blob for which nobody published a chunk list."""
        return cls(size, chunk_length_for(size))

    @property
    def chunk_count(self) -> int:
        """How many chunks there are; 0 for an empty blob."""
        return -(-self.size // self.chunk_length)

    @property
    def chunks(self) -> ChunkSpan:
        """All of them."""
        return ChunkSpan(0, self.chunk_count)

    def span_of(self, chunk: int) -> ByteSpan:
        """The bytes of one chunk. IndexError if there is no such chunk."""
        if not 0 <= chunk < self.chunk_count:
            raise IndexError(f"chunk {chunk} of {self.chunk_count}")
        start = chunk * self.chunk_length
        return ByteSpan(start, min(start + self.chunk_length, self.size))

    def bytes_of(self, chunks: ChunkSpan) -> ByteSpan:
        """The bytes of a run of chunks, cut at the end of the blob."""
        return ByteSpan(chunks.start * self.chunk_length, chunks.stop * self.chunk_length).clamp(self.size)

    def chunks_covering(self, span: ByteSpan) -> ChunkSpan:
        """The fewest chunks that hold every byte of `span`; bytes past the end of the blob are ignored."""
        span = span.clamp(self.size)
        if not len(span):
            chunk = span.start // self.chunk_length
            return ChunkSpan(chunk, chunk)
        return ChunkSpan(span.start // self.chunk_length, -(-span.stop // self.chunk_length))
