"""What to fetch ahead of the readers of one inode.

Rules: nothing is fetched ahead of a single read; the window of a stream doubles only because a reader had to
wait, and only after a whole window was read, so that no more is on its way than the stream has read already
(the kernel's own window, 4 MiB in parallel requests that all wait, is one wait, and a loader that takes one
tensor of a big file pays for few neighbours); a read that goes back, or lands near a stream by chance, neither
moves nor grows anything.

The kernel turns one reader into requests of 128 KiB to 1 MiB, several in flight, which arrive out of order;
several threads, or a loader that copies tensor after tensor, read at several places at once. So streams
belong to an inode and an offset, not to a file handle.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightfs.core.geometry import MIB, BlobShape, ByteSpan, ChunkSpan

REORDER = 4 * MIB  # how far from the frontier a request of the same stream may begin, either way
_STRETCH = 16 * MIB  # over how much of its newest way a stream must be dense


@dataclass(slots=True)
class _Stream:
    frontier: int  # the furthest byte asked for
    origin: int  # where the stretch over which `seen` was counted begins
    seen: int  # bytes asked for in the stretch, never more than it is long
    window: int  # chunks
    grown_at: int  # the chunk boundary that reads had reached when the window last grew (or the stream began)

    def follow(self, span: ByteSpan) -> bool:
        """Take a read of this stream in; whether it leads on from a dense stretch."""
        leads = span.stop > self.frontier
        self.frontier = max(self.frontier, span.stop)
        self.seen = min(self.seen + len(span), self.frontier - self.origin)
        dense = 2 * self.seen >= self.frontier - self.origin
        if self.frontier - self.origin > _STRETCH:  # forget the older half
            self.origin += (self.frontier - self.origin) // 2
            self.seen //= 2
        return leads and dense


class ReadAhead:
    """The stream detectors of one inode: call `observe` for every read, in the order of arrival.

    Attributes:
        max_window: bytes that may be on their way ahead of one stream; less than a chunk turns read-ahead
            off. It may be changed at any time, as the budget for all inodes allows.
    """

    def __init__(self, shape: BlobShape, *, max_window: int = 64 * MIB, streams: int = 8) -> None:
        if streams < 1:
            raise ValueError(f"at least one stream is followed, not {streams}")
        self.max_window = max_window
        self._shape = shape
        self._limit = streams
        self._streams: list[_Stream] = []  # the least recently used first

    def observe(self, span: ByteSpan, stalled: bool) -> ChunkSpan | None:
        """Take a read in; the chunks beyond its own that should be on their way after it, or None.

        Args:
            span: the bytes asked for; what is past the end of the blob is ignored.
            stalled: whether the read has to wait for a chunk.
        """
        span = span.clamp(self._shape.size)
        if not len(span):
            return None
        covered = self._shape.chunks_covering(span)
        stream = self._nearest(span.start)
        if stream is None:
            self._streams.append(_Stream(span.stop, span.start, len(span), 1, covered.stop))
            del self._streams[: -self._limit]
            return None
        self._streams.remove(stream)
        self._streams.append(stream)
        if not stream.follow(span):
            return None
        longest = self.max_window // self._shape.chunk_length
        if stalled and covered.stop >= stream.grown_at + stream.window:
            stream.window = max(1, min(2 * stream.window, longest))
            stream.grown_at = covered.stop
        stop = min(covered.stop + min(stream.window, longest), self._shape.chunk_count)
        return ChunkSpan(covered.stop, stop) if stop > covered.stop else None

    def _nearest(self, start: int) -> _Stream | None:
        near = [stream for stream in self._streams if abs(start - stream.frontier) <= REORDER]
        return min(near, key=lambda stream: abs(start - stream.frontier), default=None)
